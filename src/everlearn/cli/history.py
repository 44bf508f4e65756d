"""``everlearn history``: all that was heard, and what became of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from everlearn.cli.options import Options


def history(
    options: Options,
    nights: Annotated[bool, typer.Option("--nights", help="List the nights instead.")] = False,
) -> None:
    """List everything it was told with its state: heard, consolidated, dismissed or forgotten."""
    with options.store(read_only=True) as store:
        head, slept = store.head, store.nights()
        heard = store.history()
    if nights:
        table = Table()
        for name in ("night", "after", "at", "KiB", ""):
            table.add_column(name)
        for item in slept:
            note = "current" if item.n == head else item.unavailable or ""
            table.add_row(str(item.n), str(item.parent), item.created_at[:16], str(item.bytes // 1024), note)
        options.report([asdict(item) for item in slept], table)
        return
    row = "{:>6}  {:16}  {:12}  {:>5}  {}".format  # not a Table, which takes seconds for a few thousand rows
    lines = [row("id", "told at", "state", "night", "text")]
    for item in heard:
        lines.append(row(item.id, item.told_at[:16], item.state, item.night or "", " ".join(item.text.split())))
    options.report([asdict(item) for item in heard], "\n".join(lines))
