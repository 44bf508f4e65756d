"""Step time of the optimisers on a set of matrices, as ratios to AdamW's and torch's own Muon's in the same run.

    python -m benchmarks.optim_step --out docs/results/speed

The set is that of a transformer (four square projections and three of a SwiGLU a layer), 50M parameters by default.
Rounds are interleaved, so that a busy machine slows all alike; the median of each is reported.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from everlearn.evals.results import compute_clock, provenance, write_json
from everlearn.optim import DMGD, M3, DeltaMomentum, Muon


def matrices(parameters: float, hidden_size: int) -> list[nn.Parameter]:
    """Return whole layers of matrices with gradients, about ``parameters`` numbers in all and at least one layer."""
    inner = 8 * hidden_size // 3 // 32 * 32 or hidden_size
    layer = [(hidden_size, hidden_size)] * 4 + [(inner, hidden_size)] * 2 + [(hidden_size, inner)]
    count = max(1, round(parameters / sum(rows * columns for rows, columns in layer)))
    params = [nn.Parameter(torch.randn(shape) * 0.02) for _ in range(count) for shape in layer]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def contenders() -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Return the optimisers, torch's own Muon among them where this torch has one."""
    kinds: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        "delta_momentum": lambda p: DeltaMomentum(p, lr=1e-4),
        "dmgd": lambda p: DMGD(p, lr=1e-4),
        "muon": lambda p: Muon(p, lr=1e-4),
        "muon_bf16": lambda p: Muon(p, lr=1e-4, ns_dtype=torch.bfloat16),
        "m3": lambda p: M3(p, lr=1e-4),
        "m3_bf16": lambda p: M3(p, lr=1e-4, ns_dtype=torch.bfloat16),
    }
    if hasattr(torch.optim, "Muon"):
        kinds["torch_muon"] = lambda p: torch.optim.Muon(p, lr=1e-4)
    return kinds


def measure(parameters: float, hidden_size: int, rounds: int, names: list[str]) -> list[dict[str, object]]:
    """Return a row for each optimiser and reference: median seconds a step and their ratio to the reference's."""
    clock = compute_clock()
    optimizers = {name: make(matrices(parameters, hidden_size)) for name, make in contenders().items() if name in names}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 1):
        for name, optimizer in optimizers.items():
            began = clock()
            optimizer.step()
            if turn:  # the first round builds the state
                seconds[name].append(clock() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    size = sum(p.numel() for p in matrices(parameters, hidden_size))
    return [
        {
            "task": "optim_step",
            "model": name,
            "seed": 0,
            "metric": f"step_time_ratio_to_{reference}",
            "value": value / median[reference],
            "parameters": size,
            "tokens": 0,
            "steps": rounds,
            "seconds": value,
            "hidden_size": hidden_size,
            **provenance(),
        }
        for reference in ("adamw", "torch_muon")
        if reference in median
        for name, value in median.items()
    ]


def main() -> None:
    """Run the benchmark and write ``optim_step.json``."""
    parser = argparse.ArgumentParser(description="Step time of the optimisers as a ratio to AdamW's")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"))
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizers", nargs="*", default=list(contenders()))
    options = parser.parse_args()
    rows = measure(options.parameters, options.hidden_size, options.rounds, ["adamw", *options.optimizers])
    write_json(options.out / "optim_step.json", rows)
    for row in rows:
        print(f"{row['model']:16} {row['seconds']:9.4f} s a step   {row['metric']} {row['value']:8.2f}")


if __name__ == "__main__":
    main()
