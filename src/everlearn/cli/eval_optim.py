"""``everlearn eval optim``: optimisers compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlearn.cli.options import report
from everlearn.cli.progress import Reporter


def eval_optim(
    out: Annotated[Path, typer.Option("--out", help="Folder for runs, rows.json, optim.md and plots.")],
    budget: Annotated[str, typer.Option("--budget", help="tiny, small or paper.")] = "small",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of the final runs.")] = 3,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of text for the language task (or of `books`); left out without it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of the table.")] = False,
) -> None:
    """Compare optimisers at equal steps and at equal time. Finished runs in the folder are kept: it can be resumed."""
    with Reporter() as progress:
        progress("comparing optimisers", 0.0)
        from everlearn.evals.optim import run

        rows = run(out, budget=budget, seeds=seeds, data=data, progress=progress.counter("comparing optimisers"))
    report(rows, (out / "optim.md").read_text(encoding="utf-8"), as_json=as_json)
