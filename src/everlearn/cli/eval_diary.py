"""``everlearn eval diary``: personal memory in weights, night by night."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everlearn.cli.options import ModelOption
from everlearn.cli.progress import Reporter


def eval_diary(
    data: Annotated[Path, typer.Option("--data", help="Folder of the diary, or a folder that holds it.")],
    split: Annotated[str, typer.Option("--split", help="Name of the files.")],
    days: Annotated[int, typer.Option("--days", help="Days to live through.")],
    out: Annotated[Path, typer.Option("--json", help="The results file; a table and plots appear beside it.")],
    seeds: Annotated[int, typer.Option("--seeds", help="Each another order and another sampling.")] = 3,
    first_seed: Annotated[
        int | None,
        typer.Option("--first-seed", help="Default: 0. Several processes may fill one file, each with its own seeds."),
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Names with commas; default: everlearn.")] = None,
    baselines: Annotated[
        str | None, typer.Option("--baselines", help="Names with commas, such as frozen,context,retrieval,lora,full.")
    ] = None,
    eval_days: Annotated[
        str | None, typer.Option("--eval-days", help="When to measure: all (the default), last, or days with commas.")
    ] = None,
    model: ModelOption = None,
) -> None:
    """Tell facts day by day, sleep, and ask from an empty context. Finished days in the results file are kept."""
    given: dict[str, Any] = {"methods": _names(methods), "baselines": _names(baselines), "model": model}
    given["first_seed"] = first_seed
    given["eval_days"] = _days(eval_days) if eval_days else None
    with Reporter() as progress:
        progress("living through the diary", 0.0)
        from transformers.utils import logging

        from everlearn.evals.diary import run

        logging.set_verbosity_error()
        wished = {name: value for name, value in given.items() if value is not None}
        run(data, split, days, seeds, out, progress=progress.counter("living through the diary"), **wished)
    print(out.with_suffix(".md").read_text(encoding="utf-8"), end="")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _days(text: str) -> str | list[int]:
    """Return the days of a list with commas, or the word as it is."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else text
