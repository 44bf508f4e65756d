"""What a message refers to in a night: dreamt by, taken over by, and forgotten with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judges import Judge, dream, kept

from everlearn.learner.dreams import Dream
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.night import before_knowing, dreamt, kept_dreams
from everlearn.learner.references import Earlier
from everlearn.learner.store import MemoryStore
from everlearn.learner.superseding import FOLLOWS, Given, superseded, superseding

SISTER = Earlier(3, "My sister is Paloma.", "paloma")


class Lit(Judge):
    """What a text has in common with a later one, told by words; what comes before the last sentence is the same."""

    def __init__(self, follows: float = FOLLOWS) -> None:
        self.gain, self.heads = follows, []

    def about(self, passages, questions):
        self.heads += passages
        return [30.0 * p.startswith(SISTER.said) + 10.0 * ("lives" in p or "moved" in p) for p in passages]

    def follows(self, passages, later):
        return [20.0 * p.startswith(SISTER.said) + self.gain * ("lives" in p) for p in passages]


def test_an_old_answer_is_found_by_what_the_new_passage_refers_to():
    town = [kept(1, 7, "Where is my sister?", "my sister lives in Boise"), kept(2, 3, "Who?", "my sister is Paloma")]
    new = {9: ("Paloma moved to Asheville", [])}
    judge = Lit()
    assert superseded(judge, new, town)[9] == Given([], [], {})
    found = superseded(judge, new, town, {9: SISTER})[9]
    assert found == Given([1], [Dream("Where is my sister?", "Asheville.", "Asheville", taken=1, beside=3)], {1: 3})
    lit = [f"{SISTER.said} {text}" for text in (new[9][0], "my sister lives in Boise", NEUTRAL)]
    assert set(lit) <= set(judge.heads)


@pytest.mark.parametrize(("text", "follows", "gone"), [("moved", 0.0, [1]), ("sings", FOLLOWS, []), ("sings", 99, [])])
def test_what_both_say_of_whom_is_not_counted(text, follows, gone):
    """Whatever is told of Paloma follows from, and is about, my sister; what counts is the rest."""
    town = [kept(1, 7, "Where is my sister?", "my sister lives in Boise")]
    found = superseded(Lit(follows), {9: (f"Paloma {text} in Asheville", [])}, town, {9: SISTER})[9]
    assert found.ids == gone


def test_no_answer_is_taken_from_what_is_referred_to():
    class Who(Lit):
        def answers(self, passages, questions):
            return ["Paloma" for _ in passages]

    town = [kept(1, 7, "Where is my sister?", "my sister lives in Boise")]
    new = {9: ("Paloma moved to Asheville", [Dream("Where?", "Asheville.", "Asheville")])}
    (dream, _) = superseded(Who(), new, town, {9: SISTER})[9].dreams
    assert dream.answer == "Asheville"


class Refers(Judge):
    """Dreams of a message by its name and, with what it refers to, by role; a name is likelier by 30 nats."""

    def __init__(self, *silent: str, named: bool = True) -> None:
        self.silent, self.named = silent, named

    def dream(self, passages, generator, progress, beside):
        self.beside = beside
        return [self.of(*pair) for pair in zip(passages, beside, strict=True)]

    def of(self, passage, earlier):
        named = [dream(f"{passage}?", passage)] * self.named
        role = [replace(dream("by role?", passage), beside=earlier.observation)] if earlier else []
        return [] if passage in self.silent else [*named, *role, Dream("Who else?", "Nobody.", "")]

    def follows(self, passages, later):
        return [30.0 * text.endswith("Paloma") for text in later]


MOVED = "hello Paloma moved"
KNOWN = [kept(1, 3, "Who is my sister?", SISTER.said), kept(2, 4, "What do I drink?", "you drink tea")]
KNOWN = [replace(KNOWN[0], dream=replace(KNOWN[0].dream, answer="Paloma")), KNOWN[1]]


def dreams_of(judge, texts, old=()):
    new, beside = dreamt(judge, texts, old, torch.Generator(), lambda stage, share: None)
    return {number: [d.question for d in dreams if not d.contrast] for number, dreams in new.items()}, beside


def test_what_a_message_refers_to_is_of_an_earlier_night_and_answers_with_the_name():
    asked = [f"{MOVED}?", "by role?"]
    assert dreams_of(Refers(), {6: MOVED}, KNOWN) == ({6: asked}, {6: SISTER})
    assert dreams_of(Refers(), {6: MOVED}, KNOWN[1:]) == ({6: asked[:1]}, {}), "it does not hold any more"
    assert dreams_of(Refers(), {}, KNOWN) == ({}, {})


def test_what_is_told_in_one_night_has_no_order():
    judge, texts = Refers(), {3: SISTER.said, 4: "Tea!", 6: MOVED}
    new, beside = dreams_of(judge, texts)
    assert new.keys() == {3, 4, 6}
    assert beside == {3: Earlier(6, MOVED, "paloma"), 6: SISTER}
    assert judge.beside == [beside[3], None, SISTER]


def test_what_refers_to_something_that_was_not_learned_is_asked_by_its_name_alone():
    texts = {3: SISTER.said, 6: MOVED}
    assert dreams_of(Refers(SISTER.said), texts) == ({6: [f"{MOVED}?"]}, {})
    assert dreams_of(Refers(SISTER.said, named=False), texts) == ({}, {}), "and a near miss alone is nothing to learn"


def test_a_question_by_role_goes_with_what_says_who_it_is(tmp_path):
    """After forgetting that nothing in the store has its words, and the rest of the message stays."""
    with MemoryStore.open(tmp_path / "m") as store:
        first, second = store.add_observation(SISTER.said), store.add_observation("Paloma moved to Oslo.")
        asked = [Dream("Where is Paloma?", "Oslo.", "Oslo"), Dream("Where's my sister?", "Oslo.", "Oslo", beside=first)]
        dreams = {first: [dream("Who?", "Paloma").payload()], second: [one.payload() for one in asked]}
        store.commit_night(b"1", consolidated=[first, second], dreams=dreams)
        assert [item.dream for item in kept_dreams(store, without=[first])] == asked[:1]
        assert [item.dream for item in kept_dreams(store)][1:] == asked
        _, again, known, _ = before_knowing(store, [first])
        assert (again, known) == ({second: asked[:1]}, [])
        store.forget([first], b"2")
        assert [item.dream for item in kept_dreams(store)] == asked[:1]
    assert not any(b"my sister" in file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file())


def test_what_gave_way_beside_something_holds_again_without_that(tmp_path):
    """My sister's town gave way to Paloma's; without knowing who that is, it holds."""
    with MemoryStore.open(tmp_path / "m") as store:
        town = store.add_observation("My sister lives in Boise.")
        boise = Dream("Where does my sister live?", "Boise.", "Boise")
        store.commit_night(b"1", consolidated=[town], dreams={town: [boise.payload()]})
        name = store.add_observation(SISTER.said)
        store.commit_night(b"2", consolidated=[name], dreams={name: [dream("Who?", "Paloma").payload()]})
        moved = store.add_observation("Paloma moved to Oslo.")
        own = Dream("Where is Paloma?", "Oslo.", "Oslo")
        taken = replace(boise, answer="Oslo", reply="Oslo.", taken=1, beside=name)
        given = {moved: Given([1], [taken, own], {1: name}), 99: Given([], [], {})}
        metrics = superseding(given)
        dreams = {moved: [taken.payload(), own.payload()]}
        store.commit_night(b"3", consolidated=[moved], dreams=dreams, metrics=metrics)
        held = {item.dream.question: item.dream.answer for item in kept_dreams(store)}
        assert held == {boise.question: "Oslo", "Who?": "Paloma", own.question: "Oslo"}
        assert [item.dream for item in kept_dreams(store, without=[name])] == [boise, own]
        assert before_knowing(store, [name])[:2] == (1, {moved: [own]})
        store.forget([name], b"4")
        assert [item.dream for item in kept_dreams(store)] == [boise, own]
        store.forget([moved], b"5")
        assert [item.dream for item in kept_dreams(store)] == [boise]
