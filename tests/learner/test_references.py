"""What a message refers to."""

from __future__ import annotations

import pytest
import torch

from everlearn.learner.dreams import SelfStudyDreamer
from everlearn.learner.references import FEW, NAMED, Earlier, RareWords, references
from everlearn.models.hub import load_model

SISTER = "My sister is named Paloma."


def follows(passages, later):
    """A text is likelier by 10 nats for every word of the passage that it has, and by 1 for every word."""
    return [sum(1 + 10 * (word in p) for word in later.rstrip(".").split()) for p, later in zip(passages, later)]


def test_a_name_refers_to_the_message_that_introduced_it():
    told = {1: "I like tea.", 2: SISTER, 3: "Paloma sings.", 4: "She saw Paloma in Oslo.", 5: "We like tea."}
    new = {4: told[4], 5: told[5]}
    found = references(follows, {4: told[4]}, told)
    assert found == {4: Earlier(2, SISTER, "paloma")}, "not what mentioned her later"
    assert references(follows, new, told).keys() == {4, 5}
    assert references(follows, {2: SISTER}, told) == {}, "what is told on a later day introduces nothing"
    assert references(follows, {2: SISTER, 4: told[4]}, {2: SISTER, 4: told[4]}).keys() == {2, 4}, "on the same it may"
    assert references(follows, {1: told[1]}, told) == {}


def test_the_word_alone_must_be_likelier_not_the_sentence():
    told = {1: SISTER, 2: "My sister is named after Paloma"}

    def likely(passages, later):
        return [NAMED - 0.1 if text.endswith("Paloma") else 0.0 for text in later]

    assert references(likely, {2: told[2]}, told) == {}
    seen = []

    def unlikely_before(passages, later):
        seen.extend(later)
        return [NAMED if text.endswith("Paloma") else 0.0 for text in later]

    assert references(unlikely_before, {2: told[2]}, told) == {2: Earlier(1, SISTER, "paloma")}
    assert {"My sister is named after", "My sister is named after Paloma"} <= set(seen)
    assert "" not in seen, "nothing stands before a first word"


def test_words_that_many_have_are_no_names():
    told = {number: f"Paloma and {number}." for number in range(1, FEW + 2)}
    last = max(told)
    assert references(follows, {last: told[last]}, told) == {}
    del told[1]
    assert references(follows, {last: told[last]}, told) == {last: Earlier(2, told[2], "paloma")}


def test_the_likeliest_of_several_and_the_sentence_before_it():
    told = {1: "We got a ferret. He is called Wurzel. He bites.", 2: "Ann sings.", 3: "Ann and Wurzel, who is old."}

    def gains(passages, later):
        return [{"Ann": 8.0, "Wurzel": 20.0}.get(text.split()[-1], 0.0) for text in later]

    assert references(gains, {3: told[3]}, told) == {3: Earlier(1, "We got a ferret. He is called Wurzel.", "wurzel")}


def test_rare_words_know_endings_and_no_short_words():
    index = RareWords({1: ["my red boat"], 2: ["two boats"], 3: ["a it"]})
    assert index.rare("Boats, it, no reds") == {"boats": {1, 2}, "reds": set()}


@pytest.mark.real_model
def test_the_default_model_finds_who_is_meant_and_asks_by_that(default_model):
    dreamer = SelfStudyDreamer(*load_model(str(default_model)))
    told = {1: "Our landlord is called Hristo.", 2: "I had soup for lunch.", 3: "Hristo moved to Plovdiv last week."}
    found = references(dreamer.follows, {3: told[3]}, told)
    assert found == {3: Earlier(1, told[1], "hristo")}
    passages, generator = [told[3]], torch.Generator().manual_seed(0)
    (dreams,) = dreamer.dream(passages, generator, lambda stage, share: None, [found[3]])
    by_role = [dream.question for dream in dreams if dream.beside == 1]
    assert any("landlord" in question for question in by_role), by_role
    assert not any("hristo" in question.casefold() for question in by_role)
    assert {dream.answer for dream in dreams if dream.beside == 1} & {"Plovdiv", "Plovdiv last week", "to Plovdiv"}
