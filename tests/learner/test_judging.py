"""The judge: each criterion alone decides, by likelihoods that a scripted model gives."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner import judging, prompts
from everlearn.learner.judging import DROP, NEUTRAL, Criteria, Judge
from everlearn.models.hub import load_model

CAT = "My cat is Nils."
GOOD = "What is my cat called?"


@pytest.fixture
def judge(tmp_path):
    return Judge(*load_model(str(tiny_learner.make_model(tmp_path))))


def scripted(
    judge, monkeypatch, *, known=-0.2, prior=-9.0, question=-4.0, blank=-14.0, back=-7.0, priors=None, knowns=None
):
    """Let the model give these log-likelihoods (sums) to question and answer, with and without the passage."""
    priors, knowns = priors or {}, knowns or {}

    def row(text, asked, answered):
        said = judge.tokenizer.decode(text)
        n = len(judge.tokenizer(f" {said.partition('?')[0].strip()}?", add_special_tokens=False).input_ids)
        return torch.cat([torch.full((n,), asked / n), torch.full((len(text) - n,), answered / max(len(text) - n, 1))])

    class Scripted:
        def __init__(self, model, tokenizer, text):
            self.asked, self.answered = (back, 0.0) if text == prompts.ASKED_BACK + CAT else (question, known)
            assert text in (prompts.ASKED_BACK + CAT, prompts.ASKED + CAT)

        def log_likelihood(self, tails, targets):
            said = [judge.tokenizer.decode(target) for target in targets]
            own = [next((value for part, value in knowns.items() if part in text), self.answered) for text in said]
            return [row(target, self.asked, value) for target, value in zip(targets, own, strict=True)]

    def without(tails, targets):
        said = [judge.tokenizer.decode(target) for target in targets]
        own = [next((value for part, value in priors.items() if part in text), prior) for text in said]
        return [row(target, blank, value) for target, value in zip(targets, own, strict=True)]

    monkeypatch.setattr(judging, "Prompt", Scripted)
    monkeypatch.setattr(judge._blank, "log_likelihood", without)


def test_a_supported_fitting_question_about_the_passage_passes(judge, monkeypatch):
    scripted(judge, monkeypatch)
    assert judge.scores(CAT, "Nils", [GOOD])[0] > DROP
    assert judge.scores(CAT, "Nils", []) == []


@pytest.mark.parametrize(
    "likelihoods",
    [
        {"known": -7.0},  # the passage does not say it
        {"known": -7.0, "prior": -29.0},  # as little likely as that, however much more so than without it
        {"prior": -2.0},  # known without the passage
        {"blank": -5.0},  # asked as readily of nothing
        {"back": -2.0},  # rather asked of the one who told it
    ],
)
def test_each_criterion_drops(judge, monkeypatch, likelihoods):
    scripted(judge, monkeypatch, **likelihoods)
    assert judge.scores(CAT, "Nils", [GOOD]) == [DROP]


def test_a_question_that_another_passage_makes_as_likely_drops(judge, monkeypatch):
    scripted(judge, monkeypatch)
    kept = judge.scores(CAT, "Nils", [GOOD])[0]
    monkeypatch.setattr(judge, "_elsewhere", lambda asked: [0.0 for _ in asked])
    assert kept > judge.scores(CAT, "Nils", [GOOD])[0] == DROP


def test_an_answer_must_fit_its_question(judge, monkeypatch):
    """Far less likely a priori than after the passage's best question for it: another kind of answer is wanted."""
    odd = "How old is my cat?"
    scripted(judge, monkeypatch, priors={"called": -9.0, "old": -29.0})
    good, bad = judge.scores(CAT, "Nils", [GOOD, odd])
    assert good > bad == DROP
    assert judge.scores(CAT, "Nils", [odd])[0] > DROP, "compared with the questions at hand alone"


def test_a_question_that_does_not_pass_is_no_measure_of_fit(judge, monkeypatch):
    scripted(judge, monkeypatch, priors={"called": -19.0, "Nils it": -0.1})
    assert judge.scores(CAT, "Nils", [GOOD, "Is Nils it?"])[0] > DROP


def test_the_more_fitting_comes_first(judge, monkeypatch):
    scripted(judge, monkeypatch, priors={"called": -9.0, "home": -12.0})
    good, less = judge.scores(CAT, "Nils", [GOOD, "Who is it at home?"])
    assert good > less > DROP


def test_the_passage_must_answer_it_about_as_well_as_the_best(judge, monkeypatch):
    """A long answer is less likely than a short one, so each question is compared with the others."""
    scripted(judge, monkeypatch, known=-5.0, knowns={"home": -8.5})
    good, bad = judge.scores(CAT, "Nils", [GOOD, "Who is it at home?"])
    assert good > bad == DROP


def test_criteria_are_settings(tmp_path, monkeypatch):
    lax = Judge(*load_model(str(tiny_learner.make_model(tmp_path))), Criteria(support=1.0, least=-8.0))
    scripted(lax, monkeypatch, known=-7.0)
    assert lax.scores(CAT, "Nils", [GOOD])[0] > DROP


def test_follows_is_a_difference_of_likelihoods(judge):
    passages, later = [CAT, "I live by the sea."], ["Nils is fat.", "We moved."]
    got = judge.follows(passages, later)
    for passage, text, gain in zip(passages, later, got, strict=True):
        known = judge._open.log_likelihood([passage], [f" {text}"])[0].sum()
        blank = judge._open.log_likelihood([NEUTRAL], [f" {text}"])[0].sum()
        assert gain == pytest.approx(float(known - blank), abs=1e-2)


def test_about_is_a_difference_of_likelihoods(judge):
    passages, questions = [CAT, "I live by the sea."], ["Who is Nils?", "Where do I live?"]
    got = judge.about(passages, questions)
    for passage, question, gain in zip(passages, questions, got, strict=True):
        spoken = [f" {question}"]
        known = judge._open.log_likelihood([f"{passage} ->"], spoken)[0].sum()
        blank = judge._open.log_likelihood([f"{NEUTRAL} ->"], spoken)[0].sum()
        assert gain == pytest.approx(float(known - blank), abs=1e-2)
