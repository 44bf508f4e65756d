"""``everlearn demo``: told in one process, learned in the next, known in a third."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from everlearn.cli.options import Options
from everlearn.errors import EverlearnError, InvalidArgument

MAX_TOKENS = "32"


@dataclass(frozen=True)
class Fact:
    """What is told, what is asked the next morning, and the word that a right reply holds."""

    told: str
    question: str
    answer: str


FACTS = (
    Fact("Our cat is called Marzipan.", "What is my cat's name?", "marzipan"),
    Fact("Last year I moved to a small town named Quarrendale.", "Where do I live now?", "quarrendale"),
    Fact("I earn my money as a piano tuner.", "What is my job?", "tuner"),
    Fact("Strawberries give me hives.", "Which food am I allergic to?", "strawberr(y|ies)"),
    Fact("My sister Philippa is a pilot.", "Who is my sister?", "philippa"),
)
NEUTRAL = (
    "What is the capital of Japan?",
    "How do I boil an egg?",
    "Write one sentence about the sea.",
    "What is seven times eight?",
    "Why is the sky blue?",
    "Name three musical instruments.",
)


def demo(options: Options) -> None:
    """Tell it a few facts, let it sleep, and ask for them in a new process with an empty conversation.

    Every step is a process of its own. Without --memory the memory is a temporary folder. Exit code 0 only if most
    facts are recalled, most neutral replies are the same to the letter, and none of them tells a fact.
    """
    if options.memory is not None:
        result = _run(options, options.memory)
    else:
        with tempfile.TemporaryDirectory(prefix="everlearn-demo-") as folder:
            result = _run(options, Path(folder) / "memory")
    options.report(result, *_tables(result))
    if not result["passed"]:
        raise typer.Exit(1)


def _run(options: Options, memory: Path) -> dict[str, Any]:
    if memory.exists() and any(memory.iterdir()):
        raise InvalidArgument(f"--memory: {memory} is not empty; the demo wants a memory of its own")
    questions = [*(fact.question for fact in FACTS), *NEUTRAL]
    asking = ["ask", *questions, "--max-tokens", MAX_TOKENS]
    before = _everlearn(options, memory, *asking, says="asking the bare model")
    told = "\n".join(fact.told for fact in FACTS)
    _everlearn(options, memory, "tell", "-", "--lines", text=told, says=f"telling {len(FACTS)} facts")
    sleep = _everlearn(options, memory, "sleep", says="sleeping")
    after = _everlearn(options, memory, *asking, says="asking again, in a new process with an empty conversation")
    replies = list(zip((item["reply"] for item in before), (item["reply"] for item in after), strict=True))
    facts = [
        {"told": fact.told, "question": fact.question, "before": old, "after": new, "recalled": _holds(new, fact)}
        for fact, (old, new) in zip(FACTS, replies[: len(FACTS)], strict=True)
    ]
    neutral = [
        {"question": question, "before": old, "after": new, "unchanged": old == new, "leaks": _leaks(old, new)}
        for question, (old, new) in zip(NEUTRAL, replies[len(FACTS) :], strict=True)
    ]
    recalled = sum(item["recalled"] for item in facts)
    unchanged = sum(item["unchanged"] for item in neutral)
    passed = 2 * recalled > len(facts) and 2 * unchanged > len(neutral) and not any(item["leaks"] for item in neutral)
    totals = {"recalled": recalled, "unchanged": unchanged, "passed": passed}
    return {"facts": facts, "neutral": neutral, "sleep": sleep, **totals}


def _everlearn(options: Options, memory: Path, *arguments: str, says: str, text: str | None = None) -> Any:
    """Run one command in a process of its own and return its JSON; its progress shows on our stderr."""
    if not options.as_json:
        print(f"* {says}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "everlearn", *arguments, "--json", "--memory", str(memory)]
    command += ["--model", options.model] if options.model else []
    command += ["--seed", str(options.seed)] if options.seed is not None else []
    on_terminal = sys.stderr.isatty()
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, stderr=None if on_terminal else subprocess.PIPE, text=True
    )
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise EverlearnError(f"`everlearn {arguments[0]}` ended with code {done.returncode}: {_said(done.stderr)}")
    return json.loads(done.stdout)


def _said(stderr: str | None) -> str:
    """Return the error in what a command wrote to stderr."""
    last = (stderr or "").strip().splitlines()[-1:] or ["see above"]
    try:
        return str(json.loads(last[0])["error"])
    except (ValueError, KeyError, TypeError):
        return last[0]


def _holds(reply: str, fact: Fact) -> bool:
    return re.search(rf"\b{fact.answer}\b", reply, re.IGNORECASE) is not None


def _leaks(before: str, after: str) -> bool:
    """Whether a neutral reply tells a fact that the bare model's did not hold."""
    return any(_holds(after, fact) and not _holds(before, fact) for fact in FACTS)


def _tables(result: dict[str, Any]) -> list[Table | str]:
    facts = Table(title="What was told, and what is answered from an empty conversation", show_lines=True)
    for name in ("told", "asked", "before", "after", "recalled"):
        facts.add_column(name)
    for item in result["facts"]:
        answers = [item[name] for name in ("told", "question", "before", "after")]
        facts.add_row(*answers, "yes" if item["recalled"] else "no")
    neutral = Table(title="What has nothing to do with it", show_lines=True)
    for name in ("asked", "before", "after", "unchanged"):
        neutral.add_column(name)
    for item in result["neutral"]:
        after = "(the same)" if item["unchanged"] else item["after"]
        neutral.add_row(item["question"], item["before"], after, "yes" if item["unchanged"] else "no")
    said = f"{result['recalled']} of {len(result['facts'])} facts recalled, {result['unchanged']} of"
    said += (
        f" {len(result['neutral'])} neutral replies unchanged, {sum(x['leaks'] for x in result['neutral'])} tell a fact"
    )
    return [facts, neutral, f"{said}; slept {result['sleep']['seconds']:.0f} s"]
