"""``everlearn eval learns``: HOPE and a Transformer++ of as many parameters, both trained by ``everlearn train``.

Same text, tokens, rate and seeds; what counts is the loss on books that were held out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from everlearn.errors import InvalidArgument
from everlearn.evals.results import Results, compute_clock, interval, mean_interval
from everlearn.models.presets import preset
from everlearn.models.registry import count_parameters
from everlearn.train import train
from everlearn.train.data import load_corpus, load_tokenizer, train_tokenizer

__all__ = ["MODELS", "run_learns"]

VERSION = 2  # 2: HOPE's output has a gate
MODELS = ("hope-tiny", "transformer-tiny")
TOLERANCE = 0.03  # how far counts of parameters may be apart
SHARE = 0.02  # how far behind HOPE's held-out loss may be


def run_learns(
    data: Path,
    out: Path,
    *,
    models: Sequence[str] = MODELS,
    seeds: int = 3,
    tokens: int = 500_000,
    length: int = 256,
    batch_size: int = 8,
    lr: float = 3e-3,
    vocab_size: int = 1024,
    held_out: Sequence[str] = ("*call-of-the-wild*",),
    changes: dict[str, Any] | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, Any]:
    """Train every model with every seed, write ``learns.json`` and ``learns.png`` to ``out``, and return the summary.

    Runs that are in the file are kept; a run that was cut off goes on from its last checkpoint under ``out/runs``.

    Args:
        data: a folder of text, see :func:`everlearn.train.data.load_corpus`.
        out: the folder.
        models: two names of presets, HOPE's first.
        seeds: of start and order of the text.
        tokens, length, batch_size, lr, vocab_size, held_out: see :func:`everlearn.train.train`.
        changes: fields of both presets to replace.
        progress: called with what is done and how much of the whole.

    Raises:
        InvalidArgument: models whose parameters are more than 3% apart, or a file of another protocol.
    """
    changes = {"vocab_size": vocab_size, **(changes or {})}
    counts = [count_parameters(preset(name, **changes)) for name in models]
    if len(models) != 2 or abs(counts[0] / counts[1] - 1) > TOLERANCE:
        raise InvalidArgument(f"models: got {dict(zip(models, counts))} parameters, expected two within 3%")
    protocol = {
        "models": list(models), "tokens": tokens, "length": length, "batch_size": batch_size, "lr": lr,
        "held_out": list(held_out), "changes": changes,
    }  # fmt: skip
    results = Results(out / "learns.json", suite="learns", version=VERSION, protocol=protocol, keys=("model", "seed"))
    made = out / "runs" / "tokenizer"
    if not (made / "tokenizer.json").is_file():
        train_tokenizer(load_corpus(data, held_out).train, vocab_size).save_pretrained(made)
    pairs = [(name, seed) for seed in range(seeds) for name in models]
    for done, (name, seed) in enumerate(pairs):
        progress(f"{name}, seed {seed}", done / len(pairs))
        if results.find(name, seed) is not None:
            continue
        clock = compute_clock()
        began, log_every = clock(), max(1, tokens // (length * batch_size * 40))
        found = train(
            name, data, tokens=tokens, out=out / "runs" / f"{name}-{seed}", tokenizer=load_tokenizer(made),
            length=length, batch_size=batch_size, lr=lr, held_out=held_out, seed=seed, save_every=30,
            log_every=log_every,
            **{key: value for key, value in changes.items() if key != "vocab_size"},
        )  # fmt: skip
        curve = [[entry["step"], entry["loss"]] for entry in found.history]
        results.add(
            {
                "model": name,
                "seed": seed,
                "held_out_loss": found.held_out_loss,
                "parameters": found.parameters,
                "tokens": found.tokens,
                "steps": found.steps,
                "seconds": clock() - began,
                "curve": curve,
            }
        )
    summary = results.finish(lambda rows: _summary(rows, models))
    _draw(results.rows, models, out / "learns.png")
    return summary


def _summary(rows: list[dict[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    losses = {name: [row["held_out_loss"] for row in rows if row["model"] == name] for name in models}
    ours, other = (losses[name] for name in models)
    ratios = [a / b for a, b in zip(ours, other)]
    mean, half = mean_interval(ratios)
    return {
        "held_out_loss": {name: interval(values) for name, values in losses.items()},
        "ratio": mean,
        "ratio_half_width": half,
        "within_2_percent": mean <= 1 + SHARE,
    }


def _draw(rows: list[dict[str, Any]], models: Sequence[str], path: Path) -> None:
    """Training loss of every seed and its mean, and the held-out loss as a mark at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    panel = figure.subplots()
    for index, name in enumerate(models):
        here = [row for row in rows if row["model"] == name]
        for row in here:
            panel.plot(*zip(*row["curve"]), color=f"C{index}", alpha=0.25, linewidth=0.8)
            panel.plot(row["steps"], row["held_out_loss"], "x", color=f"C{index}")
        means = [
            (column[0][0], statistics.fmean(loss for _, loss in column)) for column in zip(*(r["curve"] for r in here))
        ]
        panel.plot(*zip(*means), color=f"C{index}", label=f"{name}: training (lines), held out (crosses)")
    panel.set(xlabel=f"steps of {rows[0]['tokens'] // rows[0]['steps']} tokens", ylabel="nats a token")
    panel.grid(alpha=0.3, linewidth=0.5)
    panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
