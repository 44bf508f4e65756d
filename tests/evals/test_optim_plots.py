"""Plots of the optimiser comparison: also of runs that diverged."""

from __future__ import annotations

from everlearn.evals.optim_plots import draw_bars, draw_curves, draw_surface
from everlearn.evals.optim_tasks import OscillatingSurface


def result(name: str, last: float | None) -> dict:
    curve = [[0, 0.0, 2.0], [5, 0.1, 1.0], [10, 0.2, last]]
    path = [[-4.0, 1.0], [-3.0, 0.5], [None, None]]
    return {"task": "digits", "model": name, "lr": 0.1, "curve": curve, "path": path, "metrics": {"lost": last}}


def test_curves_and_paths_are_drawn_as_png_and_svg(tmp_path):
    results = [result("adamw", 0.5), result("adamw", 0.6), result("m3", None)]
    draw_curves(results, "digits", tmp_path)
    draw_surface(results, OscillatingSurface.height, tmp_path)
    draw_bars(results, "lost", "share lost", tmp_path)
    for stem in ("digits", "surface_paths", "digits_lost"):
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        text = (tmp_path / f"{stem}.svg").read_text()
        assert "<svg" in text
        assert text.count("<path") > 10


def test_one_run_fills_one_row(tmp_path):
    draw_surface([result("muon", 0.5)], OscillatingSurface.height, tmp_path)
    assert (tmp_path / "surface_paths.svg").stat().st_size > 1000
