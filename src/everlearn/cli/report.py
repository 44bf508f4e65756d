"""``everlearn report``: tables and plots from results files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlearn.cli.eval_suite import RESULTS
from everlearn.cli.options import JsonOption
from everlearn.cli.options import report as show


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of results files; tables and plots appear in it.")] = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Draw every table (Markdown) and plot (PNG, SVG) from the results files (JSON) of the evaluations."""
    from everlearn.evals.report import draw_all

    written = [str(path) for path in draw_all(folder)]
    show(written, "\n".join(written), as_json=as_json)
