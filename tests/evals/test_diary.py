"""The diary run from end to end on a tiny model: order of the days, resuming, completeness, errors, summary, report."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_diary import FACTS, HOME, QUESTIONS, Reciter, write_data, write_model

from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.evals import diary as module
from everlearn.evals import diary_measures
from everlearn.evals.diary import report, run, summary
from everlearn.evals.diary_methods import Method

MEASURES = {
    *("recall_direct", "recall_paraphrase", "recall_indirect", "retention_day1", "updates", "updates_stale"),
    *("forgotten", "forgotten_likelihood", "forgotten_noise", "locality_top1", "locality_kl", "leak"),
    *("perplexity_ratio", "sleep_seconds_per_fact", "bytes_per_user", "bytes_on_disk", "chat_tokens_per_second"),
    *("chat_speed_ratio", "rejected", "invented"),
}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the run catches it."""


class Logged(Reciter):
    """Writes down what happens to it, and can be killed on a day."""

    log: list = []
    kill_after: tuple[str, int] | None = None

    def _note(self, *what):
        Logged.log.append((self.setting.seed, *what))
        if Logged.kill_after == what:
            raise Killed

    def tell(self, text):
        super().tell(text)
        self._note("tell", text)

    def sleep(self):
        self._note("sleep", len(self.told))

    def forget(self, text):
        super().forget(text)
        self._note("forget", text)

    def reply(self, questions):
        self._note("ask", tuple(questions))
        return super().reply(questions)


class Grumpy(Reciter):
    """Gives up every sleep."""

    def sleep(self):
        raise SleepRejected("no")


class Babbling(Reciter):
    """Replies to everything with all that it was told."""

    def reply(self, questions):
        return [" ".join(self.told) for _ in questions]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    Logged.log, Logged.kill_after = [], None
    named = {"logged": Logged, "grumpy": Grumpy, "frozen": Method, "forgetful": Stale, "babbling": Babbling}
    monkeypatch.setattr(module, "registry", lambda: named)
    monkeypatch.setattr(diary_measures, "SPEED_TOKENS", 3)
    monkeypatch.setattr(diary_measures, "REPLY_TOKENS", 4)
    monkeypatch.setattr(module, "report", lambda out: None)  # drawing is slow, and has a test of its own


class Stale(Reciter):
    """Recites old and new together and forgets nothing."""

    newest = False

    def forget(self, text):
        pass


def go(data, model, out, *, days=3, seeds=1, methods=("logged",), **options):
    return run(data, "mini", days, seeds, out, methods=methods, model=model, text_tokens=50, **options)


def test_each_day_is_told_forgotten_slept_over_and_asked(data, model, tmp_path):
    results = go(data, model, tmp_path / "out.json", smalltalk=2)
    kinds = [what for _, what, *_ in Logged.log if what != "ask"]
    assert kinds == ["tell"] * 5 + ["sleep"] + ["tell"] * 4 + ["forget", "sleep"] + ["tell"] * 4 + ["sleep"]
    assert (0, "forget", "My PIN is 7391.") in Logged.log
    asked = [set(questions) for _, what, *rest in Logged.log if what == "ask" for questions in rest]
    first, second = asked[0], next(a for a in asked[1:] if set(QUESTIONS["e"]) <= a)
    assert set(QUESTIONS["c"]) <= first
    assert not set(QUESTIONS["c"]) & second
    last = results["rows"][-1]
    assert last["recall_direct"] == last["recall_paraphrase"] == last["recall_indirect"] == 1.0
    assert last["updates"] == 0.0  # "I left Oslo for Turku." names the old town too
    assert last["updates_stale"] == 0.0
    assert last["retention_day1"] == 1.0
    assert last["recall_by_age"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    assert last["forgotten"] == 0.0
    assert [row["facts"] for row in results["rows"]] == [3, 2, 2]


def test_a_superseded_fact_is_asked_no_more_though_its_questions_are(data, model, tmp_path):
    go(data, model, tmp_path / "out.json")
    record = json.loads((tmp_path / "out.work" / "logged-0" / "night-03.json").read_text())
    asked = {row["fact"] for row in record if "kind" in row and not row.get("forgotten")}
    assert asked == {"a", "e", "f", "g"}
    home = [row for row in record if row["question"] == HOME[0]]
    assert [row["fact"] for row in home] == ["g"]


def test_what_is_not_forgotten_is_found(data, model, tmp_path):
    rows = go(data, model, tmp_path / "out.json", methods=("forgetful",))["rows"]
    assert [row["forgotten"] for row in rows] == [None, 1.0, 1.0]
    assert rows[1]["forgotten_likelihood"] == 0.0  # the base's own weights
    assert rows[1]["forgotten_noise"] == 0.0


def test_rows_have_every_measure_and_the_file_is_complete_only_at_the_end(data, model, tmp_path):
    out, seen = tmp_path / "out.json", []

    def progress(done, total, what):
        seen.append((done, total, what))
        if out.exists() and what != "done":
            assert json.loads(out.read_text())["complete"] is False

    results = go(data, model, out, seeds=2, methods=("frozen", "logged"), progress=progress)
    kept = json.loads(out.read_text())
    assert kept["complete"] is True
    assert kept["rows"] == results["rows"]
    assert kept["summary"] == results["summary"]
    assert len(kept["rows"]) == 2 * 2 * 3
    assert all(row.keys() >= MEASURES for row in kept["rows"])
    assert seen[0][:2] == (0, 12)
    assert seen[-1][:2] == (12, 12)
    assert "left)" in seen[-2][2]
    frozen = next(row for row in kept["rows"] if row["method"] == "frozen" and row["day"] == 3)
    assert frozen["locality_top1"] == 1.0
    assert frozen["locality_kl"] == 0.0
    assert frozen["leak"] == 0.0
    assert frozen["perplexity_ratio"] == 1.0
    line = next(s for s in kept["summary"] if s["method"] == "logged" and s["day"] == 3)
    assert line["recall_direct"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}


@pytest.mark.parametrize("moment", [("sleep", 8), ("tell", "My cat is Nils.")])
def test_a_kill_loses_one_day_at_most(data, model, tmp_path, moment):
    out = tmp_path / "out.json"
    whole = go(data, model, tmp_path / "whole.json", smalltalk=2)
    Logged.log, Logged.kill_after = [], moment
    with pytest.raises(Killed):
        go(data, model, out, smalltalk=2)
    kept = json.loads(out.read_text())
    done = len(kept["rows"])
    assert kept["complete"] is False
    assert done == (1 if moment[0] == "sleep" else 2)
    Logged.log, Logged.kill_after = [], None
    again = go(data, model, out, smalltalk=2)
    assert again["rows"][:done] == kept["rows"]
    assert [what for _, what, *_ in Logged.log].count("sleep") == 3 - done
    for mine, theirs in zip(again["rows"], whole["rows"], strict=True):
        timed = {"seconds", "sleep_seconds", "sleep_seconds_per_fact", "forget_seconds"}
        timed |= {"chat_tokens_per_second", "chat_speed_ratio"}
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    assert [path.name for path in (tmp_path / "out.work").glob("*/day-*")] == ["day-3"]


def test_finished_results_are_extended_by_seeds_and_methods(data, model, tmp_path):
    out = tmp_path / "out.json"
    go(data, model, out)
    Logged.log = []
    again = go(data, model, out, seeds=2, methods=("logged", "frozen"))
    assert {seed for seed, *_ in Logged.log} == {1}
    assert len(again["rows"]) == 4 * 3
    go(data, model, out, seeds=2, methods=("logged", "frozen"))
    assert json.loads(out.read_text())["complete"] is True


def test_processes_with_seeds_of_their_own_fill_one_file(data, model, tmp_path):
    out = tmp_path / "out.json"
    Logged.kill_after = ("forget", "My PIN is 7391.")  # on the second day
    with pytest.raises(Killed):
        go(data, model, out, days=2, seeds=2)
    Logged.kill_after = None
    results = go(data, model, out, days=2, first_seed=2)
    assert [(row["seed"], row["day"]) for row in results["rows"]] == [(0, 1), (2, 1), (2, 2)]
    kept = {path.parent.name: path.name for path in (tmp_path / "out.work").glob("*/day-*")}
    assert kept == {"logged-0": "day-1", "logged-2": "day-2"}
    results = go(data, model, out, days=2, seeds=2)
    assert sorted((row["seed"], row["day"]) for row in results["rows"]) == [(s, d) for s in range(3) for d in (1, 2)]
    assert [line["seeds"] for line in results["summary"]] == [2, 2]


def test_what_is_answered_without_having_been_told_is_invented(data, model, tmp_path, monkeypatch):
    rows = go(data, model, tmp_path / "out.json", methods=("logged", "babbling"))["rows"]
    found = {(row["method"], row["day"]): row["invented"] for row in rows}
    assert [found["logged", day] for day in (1, 2, 3)] == [0.0, 0.0, None]
    assert [found["babbling", day] for day in (1, 2, 3)] == [1.0, 1.0, None]
    everything = " ".join(fact["said"] for fact in FACTS)
    monkeypatch.setattr(diary_measures.Reference, "replies", lambda self, questions: [everything] * len(questions))
    rows = go(data, model, tmp_path / "base.json", methods=("babbling",))["rows"]
    assert [row["invented"] for row in rows] == [0.0, 0.0, None], "what the base says too is not"


def test_a_measure_that_only_later_rows_have_is_summed_up():
    rows = [{"method": "m", "seed": seed, "day": 1, "facts": 3} for seed in (0, 1)]
    rows[1]["invented"] = 0.5
    (line,) = summary(rows, ["m"], [0, 1])
    assert line["invented"]["n"] == 1
    assert line["invented"]["mean"] == 0.5


def test_only_the_chosen_nights_are_measured(data, model, tmp_path):
    rows = go(data, model, tmp_path / "out.json", eval_days="last")["rows"]
    assert [row["measured"] for row in rows] == [False, False, True]
    assert "recall_direct" not in rows[0]
    assert rows[0]["sleep_seconds_per_fact"] >= 0
    rows = go(data, model, tmp_path / "two.json", eval_days=[1])["rows"]
    assert [row["measured"] for row in rows] == [True, False, True]


def test_a_sleep_that_is_given_up_is_counted_and_the_days_go_on(data, model, tmp_path):
    rows = go(data, model, tmp_path / "out.json", methods=("grumpy",))["rows"]
    assert [row["rejected"] for row in rows] == [1, 1, 1]


def test_without_a_text_perplexity_is_left_out(data, model, tmp_path):
    shutil.rmtree(data / "wikitext2")
    results = go(data, model, tmp_path / "out.json", days=1, methods=("frozen",))
    assert results["rows"][0]["perplexity_ratio"] is None
    assert results["protocol"]["text_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"days": 4}, "days: got 4, expected 1 to 3"),
        ({"days": 0}, "days: got 0"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"smalltalk": -1}, "smalltalk: got -1"),
        ({"eval_days": "some"}, "eval_days: got 'some'"),
        ({"eval_days": [4]}, r"eval_days: got \[4\]"),
        ({"methods": ()}, "methods, baselines: got none"),
        ({"baselines": ("magic",)}, r"got \['magic'\], expected some of logged"),
    ],
)
def test_errors_name_the_argument(data, model, tmp_path, changes, words):
    with pytest.raises(InvalidArgument, match=words):
        go(data, model, tmp_path / "out.json", **changes)
    assert not (tmp_path / "out.json").exists()


def test_results_of_another_protocol_are_refused(data, model, tmp_path):
    out = tmp_path / "out.json"
    go(data, model, out, days=1, methods=("frozen",))
    with pytest.raises(InvalidArgument, match=r"another protocol: days = 1 \(now 2\)"):
        go(data, model, out, days=2, methods=("frozen",))


def test_a_lost_work_folder_is_named(data, model, tmp_path):
    out = tmp_path / "out.json"
    Logged.kill_after = ("sleep", 8)
    with pytest.raises(Killed):
        go(data, model, out, smalltalk=2)
    shutil.rmtree(tmp_path / "out.work")
    with pytest.raises(InvalidArgument, match="day-1, from which to go on, is gone"):
        go(data, model, out, smalltalk=2)


def test_baselines_that_need_dreams_need_everlearn(data, model, tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(InvalidArgument, match="lora learns the dreams of everlearn; add it to the methods"):
        go(data, model, tmp_path / "out.json", methods=("frozen",), baselines=("lora",))


def test_report_of_unfinished_and_finished_results(data, model, tmp_path):
    out = tmp_path / "out.json"
    Logged.kill_after = ("sleep", 8)
    with pytest.raises(Killed):
        go(data, model, out, methods=("frozen", "logged"), smalltalk=2)
    report(out)
    assert "Incomplete" in out.with_suffix(".md").read_text()
    Logged.kill_after = None
    go(data, model, out, methods=("frozen", "logged"), smalltalk=2)
    paths = report(out)
    text = paths[0].read_text()
    assert "Incomplete" not in text
    assert "| measure | frozen | logged |" in text
    assert "| recall_direct | 0 | 1 |" in text
    assert [path.name for path in paths] == [
        *("out.md", "out-age.png", "out-age.svg", "out-nights.png", "out-nights.svg")
    ]
    assert all(path.stat().st_size > 1000 for path in paths[1:])
    with pytest.raises(InvalidArgument, match="no results file"):
        report(tmp_path / "none.json")


def test_summary_gives_t_intervals_over_the_seeds_asked_for():
    rows = [
        {"method": "m", "seed": s, "day": 1, "commit": "x", "score": v, "none": None} for s, v in enumerate([1, 2, 3])
    ]
    (line,) = summary(rows, ["m"], range(3))
    half = 4.302653 / 3**0.5
    assert line["score"] == {"mean": 2.0, "low": pytest.approx(2 - half), "high": pytest.approx(2 + half), "n": 3}
    assert line["none"] is None
    assert "commit" not in line
    (line,) = summary(rows, ["m"], range(1))
    assert line["score"] == {"mean": 1.0, "low": None, "high": None, "n": 1}
