"""``everlearn report``: every table and plot of a folder of results, drawn from the JSON files alone."""

from __future__ import annotations

from pathlib import Path

from everlearn.errors import InvalidArgument
from everlearn.evals import diary_plots
from everlearn.evals.results import write_text
from everlearn.evals.suite_report import VIEWS, draw_suite, path_suite

__all__ = ["draw_all"]


def draw_all(folder: Path) -> list[Path]:
    """Draw all results files of a folder beside them, and an index ``README.md``; return what was written.

    Files of unknown kind are left alone.

    Raises:
        InvalidArgument: the folder holds no results file.
    """
    drawn: list[list[Path]] = []
    for path in sorted(folder.glob("*.json")):
        suite = path_suite(path)
        if suite in VIEWS:
            drawn.append(draw_suite(path))
        elif suite == "diary":
            drawn.append(diary_plots.report(path))
    if not drawn:
        raise InvalidArgument(f"folder: there is no results file (*.json of everlearn eval) in {folder}")
    lines = ["# Results", "", "Drawn by `everlearn report` from the JSON files beside them.", ""]
    for paths in drawn:
        plots = [path.name for path in paths if path.suffix == ".png"]
        shown = "".join(f"\n  ![{name}]({name})" for name in plots)
        lines += [f"* [{page.stem}]({page.name}){shown}" for page in paths if page.suffix == ".md"]
    write_text(folder / "README.md", "\n".join([*lines, ""]))
    return [*(path for paths in drawn for path in paths), folder / "README.md"]
