"""What the commands of the from-scratch suites share: their options, and how results are shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from everlearn.cli.progress import Reporter

__all__ = ["suite_command"]

RESULTS = Path("docs/results")

Names = Annotated[str | None, typer.Option("--models", help="Names with commas; default: all models of the suite.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Seeds of the final runs.")]
Budget = Annotated[str, typer.Option("--budget", help="tiny, small or paper; of formal also counting.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes that train at once, one thread each.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder laid out like the data folder; default: public datasets, fetched by name."),
]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Names with commas; default: all tasks of the suite.")]


def suite_command(name: str, text: str, *, tasks: bool = False) -> Callable[..., None]:
    """Return the command that runs a suite.

    Args:
        name: key of :data:`everlearn.evals.suites.SUITES`.
        text: the command's help.
        tasks: whether single tasks can be chosen.
    """
    stage = f"evaluating {name}"

    def command(**given: Any) -> None:
        out, wished = given.pop("out"), {key: value for key, value in given.items() if value is not None}
        for key in ("models", "tasks"):
            if key in wished:
                wished[key] = [part.strip() for part in wished[key].split(",") if part.strip()]
        with Reporter() as progress:
            progress(stage, 0.0)
            from everlearn.evals.suite import run_suite
            from everlearn.evals.suite_report import draw_suite
            from everlearn.evals.suites import SUITES

            run_suite(SUITES[name], out, progress=progress.counter(stage), **wished)
            page = draw_suite(out)[0]
        print(page.read_text(encoding="utf-8"), end="")

    out = Annotated[
        Path, typer.Option("--json", help="The results file; finished runs in it are kept. Table and plots beside it.")
    ]
    options: dict[str, tuple[Any, Any]] = {"models": (Names, None)}
    if tasks:
        options["tasks"] = (Tasks, None)
    options |= {"seeds": (Seeds, 3), "data": (Data, None), "out": (out, RESULTS / f"{name}.json")}
    options |= {"budget": (Budget, "small"), "workers": (Workers, 1)}
    kind = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, kind, default=default, annotation=a) for key, (a, default) in options.items()]
    )
    command.__name__, command.__doc__ = f"eval_{name}", text
    return command
