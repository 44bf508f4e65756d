"""``everlearn import``: a memory from an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlearn.cli.options import Options


def import_(
    options: Options,
    file: Annotated[Path, typer.Argument(help="Made by `everlearn export`.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace the memory that is there.")] = False,
) -> None:
    """Make the memory from an exported file, after checking all of it."""
    from everlearn.learner.store import MemoryStore

    MemoryStore.import_(file, options.folder, replace=replace)
    with options.store(read_only=True) as store:
        found = store.status()
    counts = ", ".join(f"{count} {state}" for state, count in found["observations"].items())
    options.report(found, f"{found['path']}: night {found['head']}; {counts}")
