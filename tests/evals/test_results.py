"""One results file for all evaluations: whole at any time, never complete too early, strict about what it continues."""

from __future__ import annotations

import importlib.machinery
import json
import math
import time

import pytest

from everlearn.errors import InvalidArgument
from everlearn.evals import results as module
from everlearn.evals.results import Results, interval, mean_interval, read_results, write_json


def opened(path, **changes):
    return Results(path, **{"suite": "s", "version": 1, "protocol": {"days": 2}, "keys": ("model", "seed"), **changes})


def test_rows_are_on_disk_at_once_and_the_file_is_incomplete_until_the_end(tmp_path):
    path = tmp_path / "out.json"
    results = opened(path)
    results.add({"model": "a", "seed": 0, "value": 0.5})
    kept = json.loads(path.read_text())
    assert kept["complete"] is False
    assert kept["rows"] == [{"model": "a", "seed": 0, "value": 0.5}]
    assert {"commit", "command", "machine", "versions"} <= kept["provenance"].keys()
    again = opened(path)
    assert again.find("a", 0) == {"model": "a", "seed": 0, "value": 0.5}
    assert again.find("a", 1) is None
    assert again.finish(lambda rows: [{"model": row["model"]} for row in rows]) == [{"model": "a"}]
    assert read_results(path, "s")["complete"] is True
    again.add({"model": "a", "seed": 1})
    kept = read_results(path, "s")
    assert kept["complete"] is False
    assert "summary" not in kept
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_several_processes_add_to_one_file(tmp_path):
    path = tmp_path / "out.json"
    one, other = opened(path), opened(path)
    one.add({"model": "a", "seed": 0})
    other.add({"model": "a", "seed": 1})
    one.add({"model": "a", "seed": 2})
    assert one.find("a", 1) is not None
    assert other.finish(len) == 3
    assert [row["seed"] for row in read_results(path, "s")["rows"]] == [0, 1, 2]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    results = opened(path)
    results.add({"model": "a", "seed": 0})
    before = path.read_text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.add({"model": "a", "seed": 1})
    assert path.read_text() == before


def test_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError):
        opened(tmp_path / "out.json").add({"model": "a", "seed": 0, "value": math.nan})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"value": math.inf})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": "other"}, "holds results of 's', expected 'other'"),
        ({"version": 2}, "version 1 of the protocol, this is 2"),
        ({"protocol": {"days": 3}}, r"days = 2 \(now 3\)"),
        ({"protocol": {"days": 2, "new": 1}}, r"new = None \(now 1\)"),
    ],
)
def test_results_of_another_protocol_are_refused(tmp_path, changes, words):
    path = tmp_path / "out.json"
    opened(path).add({"model": "a", "seed": 0})
    with pytest.raises(InvalidArgument, match=words):
        opened(path, **changes)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"suite": "s"}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    path = tmp_path / "out.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"out: .*out\.json"):
        opened(path)
    assert path.read_text() == text


def test_intervals():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-5)  # t(0.975, 2) s / sqrt(n)
    assert mean_interval([7.0]) == (7.0, None)
    assert interval([1.0, 2.0, 3.0]) == "2 ± 2.5"
    assert interval([1.0, None]) == "diverged"


def test_command_is_one_to_type_again(monkeypatch):
    monkeypatch.setattr(module.sys, "argv", ["/somewhere/bin/everlearn", "eval", "optim"])
    monkeypatch.setattr(module.sys.modules["__main__"], "__spec__", None)
    assert module.provenance.__wrapped__()["command"] == "everlearn eval optim"
    spec = importlib.machinery.ModuleSpec("benchmarks.__main__", None)
    monkeypatch.setattr(module.sys.modules["__main__"], "__spec__", spec)
    assert module.provenance.__wrapped__()["command"] == "python -m benchmarks eval optim"


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.perf_counter)])
def test_clock_counts_computing_alone_where_it_can(threads, clock, monkeypatch):
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: threads)
    assert module.compute_clock() is clock
