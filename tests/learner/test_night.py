"""Which old dreams hold, give way or are replayed."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from judges import Judge, dream, kept

from everlearn.learner.asked import WELL
from everlearn.learner.dreams import Dream
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.night import Kept, choose_replay, dreamt, holding, kept_dreams
from everlearn.learner.references import RareWords
from everlearn.learner.store import MemoryStore
from everlearn.learner.superseding import CANDIDATES, FOLLOWS, LIKE, STILL, _alike, superseded

OLD = [
    kept(1, 7, "What is the name of my puppy?", "my puppy is Rex"),
    kept(2, 7, "Who barks at my puppy?", "my puppy is Rex"),
    kept(3, 8, "Which instrument do I play? lute", "you play the lute"),
    kept(4, 7, "My puppy is how big?", "my puppy is small"),
]


def given(judge, text: str, old, *dreams: Dream):
    """Return the ids that a new passage takes over, and the dreams that it has besides."""
    found = superseded(judge, {9: (text, dreams)}, old)[9]
    assert len(found.dreams) >= len(dreams)
    return found.ids, [dream for dream in found.dreams if dream.taken is not None]


def test_what_is_told_later_takes_the_answer_and_its_questions_over():
    mine = dream("What is the name of my puppy?", "your puppy is Maxi")
    old = [replace(item, dream=replace(item.dream, fit=-1.0)) for item in OLD]  # which says nothing of a new answer
    ids, dreams = given(Judge(), "my puppy is now called Maxi", old, mine)
    assert ids == [1, 2]
    assert dreams == [replace(mine, question="Who barks at my puppy?", taken=2)]


def test_what_else_was_said_does_not_name_what_gave_way():
    name = Dream("Who is our daughter?", "Tamsin. You have a daughter, Tamsin, who is seven.", "Tamsin")
    age = Dream("How old is she?", "Seven. You have a daughter, Tamsin, who is seven.", "seven")
    miss = Dream("Who else is seven?", "Lily is seven.", "")
    said = "We have one daughter, Tamsin, and she's seven"
    old = [Kept(number, 7, dream, said) for number, dream in enumerate((name, age, miss), 1)]
    old.append(Kept(4, 8, Dream("How many cats?", "Seven. You have seven cats.", "seven"), "we have seven cats"))
    assert holding(old, []) == old
    first, *others = holding(old, [2])
    assert first == replace(old[0], dream=replace(name, reply="Tamsin."))
    assert others == [old[2], old[3]]


def test_an_answer_that_was_not_dreamt_stands_alone():
    ids, dreams = given(
        Judge(), "my puppy is now called Maxi", OLD, dream("What is the name of my puppy?", "it is a puppy")
    )
    assert ids == [1, 2]
    assert dreams == [Dream("Who barks at my puppy?", "Maxi.", "Maxi", taken=2)]


def test_what_holds_no_more_is_not_said_again():
    old = [kept(1, 7, "What do I always drink?", "you drink a latte")]
    text, asked = "No more lattes, always drink dirty chai", "What do I drink?"
    mine = [Dream(asked, f"Chai. {text}. It is good.", "chai"), Dream("Is chai good?", "No, lattes are.", "")]
    found = superseded(Judge(), {9: (text, mine)}, old)[9]
    assert found.ids == [1]
    assert found.dreams == [
        Dream("What do I always drink?", "Chai. It is good.", "chai", taken=1),
        Dream(asked, "Chai. It is good.", "chai"),
        mine[1],  # a near miss is replied to by the base
    ]


def test_a_reply_of_which_nothing_is_left_is_the_answer_alone():
    old = [kept(1, 7, "What do I always drink?", "you drink a latte")]
    mine = Dream("What do I drink?", "Not lattes but chai", "chai")
    (_, left) = superseded(Judge(), {9: ("No more lattes, always drink chai", [mine])}, old)[9].dreams
    assert left == replace(mine, reply="Chai.")


def test_a_question_is_taken_over_from_one_of_two_answers():
    twice = [kept(1, 7, "Who barks at my puppy?", "puppy Rex"), kept(2, 8, "Who barks at my puppy?", "puppy Bob")]
    ids, dreams = given(Judge(), "my puppy is now called Maxi", twice)
    assert ids == [1, 2]
    assert [dream.taken for dream in dreams] == [1]


def test_the_same_answer_is_no_contradiction():
    assert given(Judge(), "my old puppy is Rex", OLD, dream("What is the name of my puppy?", "your puppy is Rex")) == (
        [],
        [],
    )


def test_a_question_the_new_passage_is_not_about_stays():
    new = dream("What is the name of my puppy?", "your boat is Maxi")
    assert given(Judge(), "we have a boat: Maxi", OLD, new) == ([], [])


def test_the_last_of_two_that_were_told_on_one_day_wins():
    texts = {9: ("my puppy is now Maxi", []), 10: ("my puppy is now Bella", [])}
    new = {n: (text, [dream("What is the name of my puppy?", text)]) for n, (text, _) in texts.items()}
    found = superseded(Judge(), new, OLD)
    assert (found[9].ids, found[10].ids) == ([], [1, 2])


ESTONIAN = [kept(i, 7, q, "I learn Estonian") for i, q in enumerate(("What do I learn?", "Which one do I learn?"))]


@pytest.mark.parametrize(
    ("text", "dreamt", "gone"),
    [
        ("Estonian I learn no more, but Basque", "", [0, 1]),  # named, and answered otherwise
        ("I learn Basque instead of Estonian", "Basque", [0, 1]),  # it still finds the old answer; dreamt was the new
        ("What I learn is hard: Estonian", "Estonian", []),  # still the answer
        ("Estonian is hard, so is Basque", "", []),  # named, but not about the questions
        ("I do learn Basque", "", []),  # no rare word of what was told
        ("Estonian I was to do and this I learn", "", []),  # the answer is in the question
    ],
)
def test_an_answer_gives_way_to_another_in_a_passage_that_shares_words(text, dreamt, gone):
    many = [kept(10 + i, 20 + i, f"q{i}?", f"others learn thing{i}") for i in range(5)]
    assert given(Judge(), text, [*ESTONIAN, *many], Dream("?", "", dreamt))[0] == gone


@pytest.mark.parametrize(
    ("now", "follows", "gone"),
    [
        (6.0, 10.0, [1]),  # somewhat less about the question than what was said then, and follows from that
        (6.0, 9.0, []),
        (8.0, 8.0, [1]),
        (30.0, 4.0, []),  # all about the question is all that can be
        (1.0, 99.0, []),  # not about it
    ],
)
def test_the_less_a_passage_is_about_the_question_the_more_it_must_follow(now, follows, gone):
    class Given(Judge):
        def about(self, passages, questions):
            return [now if "Boise" in passage else 10.0 for passage in passages]

        def follows(self, passages, later):
            compared = [("the house is in Duluth", "my house is in Boise")] if now >= 2 else []  # else it is in vain
            assert list(zip(passages, later)) == compared
            return [follows] * len(compared)

    home = [kept(1, 7, "Where is my house?", "the house is in Duluth")]
    assert given(Given(), "my house is in Boise", home)[0] == gone


@pytest.mark.parametrize(("more", "gone"), [(10, [1]), (25, [])])
def test_a_long_sentence_must_follow_by_more(more, gone):
    class Given(Judge):
        def about(self, passages, questions):
            return [9.0 if "Boise" in passage else 10.0 for passage in passages]

    home = [kept(1, 7, "Where is my house?", "the house is in Duluth")]
    assert given(Given(), f"my {'very ' * more}old house is in Boise", home)[0] == gone


def test_of_long_messages_sentences_are_compared_each_with_the_one_before():
    class Sentences(Judge):
        def follows(self, passages, later):
            self.seen = list(zip(passages, later))
            return [FOLLOWS if "Boise" in text else -99.0 for text in later]

        def about(self, passages, questions):
            self.read += passages
            return super().about(passages, questions)

        read: ClassVar[list[str]] = []

    judge = Sentences()
    home = [kept(1, 7, "Where is my house?", "Oh well. We laughed. The house is in Duluth. So it goes")]
    home = [replace(home[0], dream=replace(home[0].dream, answer="duluth"))]
    assert given(judge, "Hello! What a day! Now the house is in Boise", home)[0] == [1]
    old = "We laughed. The house is in Duluth."
    new = ["Hello!", "Hello! What a day!", "What a day! Now the house is in Boise"]
    assert judge.seen == [(old, part) for part in new]
    assert judge.read == ["Hello! What a day! Now the house is in Boise", old], "not the whole old message"
    assert given(judge, "my house is as old as it ever was", home)[0] == []


@pytest.mark.parametrize(
    ("here", "anyway", "gone"),
    [
        (STILL + 1, 1 - LIKE, [0, 1]),  # the old answer may still be the likelier
        (STILL - 1, 0.0, []),  # but not by so much: it is not what changed
        (9.0, -1 - LIKE, []),  # no answer of that kind, whatever the passage says
        (99.0, 99.0, [0, 1]),
    ],
)
def test_the_other_answer_must_be_given_and_fit(here, anyway, gone):
    class Unsure(Judge):
        def rather(self, passages, questions, ones, others):
            return [anyway if passage == NEUTRAL else here for passage in passages]

    assert given(Unsure(), "something else I learn: Basque", ESTONIAN)[0] == gone


def test_what_the_new_passage_still_says_of_the_old_answer_goes_too():
    """The first thing dreamt of it may be what is over; the second serves."""

    class Stubborn(Judge):
        def answers(self, passages, questions):
            return ["Imogen" for _ in passages]

    old = [kept(1, 7, "Who comes for our children?", "the children have Imogen")]
    text = "Imogen left, our children have Yolanda"
    first, second = Dream(old[0].dream.question, f"Imogen. {text}.", "Imogen"), Dream("Who?", "Yolanda.", "Yolanda")
    miss = Dream("Who is Imogen Poots?", "Imogen Poots is an actress.", "")
    found = superseded(Stubborn(), {9: (text, [first, second, miss])}, old)[9]
    assert found.ids == [1]
    assert found.dreams == [replace(second, question="Who comes for our children?", taken=1), second, miss]
    assert given(Stubborn(), text, old, first) == ([], []), "nothing else was dreamt"


@pytest.mark.parametrize(
    ("now", "gone"),
    [
        ((6.0, 6.0, -9.0, -9.0), True),  # .6 of ten is enough, and what the passage is least about does not count
        ((9.0, 3.0, 0.0, 0.0), True),  # the better half counts together
        ((9.0, 2.8, 0.0, 0.0), False),
        ((90.0, 1.0, 0.0, 0.0), False),  # and none for more than all
        ((6.0, 5.0, 5.0, 5.0), False),
    ],
)
def test_the_better_half_of_an_answers_questions_counts_together(now, gone):
    class Given(Judge):
        def about(self, passages, questions):
            return [now[int(q[-2])] if "Maxi" in p else 10.0 for p, q in zip(passages, questions)]

    old = [kept(i, 7, f"My puppy {i}?", "my puppy is Rex") for i in range(4)]
    mine = dream("Whose?", "Maxi")
    ids, dreams = given(Given(), "my puppy is called Maxi", old, mine)
    assert (ids, [d.answer for d in dreams]) == (([0, 1, 2, 3], ["Maxi"] * 4) if gone else ([], []))


def test_of_two_new_passages_the_one_that_is_about_it_replaces():
    class Given(Judge):
        def about(self, passages, questions):
            return [10.0 if "Maxi" in passage or "Rex" in passage else 0.0 for passage in passages]

    new = {9: ("my puppy is called Maxi", []), 10: ("my puppy is asleep", [])}
    found = superseded(Given(), new, [kept(1, 7, "My puppy?", "my puppy is Rex")])
    assert (found[9].ids, found[10].ids) == ([1], [])


@pytest.mark.parametrize(("now", "gone"), [(2.0, [1]), (1.9, [])])
def test_a_passage_that_is_hardly_about_its_question_replaces_nothing(now, gone):
    class Given(Judge):
        def about(self, passages, questions):
            return [now if "Maxi" in passage else 1.0 for passage in passages]

    assert given(Given(), "my puppy is called Maxi", [kept(1, 7, "My puppy?", "my puppy is Rex")])[0] == gone


def test_most_questions_must_have_another_answer():
    class Half(Judge):
        def answers(self, passages, questions):
            return ["Maxi" if "puppy" in question else "" for question in questions]

    asked = ("Which is my puppy?", "Where do I run?", "Where do I sleep?")
    old = [kept(i, 7, question, "my spotted puppy is Rex") for i, question in enumerate(asked)]
    assert given(Half(), "my spotted puppy is called Maxi", old, dream("Whose?", "x"))[0] == []
    assert given(Half(), "my spotted puppy is called Maxi", old[:2], dream("Whose?", "x"))[0] == [0, 1]


def test_echoes_go_with_their_answer_and_do_not_count_as_questions():
    echoes = [Dream(f"The name of my puppy is {w}?", "your puppy is Maxi", "Maxi", echo=True) for w in ("what", "who")]
    new = [dream("What is the name of my puppy?", "your puppy is Maxi"), *echoes]
    more = [Kept(20 + i, 7, Dream(f"{w} is Rex the?", "x Rex", "Rex", echo=True), "x") for i, w in enumerate("abc")]
    assert given(Judge(), "my puppy is now called Maxi", [*OLD, *more], *new)[0] == [1, 2, 20, 21, 22]


def test_something_else_is_not_even_compared():
    judge = Judge()
    assert given(judge, "we bought a boat", OLD, dream("Where did we buy the boat?", "you bought a boat"))[0] == []
    assert judge.asked == []


def test_observations_are_compared_with_all_their_answers():
    told = RareWords({number: ["my red boat"] for number in range(1, CANDIDATES + 2)})
    answers = [(number, (word,)) for number in range(1, CANDIDATES + 2) for word in ("red", "boat")]
    assert _alike("a red boat", answers, told) == answers[: 2 * CANDIDATES]


def test_rare_words_decide_what_is_compared():
    """Many passages share their frame; the words that tell them apart count."""
    many = [kept(i, i, f"Which thing{i}?", f"another thing{i} lies in room{i}") for i in range(100, 190)]
    judge = Judge()
    given(judge, "another thing103 lies here", many)
    assert [question for _, question in judge.asked] == ["Which thing103?"]


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
        first = store.add_observation("my puppy is Rex")
        store.commit_night(b"1", consolidated=[first], dreams={first: [dream("Puppy?", "Rex").payload()]})
        old = kept_dreams(store)
        assert [item.observation for item in old] == [first]
        later = store.add_observation("my puppy is Max")
        store.commit_night(
            b"2",
            consolidated=[later],
            dreams={later: [dream("Puppy?", "Max").payload()]},
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
            ids.append(store.add_observation(f"my puppy is {name}"))
            new = Dream("Which puppy barks?", f"{name}.", name, taken=taken)
            gone = {} if taken is None else {str(ids[-1]): [taken]}
            store.commit_night(
                b"1", consolidated=ids[-1:], dreams={ids[-1]: [new.payload()]}, metrics={"superseded": gone}
            )
            (item,) = kept_dreams(store)
            assert (item.observation, item.dream, item.said) == (ids[-1], new, f"my puppy is {name}")
            taken = item.id
        assert kept_dreams(store, without=ids[:1]) == []
        (before,) = kept_dreams(store, without=ids[2:])
        assert (before.observation, before.dream.answer) == (ids[1], "Maxi")
        store.forget(ids[:1], b"2")
        assert kept_dreams(store) == []
    assert not any(b"barks" in file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file())


class Dreams(Judge):
    """Dreams what it is given, of any passage, and finds that nothing refers to anything."""

    def __init__(self, *dreams: Dream) -> None:
        self.dreams = list(dreams)

    def dream(self, passages, generator, progress, beside):
        return [self.dreams for _ in passages]

    def follows(self, passages, later):
        return [0.0 for _ in later]


@pytest.mark.parametrize(
    ("before", "answer", "fit", "stays"),
    [
        (WELL, "Wichita", None, False),
        (0.0, "Wichita", WELL - 0.1, False),
        (0.0, "Wichita", WELL, True),
        (0.0, "duluth", None, True),
        (WELL - 0.1, "Wichita", None, True),
        (None, "Wichita", None, True),
    ],
)
def test_a_question_that_asks_well_for_what_is_known_has_no_other_answer(before, answer, fit, stays):
    home = Dream("What city do I live in?", "Duluth.", "Duluth", fit=before)
    town, other = Dream("What city do I live in?", f"{answer}.", answer, fit=fit), Dream("Which city?", "It.", "It")
    miss = Dream("What city do I live in?", "I don't know.", "")
    again = replace(home, answer="Wisconsin") if answer != "Wichita" else replace(home, fit=None)
    old = [Kept(1, 7, home, "I live in Duluth"), Kept(2, 8, again, "I live in Wisconsin, in Duluth")]
    judge = Dreams(town, other, miss)
    new, _ = dreamt(judge, {9: "I like it"}, old, torch.Generator(), lambda stage, share: None)
    assert new == {9: [town] * stays + [other, miss]}
