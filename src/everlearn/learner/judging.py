"""Judging dreams by likelihood: is the question about the passage, does the passage answer it, does the answer fit?

Nothing here knows a language or a kind of fact: the base model reads the same few-shot list with the passage at its
end, with a passage that says nothing, and with passages about other things.
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
FOILS = tuple(said for said, *_ in prompts.EXAMPLES[::2])  # passages about other things

DROP = float("-inf")


@dataclass(frozen=True)
class Candidate:
    """A question with a short answer, about the passage of that index."""

    passage: int
    question: str
    answer: str


@dataclass(frozen=True)
class Criteria:
    """What a candidate must show, in nats.

    Attributes:
        support: by which the passage must raise the answer's likelihood.
        known: least log-likelihood of the answer after passage and question.
        aboutness: by which the passage must make the question likelier than any other passage does.
        fitness: by which the answer may be less likely a priori than after the passage's best question for it: a name
            is no answer to "How old is she?", whatever the passage says.
    """

    support: float = 3.0
    known: float = -3.0
    aboutness: float = 2.0
    fitness: float = -6.0


class Judge:
    """Scores candidates.

    Args:
        model: the base model, not stacked.
        tokenizer: its tokenizer.
        criteria: what a good one must show.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, criteria: Criteria | None = None
    ) -> None:
        self.tokenizer, self.criteria = tokenizer, criteria or Criteria()
        self._open = Prompt(model, tokenizer, prompts.QUESTION)
        self._blank = Prompt(model, tokenizer, prompts.QUESTION + NEUTRAL)
        self._foils = [Prompt(model, tokenizer, prompts.QUESTION + said) for said in FOILS]

    def scores(self, candidates: Sequence[Candidate], texts: Sequence[str]) -> list[float]:
        """Return a score for each candidate about ``texts[candidate.passage]``, DROP for those that do not pass.

        Of the others the best are those that are most about the passage, that fit the answer and that are easily said.
        """
        if not candidates:
            return []
        asked = [encode(self.tokenizer, f" {c.question}") for c in candidates]
        answered = [encode(self.tokenizer, f" {c.answer}.") for c in candidates]
        both = [torch.cat(pair) for pair in zip(asked, answered, strict=True)]
        heads, arrows = [f"{texts[c.passage]} ->" for c in candidates], [" ->"] * len(candidates)
        seen = self._open.log_likelihood(heads, both)
        blank = self._blank.log_likelihood(arrows, both)
        elsewhere = [[float(x.sum()) for x in foil.log_likelihood(arrows, asked)] for foil in self._foils]
        prior = [float(row[len(q) :].sum()) for row, q in zip(blank, asked, strict=True)]
        best: dict[tuple[int, str], float] = {}
        for c, value in zip(candidates, prior, strict=True):
            key = c.passage, c.answer.casefold()
            best[key] = max(best.get(key, DROP), value)
        scores = []
        for i, (c, q) in enumerate(zip(candidates, asked, strict=True)):
            question, answer = seen[i][: len(q)], float(seen[i][len(q) :].sum())
            others = max(float(blank[i][: len(q)].sum()), *(row[i] for row in elsewhere))
            about, fits = float(question.sum()) - others, prior[i] - best[c.passage, c.answer.casefold()]
            scores.append(self._score(answer, answer - prior[i], about, fits, float(question.mean())))
        return scores

    def _score(self, answer: float, support: float, about: float, fits: float, fluency: float) -> float:
        need = self.criteria
        passes = answer >= need.known and support >= need.support and about >= need.aboutness and fits >= need.fitness
        return min(about, 8.0) / 2 + fits / 2 + 1.5 * fluency if passes else DROP

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the question beside it likelier than one that says nothing."""
        spoken: list[str | Tensor] = [f" {question}" for question in questions]
        known = self._open.log_likelihood([f"{passage} ->" for passage in passages], spoken)
        blank = self._blank.log_likelihood([" ->"] * len(spoken), spoken)
        return [float(a.sum() - b.sum()) for a, b in zip(known, blank, strict=True)]
