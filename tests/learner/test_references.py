"""What a message refers to."""

from __future__ import annotations

import pytest
import torch

from everlearn.learner.dreams import SelfStudyDreamer
from everlearn.learner.references import FEW, NAMED, Earlier, RareWords, by_role, references, up_to_role
from everlearn.models.hub import load_model

SISTER = "My sister is named Paloma."


def follows(passages, later):
    """A text is likelier by 10 nats for every word of the passage that it has, and by 1 for every word."""
    return [sum(1 + 10 * (word in p) for word in later.rstrip(".").split()) for p, later in zip(passages, later)]


TOLD = {1: "I like tea.", 2: SISTER, 3: "Paloma sings.", 4: "She saw Paloma in Oslo.", 5: "We like tea."}


def refer(new, known=None, answers=None, follows=follows):
    """Return what observations refer to; by default every word that is known answers something."""
    known = known or {}
    return references(follows, new, known, {n: [text] for n, text in known.items()} if answers is None else answers)


def test_a_name_refers_to_the_message_that_answers_with_it():
    known, new = {n: TOLD[n] for n in (1, 2, 3)}, {n: TOLD[n] for n in (4, 5)}
    assert refer(new, known, {1: ["milk"], 2: ["my Paloma"], 3: ["sings"]}) == {4: Earlier(2, SISTER, "paloma")}
    assert refer(new, known, {1: ["tea"]}) == {5: Earlier(1, TOLD[1], "tea")}, "the sister's name is no more hers"
    assert refer({}, known) == {}
    assert refer({4: "Ole!"}, known) == {}


def test_what_is_told_the_same_day_refers_either_way():
    new = {2: SISTER, 4: TOLD[4]}
    assert refer(new) == {2: Earlier(4, TOLD[4], "paloma"), 4: Earlier(2, SISTER, "paloma")}
    assert refer(new, {3: TOLD[3]}) == {n: Earlier(3, TOLD[3], "paloma") for n in new}, "rather to what is known"


def test_the_likeliest_of_several_and_the_sentence_before_it():
    known = {1: "We got a ferret. He is called Wurzel. He bites.", 2: "Ann sings.", 3: "Wurzel sleeps."}

    def gains(passages, later):
        name = {"Ann": 8.0, "Wurzel": 20.0}
        return [name.get(b.split()[-1], 0.0) - ("sleeps" in a) for a, b in zip(passages, later, strict=True)]

    expected = {4: Earlier(1, "We got a ferret. He is called Wurzel.", "wurzel")}
    assert refer({4: "Ann and Wurzel, who is old."}, known, follows=gains) == expected


@pytest.mark.parametrize("gain", [NAMED, NAMED - 0.1])
def test_the_word_alone_must_be_likelier_not_the_sentence(gain):
    seen = []

    def likely(passages, later):
        seen.extend(later)
        return [5.0 + gain * text.endswith("Paloma") for text in later]

    found = refer({2: "My sister is named after Paloma"}, {1: SISTER}, follows=likely)
    assert found == ({2: Earlier(1, SISTER, "paloma")} if gain == NAMED else {})
    assert {"My sister is named after", "My sister is named after Paloma"} <= set(seen)
    assert "" not in seen, "nothing stands before a first word"


def test_words_that_many_have_are_no_names():
    known = {number: f"Paloma and {number}." for number in range(1, FEW + 1)}
    assert refer({9: "Paloma!"}, known) == {}
    del known[1]
    assert refer({9: "Paloma!"}, known) == {9: Earlier(2, known[2], "paloma")}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Bjo\u0308rn", True),  # accents apart from their letters
        ("Ti\u00ea\u0301n", True),
        ("Halcyon\u2122", False),
        ("\u0645\u064f\u0646\u064e\u0649", False),  # Arabic with its vowels
        ("\u0e19\u0e49\u0e33", False),  # Thai
    ],
)
def test_where_words_are_told_apart_otherwise_a_name_is_missed_and_nothing_else(name, found):
    referring = refer({2: f"{name} moved."}, {1: f"My sister is {name}."}, follows=lambda a, b: [9.0] * len(a))
    assert (2 in referring) == found


def test_a_question_begins_where_the_name_stood():
    assert up_to_role("Where does Paloma live?", "paloma") == ["Where does my", "Where does our"]
    assert up_to_role("Who bought the Trooper?", "trooper") == ["Who bought my", "Who bought our"]
    assert up_to_role("Paloma went where?", "paloma") == ["my", "our"]
    assert up_to_role("Where did she go?", "paloma") == [""]


def test_a_role_is_a_word_of_what_was_told():
    told = Earlier(1, "My sister is Paloma.", "paloma")
    assert by_role("Where does my sister live?", "Where does she live?", told)
    assert not by_role("Where does my aunt live?", "Where does she live?", told)
    assert not by_role("Where is my sister's house?", "Where is my sister?", told), "that was asked already"
    assert not by_role("Where does my sister Paloma live?", "Where does she live?", told)
    assert not by_role("Where is my flat?", "Where does she live?", told), "short words say nothing"


def test_rare_words_know_endings_and_no_short_words():
    index = RareWords({1: ["my red boat"], 2: ["two boats"], 3: ["a it"]})
    assert index.rare("Boats, it, no reds") == {"boats": {1, 2}, "reds": set()}


@pytest.mark.real_model
def test_the_default_model_finds_who_is_meant_and_asks_by_that(default_model):
    dreamer = SelfStudyDreamer(*load_model(str(default_model)))
    known, new = {1: "Our landlord is called Hristo.", 2: "I had soup."}, {3: "Hristo moved to Plovdiv last week."}
    found = refer(new, known, {1: ["Hristo"], 2: ["soup"]}, dreamer.follows)
    assert found == {3: Earlier(1, known[1], "hristo")}
    passages, generator = [new[3]], torch.Generator().manual_seed(0)
    (dreams,) = dreamer.dream(passages, generator, lambda stage, share: None, [found[3]])
    by_role = [dream.question for dream in dreams if dream.beside == 1]
    assert any("landlord" in question for question in by_role), by_role
    assert not any("hristo" in question.casefold() for question in by_role)
    assert {dream.answer for dream in dreams if dream.beside == 1} & {"Plovdiv", "Plovdiv last week", "to Plovdiv"}
