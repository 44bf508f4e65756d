"""``everlearn ask``: answer from the weights alone."""

from __future__ import annotations

from typing import Annotated

import typer

from everlearn.cli.options import Options


def ask(
    options: Options,
    text: Annotated[list[str], typer.Argument(help="The question; several are asked one by one.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply.")] = 64,
) -> None:
    """Ask it in an empty conversation. Nothing is journalled or learned.

    With --json one question gives {"question", "reply"}, several give a list of these.
    """
    answers = []
    with options.learner(create=True) as (learner, progress):
        for number, question in enumerate(text):
            progress("answering", number / len(text))
            answers.append({"question": question, "reply": learner.ask(question, max_new_tokens=max_tokens)})
    options.report(answers if len(answers) > 1 else answers[0], *(answer["reply"] for answer in answers))
