"""Which old dreams hold, give way or are replayed."""

from __future__ import annotations

import pytest
import torch

from everlearn.learner.dreams import Dream
from everlearn.learner.night import Kept, choose_replay, kept_dreams, superseded
from everlearn.learner.store import MemoryStore


def dream(question: str, reply: str) -> Dream:
    return Dream(question, reply, reply.split()[-1])


class Judge:
    """Finds a question about a passage when they share the word that comes last in the question."""

    def rather(self, passages, questions, ones, others):
        """The answer that comes last in the passage; without one, what is as long is as good."""
        pairs = zip(passages, ones, others)
        return [float(p.rfind(a) - p.rfind(b) if a in p or b in p else 5 * (len(a) - len(b))) for p, a, b in pairs]

    def about(self, passages, questions):
        self.asked = list(zip(passages, questions))
        return [10.0 if q.rstrip("?").split()[-1] in p else 0.0 for p, q in self.asked]


OLD = [
    Kept(1, 7, dream("What is the name of my dog?", "your dog is Rex")),
    Kept(2, 7, dream("Who barks?", "your dog is Rex")),
    Kept(3, 8, dream("Which instrument do I play? lute", "you play the lute")),
    Kept(4, 7, dream("How big is my dog?", "your dog is small")),
]


def test_what_is_told_later_takes_the_question_and_its_answer_over():
    new = {9: ("my dog is now called Max", [dream("What is the name of my dog?", "your dog is Max")])}
    assert superseded(Judge(), new, OLD) == {9: [1, 2]}


def test_the_same_answer_is_no_contradiction():
    new = {9: ("Rex, my dog, is old", [dream("What is the name of my dog?", "your dog is Rex")])}
    assert superseded(Judge(), new, OLD) == {9: []}


def test_a_question_the_new_passage_is_not_about_stays():
    new = {9: ("we have a boat", [dream("What is the name of my dog?", "your boat is Max")])}
    assert superseded(Judge(), new, OLD) == {9: []}


ESTONIAN = [Kept(i, 7, dream(q, "you learn Estonian")) for i, q in enumerate(("What do I learn?", "Which is it?"))]


@pytest.mark.parametrize(
    ("text", "reply", "gone"),
    [
        ("Estonian I learn no more, but Basque", "you study Basque", [0, 1]),  # named, and answered otherwise
        ("with Ada I learn Estonian", "you meet Ada", []),  # named, and still the answer
        ("Estonian is hard, so is Basque", "you study Basque", []),  # named, but not asked about
        ("Estonian I learn no more, but Ju", "you study Ju", []),  # no answer of that kind
        ("I learn Basque", "you study Basque", []),  # neither named nor asked again
    ],
)
def test_an_answer_that_is_named_gives_way_to_another(text, reply, gone):
    assert superseded(Judge(), {9: (text, [dream("What is my subject?", reply)])}, ESTONIAN) == {9: gone}


def test_echoes_do_not_count_as_questions_asked_again():
    echoes = [Dream(f"The name of my dog is {w}?", "your dog is Max", "Max", echo=True) for w in ("what", "who")]
    new = {9: ("my dog is now called Max", [dream("What is the name of my dog?", "your dog is Max"), *echoes])}
    more = [
        Kept(20 + i, 7, Dream(f"{w} is Rex the?", "your dog is Rex", "Rex", echo=True)) for i, w in enumerate("abc")
    ]
    assert superseded(Judge(), new, [*OLD, *more]) == {9: [1, 2, 20, 21, 22]}


def test_something_else_is_not_even_compared():
    judge = Judge()
    new = {9: ("we bought a boat", [dream("Where did we buy the boat?", "you bought a boat")])}
    assert superseded(judge, new, OLD) == {9: []}
    assert judge.asked == []


def test_rare_words_decide_what_is_alike():
    """Many questions share their frame; the word that tells them apart counts most."""
    many = [Kept(i, i, dream(f"What is the name of my thing{i}?", f"it is called name{i}")) for i in range(40)]
    judge = Judge()
    new = {99: ("my thing3 has another name", [dream("What is the name of my thing3?", "it is called Max")])}
    assert superseded(judge, new, many) == {99: [3]}
    assert [question for _, question in judge.asked] == ["What is the name of my thing3?"]


def test_replay_is_even_over_observations():
    old = [Kept(i, i // 10, dream(f"q{i}?", f"a{i}")) for i in range(50)]
    chosen = choose_replay(old, 10, torch.Generator().manual_seed(0))
    sources = sorted(int(item.question[1:-1]) // 10 for item in chosen)
    assert sources == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert choose_replay(old, 10, torch.Generator().manual_seed(1)) != chosen
    assert len(choose_replay(old, 1000, torch.Generator())) == 50
    assert choose_replay([], 5, torch.Generator()) == []


def test_superseded_dreams_come_back_when_the_later_is_forgotten(tmp_path):
    with MemoryStore.open(tmp_path / "m") as store:
        first = store.add_observation("my dog is Rex")
        store.commit_night(b"1", consolidated=[first], dreams={first: [dream("Dog?", "Rex").payload()]})
        old = kept_dreams(store)
        assert [item.observation for item in old] == [first]
        later = store.add_observation("my dog is Max")
        store.commit_night(
            b"2",
            consolidated=[later],
            dreams={later: [dream("Dog?", "Max").payload()]},
            metrics={"superseded": {str(later): [old[0].id]}},
        )
        assert [item.observation for item in kept_dreams(store)] == [later]
        assert [item.observation for item in kept_dreams(store, without=[later])] == [first, later]
        store.forget([later], b"3")
        assert [item.observation for item in kept_dreams(store)] == [first]
