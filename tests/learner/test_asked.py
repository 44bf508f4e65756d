"""What people ask of their own lives: which of their questions a message answers."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner import asked
from everlearn.learner.asked import COMMON, LIKE, Bank, Candidate, Fit, best_fits, load_kinds
from everlearn.learner.practice import Practice
from everlearn.learner.texts import words
from everlearn.models.hub import load_model

KINDS = load_kinds()


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLEARN_CACHE", str(folder / "cache"))
        parts = load_model(str(tiny_learner.make_model(folder)))
        bank = Bank(*parts, Practice(*parts))
        bank.candidates(["My cat is Nils."])  # read what is kept
        yield bank


def test_every_kind_is_asked_for_in_four_ways_and_no_question_is_of_two_kinds():
    assert len(KINDS) > COMMON + LIKE
    assert all(len(kind.ask) == 4 for kind in KINDS)
    assert all(kind.ask[0].endswith("?") for kind in KINDS)
    plain = [tuple(words(kind.ask[0])) for kind in KINDS]
    assert len(set(plain)) == len(plain)
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


def test_common_kinds_and_those_most_like_the_message_are_read(bank, monkeypatch):
    read = []
    monkeypatch.setattr(bank, "_asked", lambda context, near: read.append((context, near)) or [])
    like = torch.zeros(2, len(KINDS))
    like[0, :COMMON] = 9.0  # common ones are read anyway
    like[0, 100 : 100 + LIKE] = 5.0
    like[1, 200 : 200 + LIKE] = 5.0
    monkeypatch.setattr(bank, "_like", lambda texts: like)
    assert bank.candidates(["a", "b"]) == [[], []]
    common = set(range(COMMON))
    assert [(context, set(near)) for context, near in read] == [
        ("a", common | set(range(100, 100 + LIKE))),
        ("b", common | set(range(200, 200 + LIKE))),
    ]
    assert bank.candidates([]) == []


def test_a_message_is_most_like_what_is_asked_in_its_words(bank):
    at = next(i for i, kind in enumerate(KINDS) if kind.kind == "my allergy")
    (row,) = bank._like([KINDS[at].ask[0]])
    assert int(row.argmax()) == at


def test_the_questions_that_follow_a_message_best_are_answered(bank, monkeypatch):
    near = [0, 5, 9]
    monkeypatch.setattr(asked, "ANSWERED", 2)
    monkeypatch.setattr(bank, "_anyway", torch.zeros(len(KINDS)))
    shown = Shown({KINDS[0].ask[0]: -3.0, KINDS[5].ask[0]: -1.0, KINDS[9].ask[0]: -2.0}, bank.tokenizer)
    monkeypatch.setattr(asked, "Prompt", shown)
    got = bank._asked("Nils purrs.", near)
    assert [one.kind for one in got] == [KINDS[5], KINDS[9]]
    assert [one.guess for one in got] == [f"answer to {KINDS[5].ask[0]}", f"answer to {KINDS[9].ask[0]}"]


@pytest.mark.parametrize(
    ("likely", "next_", "anyway", "found"),
    [
        (-0.5, -0.6, -200.0, True),
        (-1.7, -1.8, -200.0, False),  # neither sure nor ahead
        (-1.7, -2.2, -200.0, True),  # ahead of the next
        (-4.0, -9.0, -200.0, False),  # too unlikely
        (-0.5, -9.0, -3.0, False),  # as likely when nothing was read
    ],
)
def test_the_question_is_the_one_that_the_answer_suits_best_if_any(bank, monkeypatch, likely, next_, anyway, found):
    some = [Candidate(KINDS[i], anyway, "") for i in (0, 5)]
    shown = Shown({KINDS[0].ask[0]: next_, KINDS[5].ask[0]: likely}, bank.tokenizer)
    monkeypatch.setattr(asked, "Prompt", shown)
    monkeypatch.setattr(asked, "GAIN", 0.0)
    fit = bank.fitting("Nils purrs.", "Nils", some)
    assert (fit is not None) == found
    if fit:
        assert (fit.kind, fit.answer) == (KINDS[5], "Nils")
        assert fit.score == pytest.approx(asked.EASE * likely)
    assert bank.fitting("Nils purrs.", "Nils", []) is None


def test_what_is_likely_anyway_gains_nothing(bank, monkeypatch):
    some = [Candidate(KINDS[0], -1.0, ""), Candidate(KINDS[5], -90.0, "")]
    shown = Shown({KINDS[0].ask[0]: -1.0, KINDS[5].ask[0]: -1.0}, bank.tokenizer)
    monkeypatch.setattr(asked, "Prompt", shown)
    assert bank.fitting("Nils purrs.", "Nils", some).kind == KINDS[5]


@pytest.mark.parametrize("count", [0, 3, COMMON + 2])
def test_kinds_may_be_few_and_ones_own(bank, count):
    own = Bank(bank.model, bank.tokenizer, bank._practice, KINDS[5 : 5 + count])
    (found,) = own.candidates(["My cat is Nils."])
    assert len(found) == min(count, asked.ANSWERED)
    assert {one.kind for one in found} <= set(KINDS[5 : 5 + count])


def test_one_question_has_one_answer():
    fits = [Fit(-2.0, KINDS[0], "Nils"), Fit(-1.0, KINDS[0], "Bo"), Fit(-5.0, KINDS[1], "nurse")]
    assert best_fits(fits) == {KINDS[0].kind: fits[1], KINDS[1].kind: fits[2]}
    assert best_fits([]) == {}


class Shown:
    """Stands for prompts: every token of a question has the same likelihood, those of an answer 0."""

    def __init__(self, likely: dict[str, float], tokenizer) -> None:
        self.likely, self.tokenizer = likely, tokenizer

    def __call__(self, model, tokenizer, text):
        return self

    def log_likelihood(self, tails, targets):
        return [self._row(target) for target in targets]

    def _row(self, target):
        text = self.tokenizer.decode(target).strip()
        question = next(one for one in self.likely if text.startswith(one))
        asked = len(self.tokenizer(f" {question}", add_special_tokens=False).input_ids)
        return torch.cat([torch.full((asked,), self.likely[question]), torch.zeros(len(target) - asked)])

    def sample(self, tails, **options):
        return [f"answer to {tail.removeprefix(' -> ')}" for tail in tails]
