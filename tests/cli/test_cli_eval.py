"""The eval commands hand their options on, print the table and show progress on stderr."""

from __future__ import annotations

from pathlib import Path

import pytest

from everlearn.errors import InvalidArgument

DIARY = ["eval", "diary", "--data", "d", "--split", "dev", "--days", 2]


@pytest.fixture
def diary(monkeypatch):
    """What the diary was asked to do; it writes its table."""
    from everlearn.evals import diary

    asked = {}

    def run(data, split, days, seeds, out, *, progress, **given):
        asked.update(given, data=data, split=split, days=days, seeds=seeds)
        if split == "none":
            raise InvalidArgument("split: got 'none'")
        progress(1, 4, "day 2 (3 s left)")
        out.with_suffix(".md").write_text("| a table |\n")

    monkeypatch.setattr(diary, "run", run)
    return asked


def test_diary(everlearn, diary, tmp_path):
    options = ["--seeds", 1, "--first-seed", 2, "--baselines", "frozen, lora", "--eval-days", "1,2", "--model", "m"]
    code, out, err = everlearn(*DIARY, "--json", tmp_path / "r.json", *options)
    assert (code, out) == (0, "| a table |\n")
    assert err == "living through the diary\nliving through the diary: day 2 (3 s left)\n"
    wanted = {"data": Path("d"), "split": "dev", "days": 2, "seeds": 1, "first_seed": 2, "model": "m"}
    assert diary == {**wanted, "baselines": ["frozen", "lora"], "eval_days": [1, 2]}


def test_diary_leaves_defaults_to_the_evaluation(everlearn, diary, tmp_path):
    assert everlearn(*DIARY, "--json", tmp_path / "r.json", "--eval-days", "last").code == 0
    assert diary.keys() == {"data", "split", "days", "seeds", "eval_days"}
    assert diary["eval_days"] == "last"


def test_diary_errors(everlearn, diary, tmp_path):
    assert everlearn(*DIARY).code == 2
    code, out, err = everlearn("eval", "diary", "--data", "d", "--split", "none", "--days", 1, "--json", tmp_path / "r")
    assert (code, out, err.splitlines()[-1]) == (1, "", "everlearn: split: got 'none'")


def test_optim(everlearn, tmp_path, monkeypatch):
    from everlearn.evals import optim

    def run(out, *, budget, seeds, data, progress):
        progress(1, 2, "surface: muon")
        (out / "optim.md").write_text(f"{budget} {seeds} {data}\n")
        return [{"task": "surface"}]

    monkeypatch.setattr(optim, "run", run)
    code, out, err = everlearn("eval", "optim", "--out", tmp_path, "--budget", "tiny", "--seeds", 2)
    assert (code, out) == (0, "tiny 2 None\n\n")
    assert err == "comparing optimisers\ncomparing optimisers: surface: muon\n"
    assert everlearn("eval", "optim", "--out", tmp_path, "--json").json == [{"task": "surface"}]
