"""The learner with other parts than its own: levels, stores, layouts, consolidators, selectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_learner
import torch
from lives import SAID, ids, logits, states

from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.learner.consolidation import Schedule, SelfStudyObjective
from everlearn.learner.dreams import Dream
from everlearn.learner.selection import Judgement
from everlearn.learner.slots import SlotConsolidator
from everlearn.learner.store import MemoryStore
from everlearn.learner.weights import Layout
from everlearn.levels import Level
from everlearn.models.stacking import memory_state


def test_any_object_with_the_methods_of_a_store_can_be_the_memory(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    used = set()

    class Mine:
        """Passes everything on to a store."""

        def __init__(self) -> None:
            self._inner = MemoryStore.open(tmp_path / "mine")

        def __getattr__(self, name: str):
            used.add(name)
            assert not name.startswith("_")
            return getattr(self._inner, name)

    with tiny_learner.simple_from_pretrained()(pair[0], tokenizer=pair[1], memory=Mine()) as one:
        one.observe(SAID)
        one.sleep()
        one.forget(SAID)
        assert states(one) == ["forgotten"]
    assert {"add_observation", "commit_night", "forget", "load_state", "close"} <= used


def test_faster_levels_live_for_the_day(learner, pair):
    one = learner(levels=[Level("fast", 4), Level("mid", 16)])
    with torch.no_grad():
        base = pair[0](input_ids=ids(pair[1])).logits
    assert torch.equal(logits(one), base)
    one.observe("no news of the small house by the sea and the parrot that sings")
    assert not torch.equal(logits(one), base)
    moved = {key for key, tensor in memory_state(one.model).items() if key.endswith("W1") and tensor.any()}
    assert {key.split(".")[1] for key in moved} == {"fast", "mid"}
    one.observe("no news")
    one.sleep()
    assert torch.equal(logits(one), base), "small talk leaves nothing behind after the night"


def test_faster_levels_are_silent_while_the_slow_one_learns_and_come_back_if_it_fails(learner, monkeypatch):
    one = learner(levels=[Level("fast", 4)], schedule=Schedule(passes=1, recall=1.1, agreement=0.0, retries=0))
    one.observe(SAID)
    day = logits(one)
    seen = []

    class Watched(SlotConsolidator):
        def learn(self, *arguments):
            seen.extend(bool(t.any()) for key, t in memory_state(one.model).items() if key.endswith("fast.W1"))
            return super().learn(*arguments)

    monkeypatch.setattr("everlearn.learner.learner.SlotConsolidator", Watched)
    with pytest.raises(SleepRejected):
        one.sleep()
    assert seen
    assert not any(seen)
    assert torch.equal(logits(one), day)


def test_faster_levels_may_come_and_go(learner):
    one = learner()
    one.observe(SAID)
    one.sleep()
    knew = logits(one)
    one.close()
    for levels in ([Level("fast", 64)], [Level("mid", 8), Level("day", 32)], []):
        again = learner(levels=levels)
        assert torch.equal(logits(again), knew)
        again.close()


def test_only_what_is_worth_it_is_dreamt_of(learner):
    one = learner()
    select, dreamt = one._selector, []

    class Part(select):
        def judge(self, messages):
            return [replace(judged, worth="the sea") for judged in super().judge(messages)]

    one._selector = Part
    dreamer = one._make_dreamer()
    dream = dreamer.dream
    dreamer.dream = lambda passages, *more: dreamt.extend(passages) or dream(passages, *more)
    one.observe("Hello again! I live by the sea.")
    assert one.sleep().consolidated == (1,)
    assert dreamt == ["the sea"]
    assert one.history()[0].text == "Hello again! I live by the sea."


def test_a_memory_that_is_trained_is_a_layout_of_its_own(learner):
    one = learner(layout=Layout(first=0.5, width=8))
    one.observe(SAID)
    report = one.sleep()
    assert report.learning is not None
    assert report.learning.passes == 1
    assert any(key.endswith("W1") and tensor.any() for key, tensor in memory_state(one.model).items())


def test_another_consolidator_can_write_the_slow_level(learner):
    made = []

    class Mine(SlotConsolidator):
        def __init__(self, *arguments, **options):
            made.append(options["level"])
            super().__init__(*arguments, whiten=False, **options)

    one = learner(consolidator=Mine)
    one.observe(SAID)
    one.sleep()
    assert made == ["slow"]


def test_slots_are_not_trained(learner):
    with pytest.raises(InvalidArgument, match="objective, optimizer"):
        learner(objective=SelfStudyObjective())


def test_faster_levels_do_not_spoil_the_check(learner):
    """The anchor is read at the slow level's layers, whatever other levels there are."""
    one = learner(levels=[Level("fast", 4)], schedule=Schedule(recall=0.0, agreement=0.9))
    one.observe(SAID)
    report = one.sleep()
    assert report.learning is not None
    assert report.learning.agreement > 0.9


@pytest.fixture
def asks():
    """A dreamer that asks of each passage in its own words."""
    dreamer = tiny_learner.simple_from_pretrained().keywords["dreamer"]
    dreamer.dream = lambda passages, *_: [[Dream(f"{w}? {p}", p, p) for w in ("What", "Who")] for p in passages]
    return dreamer


def test_a_question_tells_which_observations_it_brings_up(learner, asks):
    one = learner(dreamer=asks)
    question = "Who? The parrot sings."
    assert one.reminded(question) == []
    one.observe("I live by the sea.")
    one.observe("The parrot sings.")
    one.sleep()
    first, second = one.reminded(question)
    assert (first.observation.text, second.observation.text) == ("The parrot sings.", "I live by the sea.")
    assert 1.0 >= first.likeness > second.likeness
    assert (first.heard, second.heard) == (True, False)
    assert one.ask(question, max_new_tokens=1) == one.tokenizer.decode(one.tokenizer("The").input_ids[:1])
    assert [item.observation.id for item in one.reminded(question, most=1)] == [2]
    with pytest.raises(InvalidArgument, match="most: got 0, expected at least 1"):
        one.reminded(question, most=0)
    one.forget(2)
    assert [item.observation.id for item in one.reminded(question)] == [1]
    first = one.reminded("What? I live by the sea.")[0]
    gate = one._weights.gate
    gate.set_(gate.weight, gate.bias - 1e6)
    assert (first.heard, one.reminded("What? I live by the sea.")[0].heard) == (True, False)


def test_a_cautious_memory_says_nothing_where_it_is_not_sure(learner, pair):
    one = learner()
    one.observe("The parrot sings.")
    one.sleep()
    question = next(row.payload["question"] for row in one.store.dreams() if not row.payload["echo"])
    known = one.ask(question, max_new_tokens=4)
    one.close()
    shy = learner(caution=1.0)
    base = learner("empty").ask(question, max_new_tokens=4)
    assert known != base
    assert shy.ask(question, max_new_tokens=4) == base
    assert not shy.reminded(question)[0].heard


def test_what_is_written_and_checked_does_not_depend_on_caution(learner, asks):
    strict = Schedule(recall=0.3, agreement=0.0, retries=0)
    one = learner(caution=1.0, schedule=strict, dreamer=asks)
    one.observe("The parrot sings.")
    one.observe("I live by the sea.")
    assert one.sleep().night == 1
    one.forget(2)
    assert states(one) == ["consolidated", "forgotten"]


class Part:
    """Finds one sentence of every message worth a dream."""

    def __init__(self, *arguments):
        pass

    def judge(self, messages):
        return [Judgement(True, 1.0, 1.0, "The parrot sings.") for _ in messages]


def test_old_questions_are_put_to_what_is_worth_a_dream(learner, asks):
    read = []
    asks.follows = lambda passages, later: read.extend(later) or [0.0 for _ in later]
    asks.about = lambda passages, questions: read.extend(passages) or [9.0 for _ in passages]
    one = learner(selector=Part, dreamer=asks)
    one.observe("It rained. The parrot sings.")
    one.sleep()
    assert read == []
    one.observe("Oh dear. The parrot sings.")
    one.sleep()
    assert "The parrot sings." in read
    assert not any("Oh dear" in text for text in read)


def test_what_is_to_be_remembered_is_dreamt_of_whole(learner):
    one = learner(selector=Part)
    whole = "It rained. The parrot sings."
    one.observe(whole)
    one.observe(whole, remember=True)
    one.sleep()
    assert {(row.observation, row.payload["answer"]) for row in one.store.dreams()} == {
        (1, "The parrot sings."),
        (2, whole),
    }


@pytest.mark.parametrize("caution", [1.31, "high", True])
def test_caution_is_a_likeness_of_slots(learner, caution):
    with pytest.raises(InvalidArgument, match=r"caution: got .*expected a likeness from -1.3 to 1.3"):
        learner(caution=caution)
    with pytest.raises(InvalidArgument, match=r"caution: got 0.3, .*a layout of slots"):
        learner("trained", caution=0.3, layout=Layout(width=4))
    with pytest.raises(InvalidArgument, match="layout: got one that is trained by gradient"):
        learner("other", layout=Layout(width=4)).reminded("Who sings?")
