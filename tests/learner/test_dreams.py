"""Dreams: what is kept of what the model asks itself, and what is answered to it."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner.dreams import LONG, Dream, SelfStudyDreamer, split_passage, words
from everlearn.learner.judging import DROP
from everlearn.learner.voice import greedy_replies
from everlearn.models.hub import load_model

CAT = "My cat is Nils."


class Script:
    """What the model writes after each prompt, and how its questions are judged."""

    def __init__(self, dreamer: SelfStudyDreamer, monkeypatch) -> None:
        self.lines: list[str] = []
        self.ways = ["Your cat is Nils."]
        self.world = self.stranger = self.situation = ""
        self.scores: dict[str, float] = {}
        self._turns: dict[tuple[str, str], int] = {}

        def says(name, made):
            monkeypatch.setattr(getattr(dreamer, name), "sample", lambda tails, **options: made(tails))

        says("_asking", lambda tails: [self._asked(*tail.split(" -> ")) for tail in tails])
        says("_saying", lambda tails: [self.ways[i % len(self.ways)] for i in range(len(tails))])
        says("_missing", lambda tails: [self.world] * len(tails))
        says("_swapping", lambda tails: [self.stranger] * len(tails))
        says("_situating", lambda tails: [self.situation] * len(tails))
        judged = lambda candidates, texts: [self.scores.get(c.question, 1.0) for c in candidates]  # noqa: E731
        monkeypatch.setattr(dreamer._judge, "scores", judged)

    def _asked(self, passage: str, start: str) -> str:
        """The lines that begin with ``start``, in turn, without it."""
        fitting = [line.removeprefix(f"{start} ") for line in self.lines if line.startswith(f"{start} ")] or [""]
        turn = self._turns[passage, start] = self._turns.get((passage, start), -1) + 1
        return fitting[turn % len(fitting)]


@pytest.fixture
def dreamer(tmp_path):
    return SelfStudyDreamer(*load_model(str(tiny_learner.make_model(tmp_path))), samples=16, keep=3)


@pytest.fixture
def script(dreamer, monkeypatch):
    return Script(dreamer, monkeypatch)


def run(dreamer, *passages: str) -> list[list[Dream]]:
    return dreamer.dream(list(passages or [CAT]), torch.Generator().manual_seed(0), lambda stage, share: None)


def test_questions_are_kept_once_best_first_and_answered_with_the_passage(dreamer, script):
    script.lines = ["What is my cat called? nils.", "Who is it? Nils.", "Which cat? Nils."]
    script.scores = {"Who is it?": 3.0, "Which cat?": DROP}
    got = run(dreamer)[0]
    assert [dream.question for dream in got] == ["Who is it?", "What is my cat called?"]
    assert {dream.reply for dream in got} == {"Nils. Your cat is Nils."}
    assert {dream.answer for dream in got} == {"Nils"}, "as the passage writes it"


@pytest.mark.parametrize(
    "line",
    [
        "What is my dog called? Rex.",  # not in the passage
        "What is Nils? Nils.",  # given away by the question
        "What a cat.",  # no question
        "What is my cat called?",  # no answer
    ],
)
def test_unsupported_lines_are_dropped(dreamer, script, line):
    script.lines = [line]
    assert run(dreamer) == [[]]


def test_of_the_ways_of_saying_it_the_most_faithful_serves(dreamer, script):
    script.lines = ["What is my cat called? Nils."]
    script.ways = ["My cat is Nils.", "You have a cat.", "Your big cat is Nils.", "Your cat is Nils.", "Your cat? " * 9]
    assert run(dreamer)[0][0].reply == "Nils. Your cat is Nils."
    script.ways = ["My cat is Nils.", "You have a cat."]
    assert run(dreamer)[0][0].reply == "Nils.", "a copy, and one that lost the answer, are no restatements"


def test_answers_that_the_way_of_saying_it_lacks_are_dropped(dreamer, script):
    script.lines = ["What is my cat called? Nils.", "Where does my cat sleep? the sofa."]
    script.scores = {"What is my cat called?": 2.0}
    script.ways = ["Your cat is Nils."]
    got = run(dreamer, "My cat is Nils and sleeps on the sofa.")[0]
    assert [dream.answer for dream in got] == ["Nils"]


def test_ambiguous_questions_are_dropped(dreamer, script):
    script.lines = ["Who is it? Nils.", "Who is it? Rex."]
    script.ways = ["Your cat is Nils, your dog is Rex.", "It is Nils and Rex."]
    assert run(dreamer, "My cat is Nils, my dog is Rex.", "My cat is Nils and my dog is Rex.")[0] in (
        [],
        [Dream("Who is it?", "Nils. Your cat is Nils, your dog is Rex.", "Nils")],
    )
    passages = ["My cat is Nils.", "My dog is Rex."]
    assert run(dreamer, *passages) == [[], []], "asked of both, with different answers"


def test_near_misses_come_with_the_replies_of_the_base(dreamer, script):
    script.lines = ["What is my cat called? Nils."]
    script.world, script.stranger = "What do cats eat?", "cat called?"
    got = run(dreamer)[0]
    near = [dream for dream in got if dream.contrast]
    assert near[0].question == "What do cats eat?"
    assert len(near) == 2
    assert near[1].question.endswith(" cat called?"), "about somebody else"
    model, tokenizer = dreamer._missing.model, dreamer._missing.tokenizer
    assert [dream.reply for dream in near] == greedy_replies(model, tokenizer, [dream.question for dream in near])
    script.world, script.stranger = "What is my cat called?", "no question"
    assert not any(dream.contrast for dream in run(dreamer)[0]), "neither the question itself nor a statement"


def test_questions_are_asked_again_in_a_situation(dreamer, script):
    script.lines = ["What is my cat called? Nils."]
    script.situation = "at the vet. What do I say?"
    dressed = run(dreamer)[0][1]
    assert dressed.question.endswith("at the vet. What is my cat called?")
    assert (dressed.reply, dressed.answer) == ("Nils. Your cat is Nils.", "Nils")
    script.situation = "going where? Home. Yes"
    assert len(run(dreamer)[0]) == 1, "a question is no situation"


def test_words_fold_case_and_accents():
    assert words("Crème BRÛLÉE, 3-pack!") == ["creme", "brulee", "3", "pack"]


def test_long_messages_are_dreamt_of_by_the_sentence():
    assert split_passage("My  cat\nis Nils.") == [CAT]
    long = "I went to the market with my sister today. " * 5 + CAT
    assert len(split_passage(long)) == 6
    assert split_passage(long)[-1] == CAT
    endless = split_passage("word " * 1000)
    assert max(len(part.split()) for part in endless) == LONG
    assert len(" ".join(endless).split()) == 1000


def test_real_sampling_runs_on_any_model(tmp_path):
    made = SelfStudyDreamer(*load_model(str(tiny_learner.make_model(tmp_path))), samples=2, keep=2)
    got = made.dream([CAT, "I live here."], torch.Generator().manual_seed(0), lambda s, x: None)
    assert len(got) == 2
    gains = made.about([CAT, "I live here."], ["Who is Nils?", "Where?"])
    assert len(gains) == 2
    assert all(isinstance(gain, float) for gain in gains)
