"""Which old dreams hold, give way or are replayed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everlearn.learner.dreams import Dream
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.night import Kept, choose_replay, kept_dreams, superseded
from everlearn.learner.store import MemoryStore


def dream(question: str, reply: str) -> Dream:
    return Dream(question, reply, reply.split()[-1])


class Judge:
    """Finds a question about a passage when they share the word that comes last in the question.

    Its answer is the last word of the passage.
    """

    def answers(self, passages, questions):
        return [passage.split()[-1] for passage in passages]

    def rather(self, passages, questions, ones, others):
        """The answer that comes last in the passage; without one, what is as long is as good."""
        pairs = zip(passages, ones, others)
        return [(p.rfind(a) - p.rfind(b)) / 10 if a in p or b in p else 5.0 * (len(a) - len(b)) for p, a, b in pairs]

    def about(self, passages, questions):
        self.asked = list(zip(passages, questions))
        return [10.0 if q.rstrip("?").split()[-1] in p else 0.0 for p, q in self.asked]


def kept(id: int, observation: int, question: str, reply: str) -> Kept:
    return Kept(id, observation, dream(question, reply), reply)


OLD = [
    kept(1, 7, "What is the name of my dog?", "my dog is Rex"),
    kept(2, 7, "Who barks at my dog?", "my dog is Rex"),
    kept(3, 8, "Which instrument do I play? lute", "you play the lute"),
    kept(4, 7, "How big is my dog?", "my dog is small"),
]


def given(judge, text: str, old, *dreams: Dream):
    """Return the ids that a new passage takes over, and its new dreams."""
    found = superseded(judge, {9: (text, dreams)}, old)[9]
    return found.ids, found.dreams


def test_what_is_told_later_takes_the_answer_and_its_questions_over():
    mine = dream("What is the name of my dog?", "your dog is Maxi")
    ids, dreams = given(Judge(), "my dog is now called Maxi", OLD, mine)
    assert ids == [1, 2]
    assert dreams == [replace(mine, question="Who barks at my dog?", taken=2)]


def test_an_answer_that_was_not_dreamt_stands_alone():
    ids, dreams = given(Judge(), "my dog is now called Maxi", OLD, dream("What is the name of my dog?", "it is a dog"))
    assert ids == [1, 2]
    assert dreams == [Dream("Who barks at my dog?", "Maxi.", "Maxi", taken=2)]


def test_the_same_answer_is_no_contradiction():
    assert given(Judge(), "my old dog is Rex", OLD, dream("What is the name of my dog?", "your dog is Rex")) == ([], [])


def test_a_question_the_new_passage_is_not_about_stays():
    new = dream("What is the name of my dog?", "your boat is Maxi")
    assert given(Judge(), "we have a boat: Maxi", OLD, new) == ([], [])


def test_the_last_of_two_that_were_told_on_one_day_wins():
    texts = {9: ("my dog is now Maxi", []), 10: ("my dog is now Bella", [])}
    new = {n: (text, [dream("What is the name of my dog?", text)]) for n, (text, _) in texts.items()}
    found = superseded(Judge(), new, OLD)
    assert (found[9].ids, found[10].ids) == ([], [1, 2])


ESTONIAN = [kept(i, 7, q, "I learn Estonian") for i, q in enumerate(("What do I learn?", "Which one do I learn?"))]


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Estonian I learn no more, but Basque", [0, 1]),  # named, and answered otherwise
        ("What I learn is hard: Estonian", []),  # still the answer
        ("Estonian is hard, so is Basque", []),  # named, but not about the questions
        ("Estonian I learn no more, but Ju", []),  # no answer of that kind
        ("I do learn Basque", []),  # no rare word of what was told, nor asked again
        ("Estonian I was to do and this I learn", []),  # the answer is in the question
    ],
)
def test_an_answer_gives_way_to_another_in_a_passage_that_shares_words(text, gone):
    many = [kept(10 + i, 20 + i, f"q{i}?", f"others learn thing{i}") for i in range(5)]
    assert given(Judge(), text, [*ESTONIAN, *many], dream("What is my subject?", "x"))[0] == gone


def test_an_answer_that_is_out_of_the_question_is_only_given_up_for_one_to_its_own_questions():
    """The sister's town is not where I live, though the passage says more of the one than of the other."""

    class Sure(Judge):
        def rather(self, passages, questions, ones, others):
            return [(20.0 if p != NEUTRAL else 0.0) for p in passages]

    home = [kept(1, 7, "Where is my house?", "the house is in Duluth")]
    text = "my sister's house is in Boise"
    assert given(Sure(), text, home, dream("Who has a sister?", "x"))[0] == []
    assert given(Judge(), text, home, dream("Who has a sister?", "x"))[0] == [1]
    assert given(Sure(), text, home, dream("Where is my house?", "x"))[0] == [1]


def test_most_questions_must_have_another_answer():
    asked = ("Which is my dog?", "Where do I run?", "Where do I sleep?")
    old = [kept(i, 7, question, "my spotted dog is Rex") for i, question in enumerate(asked)]
    assert given(Judge(), "my spotted dog is called Maxi", old, dream("Whose?", "x"))[0] == []
    assert given(Judge(), "my spotted dog is called Maxi", old[:2], dream("Whose?", "x"))[0] == [0, 1]


def test_echoes_go_with_their_answer_and_do_not_count_as_questions():
    echoes = [Dream(f"The name of my dog is {w}?", "your dog is Maxi", "Maxi", echo=True) for w in ("what", "who")]
    new = [dream("What is the name of my dog?", "your dog is Maxi"), *echoes]
    more = [Kept(20 + i, 7, Dream(f"{w} is Rex the?", "x Rex", "Rex", echo=True), "x") for i, w in enumerate("abc")]
    assert given(Judge(), "my dog is now called Maxi", [*OLD, *more], *new)[0] == [1, 2, 20, 21, 22]


def test_something_else_is_not_even_compared():
    judge = Judge()
    assert given(judge, "we bought a boat", OLD, dream("Where did we buy the boat?", "you bought a boat"))[0] == []
    assert judge.asked == []


def test_rare_words_decide_what_is_alike():
    """Many questions share their frame; the word that tells them apart counts most."""
    many = [kept(i, i, f"What is the name of my thing{i}?", f"it is called name{i}") for i in range(90)]
    mine = dream("What is the name of my thing3?", "it is called Maxi")
    assert given(Judge(), "my thing3 has the other name of Maxi", many, mine)[0] == [3]


def test_questions_of_common_words_are_not_asked_again():
    """Everybody has a name: Maxi takes nothing from Rex."""
    many = [kept(i, i, "What is her name?", f"she is Lena{i}") for i in range(20, 30)]
    assert given(Judge(), "and her name is Maxi", many, dream("What is her name?", "Maxi"))[0] == []
    assert given(Judge(), "and her name is Maxi", many[:2], dream("What is her name?", "Maxi"))[0] == [20, 21]


def test_replay_is_even_over_observations():
    old = [kept(i, i // 10, f"q{i}?", f"a{i}") for i in range(50)]
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
        assert [item.observation for item in kept_dreams(store, without=[later])] == [first]
        store.forget([later], b"3")
        assert [item.observation for item in kept_dreams(store)] == [first]


def test_a_question_that_was_taken_over_goes_with_the_one_it_comes_from(tmp_path):
    """It is not stored twice: after forgetting nothing in the store has its words."""
    with MemoryStore.open(tmp_path / "m") as store:
        ids: list[int] = []
        taken = None
        for name in ("Rex", "Maxi", "Bella"):
            ids.append(store.add_observation(f"my dog is {name}"))
            new = Dream("Which dog barks?", f"{name}.", name, taken=taken)
            gone = {} if taken is None else {str(ids[-1]): [taken]}
            store.commit_night(
                b"1", consolidated=ids[-1:], dreams={ids[-1]: [new.payload()]}, metrics={"superseded": gone}
            )
            (item,) = kept_dreams(store)
            assert (item.observation, item.dream, item.said) == (ids[-1], new, f"my dog is {name}")
            taken = item.id
        assert kept_dreams(store, without=ids[:1]) == []
        (before,) = kept_dreams(store, without=ids[2:])
        assert (before.observation, before.dream.answer) == (ids[1], "Maxi")
        store.forget(ids[:1], b"2")
        assert kept_dreams(store) == []
    assert not any(b"barks" in file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file())
