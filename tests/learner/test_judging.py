"""The judge: each criterion alone decides, by likelihoods that a scripted model gives."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner.judging import DROP, NEUTRAL, Candidate, Criteria, Judge
from everlearn.models.hub import load_model

CAT = "My cat is Nils."
GOOD = Candidate(0, "What is my cat called?", "Nils")


@pytest.fixture
def judge(tmp_path):
    return Judge(*load_model(str(tiny_learner.make_model(tmp_path))))


def scripted(judge, monkeypatch, *, known=-0.2, prior=-9.0, question=-4.0, blank=-14.0, foil=-14.0, priors=None):
    """Let the model give these log-likelihoods (sums) to question and answer, with and without the passage."""
    priors = priors or {}

    def row(text, asked, answered):
        said = judge.tokenizer.decode(text)
        n = len(judge.tokenizer(f" {said.partition('?')[0].strip()}?", add_special_tokens=False).input_ids)
        return torch.cat([torch.full((n,), asked / n), torch.full((len(text) - n,), answered / max(len(text) - n, 1))])

    def likelihood(asked, answered):
        def compute(tails, targets):
            rows = []
            for target in targets:
                said = judge.tokenizer.decode(target)
                own = next((value for part, value in priors.items() if part in said), answered)
                rows.append(row(target, asked, own if answered == prior else answered))
            return rows

        return compute

    monkeypatch.setattr(judge._open, "log_likelihood", likelihood(question, known))
    monkeypatch.setattr(judge._blank, "log_likelihood", likelihood(blank, prior))
    for other in judge._foils:
        monkeypatch.setattr(other, "log_likelihood", likelihood(foil, 0.0))


def test_a_supported_fitting_question_about_the_passage_passes(judge, monkeypatch):
    scripted(judge, monkeypatch)
    assert judge.scores([GOOD], [CAT])[0] > DROP
    assert judge.scores([], []) == []


@pytest.mark.parametrize(
    "likelihoods",
    [
        {"known": -4.0},  # the passage does not say it
        {"prior": -2.0},  # known without the passage
        {"blank": -5.0},  # asked as readily of nothing
        {"foil": -5.0},  # asked as readily of something else
    ],
)
def test_each_criterion_drops(judge, monkeypatch, likelihoods):
    scripted(judge, monkeypatch, **likelihoods)
    assert judge.scores([GOOD], [CAT]) == [DROP]


def test_an_answer_must_fit_its_question(judge, monkeypatch):
    """Far less likely a priori than after the passage's best question for it: another kind of answer is wanted."""
    odd = Candidate(0, "How old is my cat?", "Nils")
    scripted(judge, monkeypatch, priors={"called": -9.0, "old": -17.0})
    good, bad = judge.scores([GOOD, odd], [CAT])
    assert good > bad == DROP
    assert judge.scores([odd], [CAT])[0] > DROP, "compared within the passage's own questions alone"


def test_the_more_fitting_comes_first(judge, monkeypatch):
    other = Candidate(0, "Who is it at home?", "Nils")
    scripted(judge, monkeypatch, priors={"called": -9.0, "home": -12.0})
    good, less = judge.scores([GOOD, other], [CAT])
    assert good > less > DROP


def test_criteria_are_settings(tmp_path, monkeypatch):
    lax = Judge(*load_model(str(tiny_learner.make_model(tmp_path))), Criteria(known=-5.0))
    scripted(lax, monkeypatch, known=-4.0)
    assert lax.scores([GOOD], [CAT])[0] > DROP


def test_about_is_a_difference_of_likelihoods(judge):
    passages, questions = [CAT, "I live by the sea."], ["Who is Nils?", "Where do I live?"]
    got = judge.about(passages, questions)
    for passage, question, gain in zip(passages, questions, got, strict=True):
        spoken = [f" {question}"]
        known = judge._open.log_likelihood([f"{passage} ->"], spoken)[0].sum()
        blank = judge._open.log_likelihood([f"{NEUTRAL} ->"], spoken)[0].sum()
        assert gain == pytest.approx(float(known - blank), abs=1e-2)
