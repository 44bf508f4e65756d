"""Selection: a message is kept for a sentence that surprises and tells something; of a long one only those count."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner import selection
from everlearn.learner.selection import SurpriseSelector
from everlearn.models.hub import load_model

CHATTER = "Thank you so much for your help with all of this yesterday, it was a pleasure as always and I mean it."
TOLD = "My parrot is called Otto and he has been living with us in the small house by the sea since the spring."


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A selector whose surprise and odds are given by words: "Otto" is told, "wow" is told but no surprise."""
    base, tokenizer = load_model(str(tiny_learner.make_model(tmp_path)))
    selector = SurpriseSelector(base, tokenizer, None, None)
    told: list[str] = []

    def surprise(heads, lines):
        told[:] = lines
        rest = [[-1.0] * line.count("very") for line in lines]
        return [torch.tensor([-1.0, -9.0 if "Otto" in line else -0.1, *more]) for line, more in zip(lines, rest)]

    monkeypatch.setattr(selector._after, "log_likelihood", surprise)
    monkeypatch.setattr(selection, "read_at_end", lambda *arguments: None)
    tells = lambda line: ("Otto" in line or "wow" in line) and not line.endswith("?")  # noqa: E731
    odds = lambda *arguments: torch.tensor([4.0 if tells(line) else -8.0 for line in told])  # noqa: E731
    monkeypatch.setattr(selection, "tells_something", odds)
    return selector.judge


def test_only_what_surprises_and_tells_is_kept(judge):
    one, two, three = judge(["My parrot is Otto.", "wow, I live here", "Hello!"])
    assert (one.keep, two.keep, three.keep) == (True, False, False)
    assert one.surprise == pytest.approx(10.0)
    assert one.worth is None, "all of it"
    assert judge([]) == []


def test_of_a_long_message_only_what_tells_something_is_worth_a_dream(judge):
    long, chatter = judge([f"{CHATTER} {TOLD} {CHATTER}", f"{CHATTER} {CHATTER} {CHATTER}"])
    assert long.keep
    assert long.worth == TOLD
    assert not chatter.keep
    assert chatter.worth is None


def test_a_message_that_ends_in_a_question_is_kept_for_what_it_tells(judge):
    short, longer = judge(["My parrot is Otto. Any tips?", f"Hi! {TOLD} How do I teach him not to bite the cat?"])
    assert short.keep
    assert short.worth is None, "dreamt of as a whole"
    assert longer.keep
    assert longer.worth == f"Hi! {TOLD}", "what is too short goes with the next"


def test_of_much_that_tells_the_sentences_that_tell_most_are_worth_a_dream(judge):
    told = [
        f"Otto said very {'very ' * count}many things today and I wrote all of them down." for count in (6, 0, 9, 2)
    ]
    (long,) = judge([" ".join(told)])
    losses = [10.0 + 1 + count for count in (6, 0, 9, 2)]
    assert [loss >= selection.SHARE * max(losses) for loss in losses] == [True, False, True, True]
    assert long.worth == f"{told[0]} {told[2]} {told[3]}", "in their order"


def test_what_is_told_before_a_question_in_one_sentence_is_kept_without_it(judge):
    short, longer, asked, both = judge(
        [
            "my parrot is Otto, any tips?",
            f"{CHATTER} {TOLD[:-1]}, is that too long?",
            "Is this one, or that one, called a parrot?",
            "My parrot is Otto. My cat, is she Otto too?",
        ]
    )
    assert (short.keep, short.worth) == (True, "my parrot is Otto")
    assert (longer.keep, longer.worth) == (True, TOLD[:-1])
    assert not asked.keep
    assert (both.keep, both.worth) == (True, None)
