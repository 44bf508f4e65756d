"""The runner of the optimiser comparison at a tiny budget: rows, tables, resuming, tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from everlearn.errors import InvalidArgument
from everlearn.evals import optim as evaluation
from everlearn.evals.optim import BUDGETS, CONTENDERS, Budget, _at_time, interval, next_power, run, train
from everlearn.evals.optim_tasks import OrthogonalTasks

COLUMNS = {
    *("task", "model", "seed", "metric", "value", "parameters", "tokens", "steps", "seconds", "lr", "rates"),
    *("versions", "machine", "commit", "command"),
}


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    (folder / "b.txt").write_text("pack my box with five dozen liquor jugs. " * 300)
    return folder


@pytest.fixture
def two_contenders(monkeypatch):
    monkeypatch.setattr(evaluation, "CONTENDERS", {name: CONTENDERS[name] for name in ("adamw", "muon")})
    steps = {"surface": 4, "orthogonal": 4, "digits": 3, "lm": 2}
    monkeypatch.setitem(BUDGETS, "tiny", Budget(steps, rates=dict.fromkeys(steps, 2), points=2))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(evaluation, "draw_curves", lambda *args: None)
    monkeypatch.setattr(evaluation, "draw_bars", lambda *args: None)
    monkeypatch.setattr(evaluation, "draw_surface", lambda *args: None)


def test_a_run_that_overflows_ends_with_none():
    outcome = train(lambda: OrthogonalTasks(0, 60), CONTENDERS["sgd"], 1e6, 60, points=6)
    assert outcome["validation_loss"] is None
    assert set(outcome["metrics"].values()) == {None}
    json.dumps(outcome, allow_nan=False)


def test_run_writes_rows_tables_and_plots(tmp_path, text_folder, two_contenders):
    seen = []
    out = tmp_path / "out"
    rows = run(
        out, budget="tiny", seeds=2, data=text_folder, progress=lambda done, total, what: seen.append((done, total))
    )
    assert json.loads((out / "rows.json").read_text()) == rows
    assert all(set(row) == COLUMNS for row in rows)
    assert {row["task"] for row in rows} == {"surface", "orthogonal", "digits", "lm"}
    assert {row["model"] for row in rows} == {"adamw", "muon"}
    assert {row["seed"] for row in rows} == {0, 1}
    assert seen[0] == (0, 32)
    assert seen[-1] == (32, 32)
    assert len(list((out / "runs").iterdir())) == 32
    for stem in ("surface", "orthogonal", "digits", "lm", "surface_paths", "orthogonal_destroyed"):
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{stem}.svg").read_text()
    table = (out / "optim.md").read_text()
    assert "## orthogonal: 4 steps, 2 rates each" in table
    assert all("(lowest)" in line or "(highest)" in line for line in table.splitlines() if line.startswith("| muon"))


def test_run_resumes_after_a_kill_and_trains_only_what_is_missing(tmp_path, two_contenders, no_plots, monkeypatch):
    whole = run(tmp_path, budget="tiny", seeds=1)
    finished = sorted((tmp_path / "runs").iterdir())
    finished[0].unlink()
    trained = []
    original = evaluation.train
    monkeypatch.setattr(evaluation, "train", lambda *args: trained.append(args) or original(*args))
    again = run(tmp_path, budget="tiny", seeds=1)
    assert len(trained) == 1
    assert len(again) == len(whole)
    values = [{(r["task"], r["model"], r["metric"]): r["value"] for r in rows} for rows in (whole, again)]
    for key, value in values[0].items():
        if key[2] != "loss_at_equal_time":
            assert value == values[1][key]


def test_tuning_uses_validation_and_its_own_seed(tmp_path, two_contenders, no_plots):
    rows = run(tmp_path, budget="tiny", seeds=1)
    for task in ("surface", "digits"):
        for name in ("adamw", "muon"):
            tried = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob(f"{task}-{name}-*-1000.json")]
            best = min(tried, key=lambda r: r["validation_loss"])
            assert len(tried) == 2
            assert {row["lr"] for row in rows if (row["task"], row["model"]) == (task, name)} == {best["lr"]}


def test_rates_are_tried_beside_the_best_so_far():
    def walk(loss):
        tried = {}
        for _ in range(5):
            power = next_power(tried)
            tried[power] = loss(power), 3.0**power
        return list(tried)

    assert walk(lambda power: abs(power)) == [0, 1, -1, 2, -2]
    assert walk(lambda power: -power) == [0, 1, 2, 3, 4]
    assert walk(lambda power: abs(power + 2)) == [0, 1, -1, -2, -3]
    assert walk(lambda power: math.inf if power > -1 else -power) == [0, 1, -1, -2, -3]


def test_loss_at_equal_time_lies_on_the_curve():
    curve = [[0, 0.0, 4.0], [10, 1.0, 2.0], [20, 2.0, 1.0]]
    assert [_at_time(curve, limit) for limit in (0.5, 1.0, 1.5, 2.0, 9.0)] == [3.0, 2.0, 1.5, 1.0, 1.0]
    assert _at_time([[0, 0.0, 4.0], [10, 1.0, None]], 0.5) is None


def test_intervals():
    assert interval([1.5]) == "1.5"
    assert interval([1.0, 2.0, 3.0]) == "2 ± 2.5"
    assert interval([1.0, None]) == "diverged"


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(InvalidArgument, match="budget"):
        run(tmp_path, budget="huge")
    with pytest.raises(InvalidArgument, match="seeds"):
        run(tmp_path, budget="tiny", seeds=0)
