"""Plots of ``everlearn eval optim``: PNG and SVG."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = ("sgd", "adamw", "dgd", "delta_momentum", "dmgd", "muon", "m3", "m3_printed")
"""In the order of their colours, the same in every plot."""

TITLES = {
    "surface": "Valley of oscillating curvature: height",
    "orthogonal": "Two tasks on orthogonal inputs: error of each in its own turn",
    "digits": "Handwritten digits",
    "lm": "Bytes of books",
}


def draw_curves(results: list[dict[str, Any]], task: str, out: Path) -> None:
    """Draw validation loss against steps and training seconds, mean and range over seeds, as ``{task}.png|svg``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lowest, top = float("inf"), 1.3 * max(result["curve"][0][2] for result in results)
    for name in dict.fromkeys(result["model"] for result in results):
        curves = [result["curve"] for result in results if result["model"] == name]
        points = [column for column in zip(*curves) if all(p[2] is not None for p in column)]
        mean = torch.tensor([[statistics.fmean(values) for values in zip(*column)] for column in points])
        low, high = (torch.tensor([pick(p[2] for p in column) for column in points]) for pick in (min, max))
        lowest = min(lowest, float(mean[:, 2].min()))
        for panel, axis in zip(panels, (0, 1)):
            panel.plot(mean[:, axis], mean[:, 2].clamp(min=1e-12), label=name, **_style(name))
            panel.fill_between(
                mean[:, axis], low.clamp(min=1e-12), high.clamp(min=1e-12), where=(mean[:, 2] < top).tolist(),
                color=_style(name)["color"], alpha=0.15, linewidth=0,
            )  # fmt: skip
    for panel, label in zip(panels, ("steps", "seconds of training")):
        panel.set(xlabel=label, yscale="log", ylim=(max(lowest, 1e-12) * 0.9, top))
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", nbins=6)
    panels[0].set_ylabel("validation loss")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(TITLES.get(task, task))
    _save(figure, out / task)


def draw_bars(results: list[dict[str, Any]], metric: str, label: str, out: Path) -> None:
    """Draw ``metric`` as ``{task}_{metric}.png|svg``: a bar the mean, a dot a seed; none where a seed has no value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(result["model"] for result in results))
    for index, name in enumerate(names):
        values = [result["metrics"][metric] for result in results if result["model"] == name]
        if None in values:
            panel.text(index, 0, "diverged", rotation=90, ha="center", va="bottom")
            continue
        panel.bar(index, statistics.fmean(values), color=_style(name)["color"], alpha=0.6)
        panel.plot([index] * len(values), values, "o", color="black", markersize=3)
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    panel.set_xlim(-0.6, len(names) - 0.4)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_ylabel(label)
    panel.grid(alpha=0.3, axis="y", linewidth=0.5)
    _save(figure, out / f"{results[0]['task']}_{metric}")


def draw_surface(results: list[dict[str, Any]], height: Callable[[Tensor, Tensor], Tensor], out: Path) -> None:
    """Draw each optimiser's path over the contours of the surface, as ``surface_paths.png|svg``."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    x, y = torch.linspace(-5.6, 1.5, 200), torch.linspace(-1.2, 1.2, 200)
    grid = height(x[None, :], y[:, None]).clamp(min=1e-4)
    columns = 3
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(12, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    for index, (panel, result) in enumerate(zip(panels, results)):
        panel.contour(x, y, grid, levels=torch.logspace(-3, 1.3, 14).tolist(), norm=LogNorm(), linewidths=0.5)
        path = torch.tensor([point for point in result["path"] if None not in point])
        panel.plot(path[:, 0], path[:, 1], color="black", linewidth=0.8)
        panel.plot(*path[0], "s", color="black", markersize=4)
        panel.plot(*path[-1], "o", color="red", markersize=4)
        panel.set(title=f"{result['model']}, rate {result['lr']:.3g}", xlim=(-5.6, 1.5), ylim=(-1.2, 1.2))
        panel.tick_params(labelbottom=index + columns >= len(results))
    figure.supxlabel("x")
    figure.supylabel("y")
    _save(figure, out / "surface_paths")


def _style(name: str) -> dict[str, Any]:
    index = NAMES.index(name) if name in NAMES else len(NAMES)
    return {"color": f"C{index}", "linestyle": ("-", "--")[index % 2], "linewidth": 1.6}


def _save(figure: Any, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(f"{stem}.{ending}", dpi=120)
