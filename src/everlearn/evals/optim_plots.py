"""Plots of ``everlearn eval optim``: PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def draw_curves(results: list[dict[str, Any]], task: str, out: Path) -> None:
    """Draw validation loss against steps and against training seconds, the mean over seeds, as ``{task}.png|svg``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(result["model"] for result in results):
        curves = [result["curve"] for result in results if result["model"] == name]
        points = [[p for p in column if p[2] is not None] for column in zip(*curves)]
        mean = torch.tensor([[sum(values) / len(column) for values in zip(*column)] for column in points if column])
        for panel, axis in zip(panels, (0, 1)):
            panel.plot(mean[:, axis], mean[:, 2].clamp(min=1e-12), label=name)
    for panel, label in zip(panels, ("steps", "seconds of training")):
        panel.set(xlabel=label, ylabel="validation loss", yscale="log")
    panels[0].legend()
    figure.suptitle(task)
    _save(figure, out / task)


def draw_surface(results: list[dict[str, Any]], height: Callable[[Tensor, Tensor], Tensor], out: Path) -> None:
    """Draw each optimiser's path over the contours of the surface, as ``surface_paths.png|svg``."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    x, y = torch.linspace(-5, 1.5, 200), torch.linspace(-1.2, 1.2, 200)
    grid = height(x[None, :], y[:, None]).clamp(min=1e-4)
    columns = 3
    figure = Figure(figsize=(12, 2.8 * -(-len(results) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(results) // columns), columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    for panel, result in zip(panels, results):
        panel.contour(x, y, grid, levels=torch.logspace(-3, 1.3, 14).tolist(), norm=LogNorm(), linewidths=0.6)
        path = torch.tensor([point for point in result["path"] if None not in point])
        panel.plot(path[:, 0], path[:, 1], color="black", linewidth=0.8)
        panel.plot(*path[-1], "o", color="red", markersize=4)
        panel.set(title=f"{result['model']}, rate {result['lr']:.3g}", xlim=(-5, 1.5), ylim=(-1.2, 1.2))
    _save(figure, out / "surface_paths")


def _save(figure: Any, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(f"{stem}.{ending}", dpi=120)
