"""``everlearn generate``: continue a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everlearn.cli.options import JsonOption, SeedOption, report


def generate(
    folder: Annotated[Path, typer.Argument(help="A model's folder, as `everlearn train` leaves it.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest continuation.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0: the likeliest token each time.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from this probability mass.")] = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with a model trained from scratch."""
    from everlearn.train import generate as run

    wished: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    text = run(folder, prompt, **{name: value for name, value in wished.items() if value is not None})
    report({"prompt": prompt, "text": text}, prompt + text, as_json=as_json)
