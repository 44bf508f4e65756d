"""``everlearn ask``: answer from the weights alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlearn.cli.options import CautionOption, Options

if TYPE_CHECKING:
    from everlearn.learner import Reminder


def ask(
    options: Options,
    text: Annotated[list[str], typer.Argument(help="The question; several are asked one by one.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply.")] = 64,
    caution: CautionOption = None,
    why: Annotated[
        bool, typer.Option("--why", help="Show of what you told each question reminds it, and how much.")
    ] = False,
) -> None:
    """Ask it in an empty conversation. Nothing is journalled or learned.

    With --json one question gives {"question", "reply"}, several give a list of these; with --why each has "reminded".
    """
    answers: list[dict[str, Any]] = []
    shown: list[str] = []
    with options.learner(create=True, caution=caution) as (learner, progress):
        for number, question in enumerate(text):
            progress("answering", number / len(text))
            answers.append({"question": question, "reply": learner.ask(question, max_new_tokens=max_tokens)})
            shown.append(answers[-1]["reply"])
            if why:
                reminders = learner.reminded(question)
                answers[-1]["reminded"] = [asdict(reminder) for reminder in reminders]
                shown += [_told(reminder) for reminder in reminders]
    options.report(answers if len(answers) > 1 else answers[0], *shown)


def _told(reminder: Reminder) -> str:
    """Return a line on what was told: a mark if it speaks where the reply begins, its likeness, number and text."""
    mark = "*" if reminder.heard else " "
    return f"  {mark} {reminder.likeness:.2f}  {reminder.observation.id}: {' '.join(reminder.observation.text.split())}"
