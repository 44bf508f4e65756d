"""``everlearn eval learns``: HOPE beside a Transformer++."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from everlearn.cli.options import report
from everlearn.cli.train import field


def eval_learns(
    data: Annotated[Path, typer.Option("--data", help="Folder of text.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for learns.json, learns.png and the runs.")] = Path(
        "docs/results/learns"
    ),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of each model.")] = 3,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens a run.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens a row.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate, of both.")] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Of the tokenizer.")] = None,
    held_out_files: Annotated[
        list[str] | None, typer.Option("--held-out-files", metavar="PATTERN", help="Files to hold out; repeatable.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of both presets.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train HOPE and a Transformer++ of as many parameters on the same text. Finished runs in the folder are kept."""
    wished: dict[str, Any] = {
        "tokens": tokens,
        "length": length,
        "batch_size": batch_size,
        "lr": lr,
        "vocab_size": vocab_size,
        "held_out": held_out_files,
        "changes": dict(map(field, change or [])),
    }
    from everlearn.evals.learns import run_learns

    def progress(what: str, share: float) -> None:
        print(f"{share:4.0%} {what}", flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # the trainer's log
        given = {name: value for name, value in wished.items() if value is not None}
        found = run_learns(data, out, seeds=seeds, progress=progress, **given)
    lines = [f"{name}: held-out loss {loss}" for name, loss in found["held_out_loss"].items()]
    report(found, "\n".join([*lines, f"ratio {found['ratio']:.4f}"]), as_json=as_json)
