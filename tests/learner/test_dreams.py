"""Dreams: what is kept of what the model asks itself."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner.dreams import Dream, SelfStudyDreamer, split_passage, words
from everlearn.learner.voice import greedy_replies
from everlearn.models.hub import load_model


@pytest.fixture
def dreamer(tmp_path, monkeypatch):
    """A dreamer whose model is scripted: what it asks, what it says, and how likely it finds things."""
    made = SelfStudyDreamer(*load_model(str(tiny_learner.make_model(tmp_path))), samples=6, keep=3)
    monkeypatch.setattr(made._missing, "sample", lambda tails, **options: [""] * len(tails))

    def ask(tails, **options):
        lines = SCRIPT["asked"]
        return [lines[index % len(lines)] for index, _ in enumerate(tails)]

    def likelihood(tails, targets):
        passage = SCRIPT["passage"]
        likely = [tail.startswith(passage) for tail in tails]
        return [torch.full((2,), -0.5 if good else -9.0) for good in likely]

    monkeypatch.setattr(made._asking, "sample", ask)
    monkeypatch.setattr(made._asking, "log_likelihood", likelihood)
    monkeypatch.setattr(made._saying, "sample", lambda tails, **options: SCRIPT["said"])
    return made


SCRIPT: dict = {}


def run(dreamer, passage: str, asked: list[str], said: str) -> list[Dream]:
    SCRIPT.update(passage=passage, asked=asked, said=[said])
    return dreamer.dream([passage], torch.Generator().manual_seed(0), lambda stage, share: None)[0]


def test_near_misses_come_with_the_replies_of_the_base(dreamer, monkeypatch):
    near = dreamer._missing
    monkeypatch.setattr(near, "sample", lambda tails, **options: ["What do cats eat?"])
    SCRIPT.update(passage="My cat is Nils.", asked=["What is my cat called? Nils."], said=["Your cat is Nils."])
    got = dreamer.dream(["My cat is Nils."], torch.Generator(), lambda stage, share: None)[0]
    monkeypatch.setattr(near, "sample", lambda tails, **options: ["What is my cat called?"])
    same = dreamer.dream(["My cat is Nils."], torch.Generator(), lambda stage, share: None)[0]
    assert not any(dream.contrast for dream in same), "a near miss that is the question itself is none"
    assert [(dream.question, dream.contrast) for dream in got] == [
        ("What is my cat called?", False),
        ("What do cats eat?", True),
    ]
    model, tokenizer = near.model, near.tokenizer
    assert got[1].reply == greedy_replies(model, tokenizer, ["What do cats eat?"])[0]


def test_supported_questions_are_kept_once_and_answered_with_the_passage(dreamer):
    asked = ["What is my cat called? Nils.", "what is my cat called? Nils.", "Who is it? Nils."]
    got = run(dreamer, "My cat is Nils.", asked, "Your cat is Nils.")
    assert [dream.question for dream in got] == ["What is my cat called?", "Who is it?"]
    assert {dream.reply for dream in got} == {"Your cat is Nils."}
    assert {dream.answer for dream in got} == {"Nils"}


@pytest.mark.parametrize(
    "line",
    [
        "What is my dog called? Rex.",  # not in the passage
        "Is Nils my cat? Nils.",  # given away by the question
        "My cat is Nils.",  # no question
        "What is my cat called?",  # no answer
    ],
)
def test_unsupported_lines_are_dropped(dreamer, line):
    assert run(dreamer, "My cat is Nils.", [line], "Your cat is Nils.") == []


def test_an_unhelpful_passage_gives_nothing(dreamer, monkeypatch):
    monkeypatch.setattr(dreamer._asking, "log_likelihood", lambda tails, targets: [torch.full((2,), -0.5)] * len(tails))
    assert run(dreamer, "My cat is Nils.", ["What is my cat called? Nils."], "Your cat is Nils.") == []


def test_a_restatement_that_lost_the_answer_is_not_used(dreamer):
    got = run(dreamer, "My cat is Nils.", ["What is my cat called? Nils."], "You have a cat.")
    assert [dream.reply for dream in got] == ["Nils."]


def test_ambiguous_questions_are_dropped(dreamer):
    asked = ["Who is it? Nils."] * 6 + ["Who is it? Rex."] * 6
    SCRIPT.update(passage="My", asked=asked, said=["a Nils", "b Rex"])
    passages = ["My cat is Nils, my dog is Rex.", "My cat is Nils and my dog is Rex."]
    assert dreamer.dream(passages, torch.Generator(), lambda stage, share: None) == [[], []]


def test_words_fold_case_and_accents():
    assert words("Crème BRÛLÉE, 3-pack!") == ["creme", "brulee", "3", "pack"]


def test_long_messages_are_dreamt_of_by_the_sentence():
    assert split_passage("My  cat\nis Nils.") == ["My cat is Nils."]
    long = "I went to the market with my sister today. " * 5 + "My cat is called Nils."
    assert len(split_passage(long)) == 6
    assert split_passage(long)[-1] == "My cat is called Nils."


def test_real_sampling_runs_on_any_model(tmp_path):
    made = SelfStudyDreamer(*load_model(str(tiny_learner.make_model(tmp_path))), samples=2, keep=2)
    got = made.dream(["My cat is Nils.", "I live here."], torch.Generator().manual_seed(0), lambda s, x: None)
    assert len(got) == 2
    gains = made.about(["My cat is Nils.", "I live here."], ["Who is Nils?", "Where?"])
    assert len(gains) == 2
    assert all(isinstance(gain, float) for gain in gains)
