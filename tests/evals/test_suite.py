"""The runner of suites: rows, tuning, resuming after a kill, errors; with a suite that takes no time."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from everlearn.errors import InvalidArgument
from everlearn.evals import suite as module
from everlearn.evals.suite import COLUMNS, TUNING_SEED, Measure, Outcome, Suite, run_suite
from everlearn.evals.suites import SUITES


@dataclass(frozen=True)
class Budget:
    grid: tuple = ({"lr": 0.1}, {"lr": 0.2})
    tune_each: bool = False
    steps: int = 3


class Fake:
    """A suite whose runs are counted; ``fail_at`` makes one of them an interrupt."""

    def __init__(self):
        self.made, self.fail_at = [], None
        self.suite = Suite(
            name="formal",
            version=1,
            tasks=("a", "b"),
            budgets={"tiny": Budget(), "single": Budget(grid=({"lr": 0.1},)), "each": Budget(tune_each=True)},
            settings=lambda plan, task: ("easy", "hard") if task == "b" else ("",),
            run=self.run,
            notes=lambda plan: [f"{plan.steps} steps"],
            variants={"hope-slow": ("hope", {"cms_periods": [1, 64]})},
        )

    def run(self, job, plan, data, tell):
        if len(self.made) == self.fail_at:
            raise KeyboardInterrupt
        self.made.append(job.name)
        tell("training", 0.5)
        lr = dict(job.options)["lr"]
        value = None if job.contestant.name == "retnet" else lr + job.seed / 10_000
        measures = [Measure("accuracy", value), Measure("memory", 5.0, task="cost", setting="length=8")]
        return Outcome(measures, value, 100, 20, 3, 0.5)


@pytest.fixture
def fake():
    return Fake()


def run(fake, path, **given):
    return run_suite(fake.suite, path, **{"models": ["hope", "transformer"], "seeds": 2, "budget": "tiny", **given})


def test_rows_have_one_schema_and_the_best_rate_is_used(fake, tmp_path):
    seen = []
    found = run(fake, tmp_path / "r.json", progress=lambda *given: seen.append(given))
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["complete"] is True
    assert kept["rows"] == found["rows"]
    assert all(tuple(row) == COLUMNS for row in kept["rows"])
    finals = [row for row in kept["rows"] if row["seed"] != TUNING_SEED]
    assert {row["options"]["lr"] for row in finals} == {0.2}
    assert {(row["task"], row["setting"]) for row in finals} == {
        ("a", ""),
        ("b", "easy"),
        ("b", "hard"),
        ("cost", "length=8"),
    }
    assert {row["seed"] for row in kept["rows"]} == {0, 1, TUNING_SEED}
    # 2 models: 2 rates in each of 2 basic settings, 2 seeds in each of 3 settings
    assert len(fake.made) == len(set(fake.made)) == 2 * (2 * 2 + 3 * 2)
    assert seen[0][:2] == (0, 20)
    assert seen[-1] == (20, 20, "done")
    assert all(what.endswith(" left)") for done, _, what in seen[2:-1])
    line = next(x for x in found["summary"] if (x["task"], x["model"], x["metric"]) == ("a", "hope", "accuracy"))
    assert line["mean"] == pytest.approx(0.20005)
    assert line["n"] == 2


def test_every_setting_can_be_tuned_by_itself_and_one_rate_needs_no_trials(fake, tmp_path):
    run(fake, tmp_path / "each.json", budget="each", models=["hope"])
    assert len(fake.made) == 3 * (2 + 2)
    fake.made.clear()
    run(fake, tmp_path / "single.json", budget="single", models=["hope"])
    assert len(fake.made) == 3 * 2
    assert not any(f"|{TUNING_SEED}|" in name for name in fake.made)


@pytest.mark.parametrize("after", [0, 3, 11])
def test_an_interrupted_suite_goes_on_at_the_next_run(fake, tmp_path, after):
    fake.fail_at = after
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        run(fake, path)
    if after:
        kept = json.loads(path.read_text())
        assert kept["complete"] is False
        assert "summary" not in kept
        assert len({row["run"] for row in kept["rows"]}) == after
    else:
        assert not path.exists()
    first, fake.made, fake.fail_at = fake.made, [], None
    found = run(fake, path)
    assert not set(first) & set(fake.made)
    assert len(first) + len(fake.made) == 20
    whole = Fake()
    again = run(whole, tmp_path / "whole.json")
    names = ("run", "metric", "value")
    assert [[row[n] for n in names] for row in found["rows"]] == [[row[n] for n in names] for row in again["rows"]]


def test_a_failed_run_leaves_no_rows(fake, tmp_path, monkeypatch):
    def fail(job, plan, data, tell):
        raise OSError("disk full")

    object.__setattr__(fake.suite, "run", fail)
    with pytest.raises(OSError, match="disk full"):
        run(fake, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_more_seeds_and_models_are_added_to_a_complete_file(fake, tmp_path):
    path = tmp_path / "r.json"
    run(fake, path, models=["hope"], seeds=1)
    fake.made.clear()
    run(fake, path, models=["hope", "hope-slow"], seeds=2)
    assert len(fake.made) == 3 + 4 + 3 * 2
    fake.made.clear()
    assert run(fake, path, models=["hope"], seeds=2)["complete"] is True
    assert fake.made == []


def test_a_run_that_diverges_has_no_value(fake, tmp_path):
    found = run(fake, tmp_path / "r.json", models=["retnet"] if "retnet" in known() else ["hope"])
    if "retnet" in known():
        assert {line["mean"] for line in found["summary"] if line["metric"] == "accuracy"} == {None}


def known():
    from everlearn.models.registry import FAMILIES

    return FAMILIES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"models": ["hope", "gpt"]}, r"models: got \['gpt'\], expected some of hope, .*hope-slow"),
        ({"models": []}, "models: got none"),
        ({"tasks": ["c"]}, r"tasks: got \['c'\], expected some of a, b"),
        ({"budget": "huge"}, "budget: got 'huge', expected one of tiny, single, each"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"workers": 0}, "workers: got 0"),
    ],
)
def test_errors_name_the_argument(fake, tmp_path, given, words):
    with pytest.raises(InvalidArgument, match=words):
        run(fake, tmp_path / "r.json", **given)
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_protocol_are_refused(fake, tmp_path):
    path = tmp_path / "r.json"
    run(fake, path)
    with pytest.raises(InvalidArgument, match="another protocol: budget = 'tiny'"):
        run(fake, path, budget="single")
    object.__setattr__(fake.suite, "version", 2)
    with pytest.raises(InvalidArgument, match="version 1 of the protocol, this is 2"):
        run(fake, path)
    object.__setattr__(fake.suite, "name", "mad")
    with pytest.raises(InvalidArgument, match="holds results of 'formal', expected 'mad'"):
        run(fake, path)


@pytest.mark.parametrize("name", ["niah", "babilong", "lm", "ablation"])
def test_missing_data_is_an_error_before_anything_is_trained(name, tmp_path):
    with pytest.raises(InvalidArgument, match=r"data: got .*nowhere"):
        run_suite(SUITES[name], tmp_path / "r.json", budget="tiny", data=tmp_path / "nowhere")
    (tmp_path / "data").mkdir()
    with pytest.raises(InvalidArgument, match="data: there is no folder 'books'"):
        run_suite(SUITES[name], tmp_path / "r.json", budget="tiny", data=tmp_path / "data")
    assert not (tmp_path / "r.json").exists()


def test_every_suite_says_what_was_scaled_down_and_has_the_same_budgets():
    for suite in SUITES.values():
        assert set(suite.budgets) == {"tiny", "small", "paper"} | ({"counting"} if suite.name == "formal" else set())
        for plan in suite.budgets.values():
            assert suite.notes(plan)
            assert plan.grid
            json.dumps(module.dataclasses.asdict(plan))


@pytest.mark.slow
def test_processes_make_the_same_rows(tmp_path):
    given = {"models": ["transformer"], "tasks": ["aa"], "seeds": 2, "budget": "tiny"}
    found = [
        run_suite(SUITES["formal"], tmp_path / f"{workers}.json", workers=workers, **given)["rows"]
        for workers in (1, 2)
    ]
    values = [{(r["run"], r["setting"], r["metric"]): r["value"] for r in rows} for rows in found]
    assert values[0] == pytest.approx(values[1])
