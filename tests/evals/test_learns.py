"""HOPE beside a Transformer++, at a tiny size: equal terms, kept runs, a summary that is what the runs say."""

from __future__ import annotations

import json

import pytest

from everlearn.errors import InvalidArgument
from everlearn.evals.learns import MODELS, run_learns

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "chunk_size": 8}
RUN = {"tokens": 128, "length": 16, "batch_size": 4, "vocab_size": 257, "held_out": ["b*"]}


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    (folder / "b.txt").write_text("a dog ran to the door. " * 20, encoding="utf-8")
    return folder


def test_runs_are_kept_and_summed_up(books, tmp_path, monkeypatch):
    changes = {key: SIZE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    found = run_learns(books, tmp_path / "out", seeds=2, changes=changes, **RUN)
    kept = json.loads((tmp_path / "out" / "learns.json").read_text())
    rows = {(row["model"], row["seed"]): row for row in kept["rows"]}
    assert set(rows) == {(name, seed) for name in MODELS for seed in (0, 1)}
    assert kept["complete"]
    ratios = [rows[MODELS[0], seed]["held_out_loss"] / rows[MODELS[1], seed]["held_out_loss"] for seed in (0, 1)]
    assert found["ratio"] == pytest.approx(sum(ratios) / 2)
    assert found["within_2_percent"] == (found["ratio"] <= 1.02)
    assert all(row["tokens"] == 128 and row["steps"] == 2 for row in kept["rows"])
    assert rows[MODELS[0], 0]["held_out_loss"] != rows[MODELS[0], 1]["held_out_loss"]
    counts = [row["parameters"] for row in kept["rows"]]
    assert max(counts) < 1.03 * min(counts)
    assert (tmp_path / "out" / "learns.png").stat().st_size > 1000
    monkeypatch.setattr("everlearn.evals.learns.train", None)  # nothing is trained again
    assert run_learns(books, tmp_path / "out", seeds=2, changes=changes, **RUN) == found
    with pytest.raises(InvalidArgument, match="another protocol"):
        run_learns(books, tmp_path / "out", seeds=2, changes=changes, **{**RUN, "tokens": 64})


def test_unequal_models_are_refused(books, tmp_path):
    with pytest.raises(InvalidArgument, match="within 3%"):
        run_learns(books, tmp_path, models=("hope-tiny", "transformer-760m"), **RUN)
