"""``everlearn eval optim``: optimisers that remember, compared at equal steps and at equal time.

Every optimiser gets the same number of learning rates per task, each tried once on a seed of its own and judged on
validation data: first its usual one, then each a factor of 3 beside the best so far. The best one of all is then run on
every seed. Each run is one file, so a killed evaluation continues where it
stopped. Results: ``rows.json`` (one schema for all), ``optim.md`` and plots.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from everlearn.errors import InvalidArgument
from everlearn.evals.optim_plots import draw_bars, draw_curves, draw_surface
from everlearn.evals.optim_tasks import ByteLM, Digits, OrthogonalTasks, OscillatingSurface, Problem
from everlearn.evals.results import compute_clock, interval, provenance, write_json, write_text
from everlearn.optim import OPTIMIZERS, create

Progress = Callable[[int, int, str], None]

TUNING_SEED = 1000
ADAMW_LR = 3e-3
"""Rate of vectors, embeddings and heads beside every rule for matrices."""


@dataclass(frozen=True)
class Contender:
    """An optimiser under test: its name in ``OPTIMIZERS``, the rate to try first, and options.

    ``starts`` are first rates by task, for a rule that minds the scale of gradients.
    """

    optimizer: str
    lr: float
    options: tuple[tuple[str, Any], ...] = ()
    starts: tuple[tuple[str, float], ...] = ()

    def start(self, task: str) -> float:
        """Return the rate to try first on ``task``."""
        return dict(self.starts).get(task, self.lr)


CONTENDERS = {
    "sgd": Contender("sgd", 0.1, (("momentum", 0.9),)),
    "adamw": Contender("adamw", 0.01, (("weight_decay", 0.0),), starts=(("lm", 3e-3),)),
    "dgd": Contender("dgd", 0.3),
    "delta_momentum": Contender("delta_momentum", 0.1),
    "dmgd": Contender("dmgd", 0.1),
    "muon": Contender("muon", 0.03),
    "m3": Contender("m3", 0.03),
    "m3_printed": Contender(
        "m3", 1e-3, (("form", "printed"), ("scale", "absolute")), starts=(("surface", 0.3), ("orthogonal", 0.3))
    ),
}


@dataclass(frozen=True)
class Budget:
    """Steps of each task, how many rates are tried on it, the language model's family, and points on each curve."""

    steps: dict[str, int]
    rates: dict[str, int]
    family: str = "transformer"
    points: int = 20


TASKS = ("surface", "orthogonal", "digits", "lm")
BUDGETS = {
    "tiny": Budget({"surface": 20, "orthogonal": 20, "digits": 10, "lm": 3}, dict.fromkeys(TASKS, 1), points=2),
    "small": Budget({"surface": 300, "orthogonal": 400, "digits": 300, "lm": 120}, dict.fromkeys(TASKS, 5)),
    "paper": Budget({"surface": 1000, "orthogonal": 1000, "digits": 1000, "lm": 3000}, dict.fromkeys(TASKS, 7), "hope"),
}


def run(
    out: Path, *, budget: str = "small", seeds: int = 3, data: Path | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Run the whole comparison and return its rows.

    Args:
        out: folder for ``runs/*.json``, ``rows.json``, ``optim.md`` and the plots; finished runs in it are kept.
        budget: one of ``BUDGETS``.
        seeds: seeds 0, 1, ... of the final runs.
        data: folder of text for the language task (its ``books`` folder, if it has one), left out without it.
        progress: called with runs done, runs in all, and what comes next.

    Raises:
        InvalidArgument: an unknown budget, no seeds, or a folder without enough text.
    """
    if budget not in BUDGETS:
        raise InvalidArgument(f"budget: got {budget!r}, expected one of {sorted(BUDGETS)}")
    if seeds < 1:
        raise InvalidArgument(f"seeds: got {seeds}, expected 1 or more")
    plan, out = BUDGETS[budget], Path(out)
    tasks: dict[str, Callable[[int, int], Problem]] = {
        "surface": OscillatingSurface,
        "orthogonal": OrthogonalTasks,
        "digits": Digits,
    }
    if data is not None:
        tasks["lm"] = functools.partial(ByteLM, data=Path(data), family=plan.family)
    pairs = [(task, name) for task in tasks for name in CONTENDERS if (task, name) != ("surface", "dgd")]
    done, total = 0, sum(plan.rates[task] + seeds for task, _ in pairs)
    results = []
    for task, name in pairs:
        steps, tried = plan.steps[task], {}

        def once(lr: float, seed: int, task: str = task, name: str = name, steps: int = steps) -> dict[str, Any]:
            nonlocal done
            if progress is not None:
                progress(done, total, f"{task}: {name}, rate {lr:.3g}, seed {seed}")
            done += 1
            what = f"lm-{plan.family}" if task == "lm" else task
            file = out / "runs" / f"{what}-{name}-{steps}-{lr:.3g}-{seed}.json"
            if file.exists():
                return json.loads(file.read_text())
            outcome = {"task": task, "model": name, "seed": seed, "lr": lr}
            outcome |= train(functools.partial(tasks[task], seed, steps), CONTENDERS[name], lr, steps, plan.points)
            write_json(file, outcome)
            return outcome

        for _ in range(plan.rates[task]):
            power = next_power(tried)
            rate = CONTENDERS[name].start(task) * 3.0**power
            tried[power] = _or_infinity(once(rate, TUNING_SEED)["validation_loss"]), rate
        best = min(tried.values())[1]
        results += [{**once(best, seed), "rates": sorted(rate for _, rate in tried.values())} for seed in range(seeds)]
    if progress is not None:
        progress(total, total, "tables and plots")
    rows = _rows(results)
    write_json(out / "rows.json", rows)
    write_text(out / "optim.md", _table(rows, plan.family))
    for task in tasks:
        draw_curves([r for r in results if r["task"] == task], task, out)
    draw_bars([r for r in results if r["task"] == "orthogonal"], "destroyed", "share of the first task destroyed", out)
    draw_surface([r for r in results if r["task"] == "surface" and r["seed"] == 0], OscillatingSurface.height, out)
    return rows


def next_power(tried: dict[int, tuple[float, float]]) -> int:
    """Return the nearest power of 3 to the best one of ``tried`` (power -> loss, rate) that was not tried."""
    best = min(tried, key=lambda power: tried[power][0], default=0)
    reach = len(tried) + 1
    untried = [power for power in range(best - reach, best + reach + 1) if power not in tried]
    return min(untried, key=lambda power: (abs(power - best), -power))


def train(
    problem_of: Callable[[], Problem], contender: Contender, lr: float, steps: int, points: int = 20
) -> dict[str, Any]:
    """Train one problem, the rate falling linearly to zero; a run that overflows ends with a loss of None.

    Returns:
        ``curve`` (step, training seconds, validation loss), ``validation_loss``, ``metrics``, ``parameters``,
        ``steps``, ``tokens``, ``seconds`` (of training, without measuring; see :func:`compute_clock`) and, for the
        surface, ``path``.
    """
    problem = problem_of()
    optimizer = _optimizer(problem, contender, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
    marks = {round(steps * (i + 1) / points) for i in range(points)}
    curve, seconds, finite = [[0, 0.0, _or_none(problem.measure()["loss"])]], 0.0, True
    clock = compute_clock()
    for step in range(steps):
        began = clock()
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        optimizer.step()
        schedule.step()
        finite = math.isfinite(loss.item())
        seconds += clock() - began
        if step + 1 in marks and finite:
            curve.append([step + 1, seconds, _or_none(problem.measure()["loss"])])
        if not finite:
            break
    metrics = {name: _or_none(value) if finite else None for name, value in problem.final().items()}
    outcome = {
        "curve": curve,
        "validation_loss": curve[-1][2] if finite else None,
        "metrics": metrics,
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "steps": steps,
        "tokens": steps * problem.tokens_per_step,
        "seconds": seconds,
        "provenance": provenance(),
    }
    if isinstance(problem, OscillatingSurface):
        outcome["path"] = [[_or_none(value) for value in point] for point in problem.path]
    return outcome


def _optimizer(problem: Problem, contender: Contender, lr: float) -> Optimizer:
    options = dict(contender.options)
    kind = OPTIMIZERS[contender.optimizer]
    if kind.__module__.startswith("everlearn"):
        options["adamw_lr"] = ADAMW_LR
    if contender.optimizer == "dgd":
        return create("dgd", problem.model, lr=lr, **options)
    make: Any = kind
    return make(problem.groups(), lr=lr, **options)


def _rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run and metric; ``loss_at_equal_time`` is the validation loss when AdamW had finished on that seed."""
    clocks = {(r["task"], r["seed"]): r["seconds"] for r in results if r["model"] == "adamw"}
    rows = []
    for result in results:
        in_time = _at_time(result["curve"], clocks[result["task"], result["seed"]])
        metrics = {**result["metrics"], "validation_loss": result["validation_loss"], "loss_at_equal_time": in_time}
        for metric, value in metrics.items():
            rows.append(
                {
                    **{name: result[name] for name in ("task", "model", "seed")},
                    "metric": metric,
                    "value": value,
                    **{name: result[name] for name in ("parameters", "tokens", "steps", "seconds", "lr", "rates")},
                    **result["provenance"],
                }
            )
    return rows


def _at_time(curve: list[list[Any]], limit: float) -> float | None:
    """Return the loss after ``limit`` seconds, between two points on the line through them; at most the last."""
    before = curve[0]
    for point in curve[1:]:
        if point[1] > limit:
            if point[2] is None or before[2] is None:
                return None
            share = (limit - before[1]) / (point[1] - before[1])
            return before[2] + share * (point[2] - before[2])
        before = point
    return before[2]


def _table(rows: list[dict[str, Any]], family: str) -> str:
    """A Markdown table a task: mean and 95% interval over seeds of every metric."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"Mean and 95% t-interval over {seeds} seeds. Each optimiser tried the same number of rates, each once on a"
        " seed of its own, judged on validation data: the first is fixed, each next one lies a factor of 3 beside the"
        " best so far (lowest, highest: none beyond it was tried). In a run the rate falls linearly to zero."
        " `loss_at_equal_time` is the validation loss in the middle of a run, when AdamW had finished its own;"
        f" `seconds` are of training. The language task (`lm`) trains a {family} of 0.14M parameters on bytes.",
        "",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        metrics = list(dict.fromkeys(row["metric"] for row in here))
        lines += [
            f"## {task}: {here[0]['steps']} steps, {len(here[0]['rates'])} rates each",
            "",
            "| optimiser | rate | " + " | ".join(metrics) + " | seconds |",
        ]
        lines.append("|---" * (len(metrics) + 3) + "|")
        for name in dict.fromkeys(row["model"] for row in here):
            mine = [row for row in here if row["model"] == name]
            cells = [interval([row["value"] for row in mine if row["metric"] == metric]) for metric in metrics]
            seconds = interval([row["seconds"] for row in mine if row["metric"] == metrics[0]])
            lines.append(f"| {name} | {_rate(mine[0])} | " + " | ".join([*cells, seconds]) + " |")
        lines.append("")
    return "\n".join(lines)


def _rate(row: dict[str, Any]) -> str:
    """The chosen rate, and whether it is the lowest or highest of those tried."""
    edges = {min(row["rates"]): " (lowest)", max(row["rates"]): " (highest)"} if len(row["rates"]) > 1 else {}
    return f"{row['lr']:.3g}{edges.get(row['lr'], '')}"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value
