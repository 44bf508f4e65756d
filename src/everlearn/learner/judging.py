"""Judging dreams by likelihood: is the question about the passage, does the passage answer it, does the answer fit?

Nothing here knows a language or a kind of fact: the base model reads the same few-shot list with the passage at its
end, with a passage that says nothing, with passages about other things, and with its questions turned on the one who is
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner import prompts
from everlearn.learner.sampling import Prompt, encode

NEUTRAL = "I had a long day."  # the passage that says nothing, against which support is measured
FOILS = tuple(said for said, *_ in prompts.EXAMPLES[::3])  # passages about other things

DROP = float("-inf")


@dataclass(frozen=True)
class Criteria:
    """What a question must show, in nats.

    Attributes:
        support: by which the passage must raise the answer's likelihood.
        least: least log-likelihood of the answer after passage and question.
        known: the same, beside that after the best question.
        aboutness: by which the passage must make the question likelier than one that says nothing does, and than any
            about something else.
        own: by which it must be likelier asked by the one who told it than asked back.
        fitness: by which the answer may be less likely a priori than after the passage's best question for it: a name
            is no answer to "How old is she?", whatever the passage says.
    """

    support: float = 3.0
    least: float = -6.0
    known: float = -3.0
    aboutness: float = 2.0
    own: float = 0.0
    fitness: float = -9.0


@dataclass(frozen=True)
class _Marks:
    """Of a question, in nats: its answer with and without the passage, and the question itself."""

    asked: float
    known: float
    prior: float
    about: float
    fluency: float


def _marks(asked: int, seen: Tensor, blank: Tensor) -> _Marks:
    """Read the log-likelihoods of a question's ``asked`` tokens and of its answer's after them."""
    question = seen[:asked].sum()
    return _Marks(
        asked=float(question),
        known=float(seen[asked:].sum()),
        prior=float(blank[asked:].sum()),
        about=float(question - blank[:asked].sum()),
        fluency=float(question) / asked,
    )


class Judge:
    """Scores questions.

    Args:
        model: the base model, not stacked.
        tokenizer: its tokenizer.
        criteria: what a good one must show.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, criteria: Criteria | None = None
    ) -> None:
        self.model, self.tokenizer, self.criteria = model, tokenizer, criteria or Criteria()
        self._open = Prompt(model, tokenizer, prompts.QUESTION)
        self._neutral = Prompt(model, tokenizer, prompts.QUESTION + NEUTRAL)
        self._blank = Prompt(model, tokenizer, prompts.ASKED + NEUTRAL)
        self._foils = [Prompt(model, tokenizer, prompts.ASKED + said) for said in FOILS]

    def scores(self, text: str, answer: str, questions: Sequence[str]) -> list[float]:
        """Return a score for each question about ``text`` with that answer, DROP for those that do not pass.

        Of the others the best are those that are most about the passage, that fit the answer and that are easily said.
        """
        if not questions:
            return []
        asked = [encode(self.tokenizer, f" {question}") for question in questions]
        both = [torch.cat([question, encode(self.tokenizer, f" {answer}.")]) for question in asked]
        seen = self._likelihoods(Prompt(self.model, self.tokenizer, prompts.ASKED + text), both)
        blank = self._likelihoods(self._blank, both)
        marks = [
            _marks(len(question), *rows) for question, rows in zip(asked, zip(seen, blank, strict=True), strict=True)
        ]
        told = [index for index, mark in enumerate(marks) if self._told(mark)]
        back = self._back(text, [asked[index] for index in told])
        own = [i for i, other in zip(told, back, strict=True) if marks[i].asked - other >= self.criteria.own]
        elsewhere = self._elsewhere([asked[index] for index in own])
        about = [
            i for i, other in zip(own, elsewhere, strict=True) if marks[i].asked - other >= self.criteria.aboutness
        ]
        passing = {index: marks[index] for index in about}
        known = max((mark.known for mark in passing.values()), default=0.0)
        prior = max((mark.prior for mark in passing.values()), default=0.0)
        scores = [DROP] * len(marks)
        for index, mark in passing.items():
            scores[index] = self._score(mark, mark.known - known, mark.prior - prior)
        return scores

    def _told(self, mark: _Marks) -> bool:
        need, support = self.criteria, mark.known - mark.prior
        return mark.about >= need.aboutness and support >= need.support and mark.known >= need.least

    def _back(self, text: str, asked: Sequence[Tensor]) -> list[float]:
        """Return how likely each question is after the passage where the one who was told asks back."""
        if not asked:
            return []
        prompt = Prompt(self.model, self.tokenizer, prompts.ASKED_BACK + text)
        return [float(row.sum()) for row in self._likelihoods(prompt, asked)]

    def _elsewhere(self, asked: Sequence[Tensor]) -> list[float]:
        """Return how likely each question is after the passage about something else that makes it likeliest."""
        rows = [[float(row.sum()) for row in self._likelihoods(foil, asked)] for foil in self._foils if asked]
        return [max(found) for found in zip(*rows, strict=True)]

    def _score(self, mark: _Marks, known: float, fits: float) -> float:
        if known < self.criteria.known or fits < self.criteria.fitness:
            return DROP
        return min(mark.about, 8.0) / 2 + fits / 2 + 1.5 * mark.fluency

    def _likelihoods(self, prompt: Prompt, targets: Sequence[Tensor]) -> list[Tensor]:
        return prompt.log_likelihood([" ->"] * len(targets), targets)

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the question beside it likelier than one that says nothing."""
        spoken: list[str | Tensor] = [f" {question}" for question in questions]
        known = self._open.log_likelihood([f"{passage} ->" for passage in passages], spoken)
        blank = self._neutral.log_likelihood([" ->"] * len(spoken), spoken)
        return [float(a.sum() - b.sum()) for a, b in zip(known, blank, strict=True)]

    def follows(self, passages: Sequence[str], later: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the ``later`` one likelier than one that says nothing does."""
        spoken = [f" {text}" for text in later]
        known, blank = (self._open.log_likelihood(heads, spoken) for heads in (passages, [NEUTRAL] * len(spoken)))
        return [float(a.sum() - b.sum()) for a, b in zip(known, blank, strict=True)]

    def rather(
        self, passages: Sequence[str], questions: Sequence[str], ones: Sequence[str], others: Sequence[str]
    ) -> list[float]:
        """Return by how many nats each passage answers the question beside it rather by ``ones`` than by ``others``."""
        heads = [f"{passage} -> {question}" for passage, question in zip(passages, questions, strict=True)]
        one, other = (
            self._open.log_likelihood(heads, [f" {answer}." for answer in answers]) for answers in (ones, others)
        )
        return [float(a.sum() - b.sum()) for a, b in zip(one, other, strict=True)]
