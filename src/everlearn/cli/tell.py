"""``everlearn tell``: journal what the user says. No model is needed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from everlearn.cli.options import Options
from everlearn.errors import InvalidArgument


def tell(
    options: Options,
    text: Annotated[str, typer.Argument(help="What to remember; - reads it from standard input.")],
    remember: Annotated[bool, typer.Option("--remember", help="Keep it even if it seems to be small talk.")] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is something by itself.")] = False,
) -> None:
    """Tell it something. It is safe on disk when this ends with 0, and learned at the next sleep. Prints its id."""
    from everlearn.learner.store import Heard

    said = _standard_input() if text == "-" else text
    parts = [line.strip() for line in said.splitlines() if line.strip()] if lines else [said.strip()]
    if not parts:
        raise InvalidArgument("text: got no line with words in it")
    meta = {"remember": True} if remember else {}
    with options.store(create=True) as store:
        ids = store.add_observations([Heard(part, meta=meta) for part in parts])
        heard = [asdict(item) for item in store.history() if item.id in ids]
    options.report(heard if lines else heard[0], *map(str, ids))


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"text: standard input is not UTF-8 ({error.reason} at byte {error.start})") from None
