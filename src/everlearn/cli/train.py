"""``everlearn train``: a model from scratch."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from everlearn.cli.options import JsonOption, SeedOption, report
from everlearn.errors import InvalidArgument


def train(
    model: Annotated[str, typer.Option("--model", metavar="PRESET", help="Such as hope-tiny.")],
    data: Annotated[
        str, typer.Option("--data", help="A folder of .txt and .jsonl, one such file, or a Hugging Face dataset.")
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="To train on, over all processes.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints, model and result.json.")],
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="One to reuse; by default one is made.")] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Of a tokenizer that is made.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens a row.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows a step and process.")] = None,
    accumulation: Annotated[int | None, typer.Option("--accumulation", help="Batches a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Of matrices.")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="Share of the steps.")] = None,
    held_out: Annotated[float | None, typer.Option("--held-out", help="Share of the text, where no file is.")] = None,
    held_out_files: Annotated[
        list[str] | None, typer.Option("--held-out-files", metavar="PATTERN", help="Files to hold out; repeatable.")
    ] = None,
    text_field: Annotated[str | None, typer.Option("--text-field", help="Of .jsonl files and datasets.")] = None,
    log_every: Annotated[int | None, typer.Option("--log-every", help="Steps between log lines.")] = None,
    report_to: Annotated[str | None, typer.Option("--report-to", help="tensorboard or none.")] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the folder.")] = True,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Save memory.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no accelerator.")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the preset; repeatable.")
    ] = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model from scratch on plain text; `torchrun -m everlearn train ...` uses several processes."""
    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "length": length,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "held_out": held_out_files or held_out,
        "text_field": text_field,
        "log_every": log_every,
        "report_to": report_to,
        "save_every": save_every,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    flags = {"resume": resume, "bf16": bf16, "gradient_checkpointing": gradient_checkpointing, "cpu": cpu}
    changes = dict(map(field, change or []))
    from everlearn.train import train as run

    if wrong := changes.keys() & inspect.signature(run).parameters.keys():
        raise InvalidArgument(f"--set: got {sorted(wrong)}, expected fields of the preset's configuration")
    with contextlib.redirect_stdout(sys.stderr):  # the trainer's log
        result = run(model, data, tokens=tokens, out=out, **given, **flags, **changes)
    if os.environ.get("RANK", "0") == "0":
        said = f"{result.out}: {result.parameters:,} parameters, {result.tokens:,} tokens in {result.steps} steps"
        report(asdict(result), f"{said}, held-out loss {result.held_out_loss:.4f}", as_json=as_json)


def field(text: str) -> tuple[str, Any]:
    """Return the name and the value (JSON, or else a word) of ``name=value``."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InvalidArgument(f"--set: got {text!r}, expected FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
