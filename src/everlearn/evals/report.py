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
    written: list[Path] = []
    found: list[tuple[Path, str]] = [(path, path_suite(path)) for path in sorted(folder.glob("*.json"))]
    for path, suite in found:
        if suite in VIEWS:
            written += draw_suite(path)
        elif suite == "diary":
            written += diary_plots.report(path)
    if not written:
        raise InvalidArgument(f"folder: there is no results file (*.json of everlearn eval) in {folder}")
    pages = [path for path in written if path.suffix == ".md"]
    lines = ["# Results", "", "Drawn by `everlearn report` from the JSON files beside them.", ""]
    for page in pages:
        plots = [path.name for path in written if path.suffix == ".png" and path.stem.startswith(page.stem)]
        shown = "".join(f"\n  ![{name}]({name})" for name in plots)
        lines.append(f"* [{page.stem}]({page.name}){shown}")
    write_text(folder / "README.md", "\n".join([*lines, ""]))
    return [*written, folder / "README.md"]
