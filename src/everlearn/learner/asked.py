"""What people ask of their own lives: a bank of questions, and which of them a message answers.

A small model asks badly and reads well. It need not make up "What's my sister's name?" where it can find, among
questions that anybody may ask, those that a message answers: the ones that are likely after the message and its answer,
and to which, after the message, that is the likely answer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner import prompts
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.practice import Practice, kept, standardised
from everlearn.learner.sampling import Prompt, encode
from everlearn.learner.words import learn_words, read_gists
from everlearn.memories.gist import Gist

COMMON = 19  # kinds, the first ones, whose plain question is read after every message: any may tell of them
LIKE = 20  # others of which it is read: those that are most like the message in words or sense
SHARP = 8.0  # of the softmax over practice that lies between a message and what is asked of it
BETWEEN = 3.0  # what that counts for
ANSWERED = 8  # of those, which the model answers
EASE = 4.0  # what a question's mean log-likelihood a token counts for, in nats
GAIN = 0.25  # share of the nats by which it becomes likelier that counts
LEAST = -8.5  # a kind's score with an answer, for it to be asked for that
SURE = -5.5  # below which it must lead
LEAD = 1.0  # by so much over the next kind
WELL = -4.0  # from which it asks well: few others are sampled then, and later answers that it suits less have others
GAINED = 1.0  # nats by which its plain question must become likelier


@dataclass(frozen=True)
class Kind:
    """A kind of thing that one can know of somebody's life.

    Attributes:
        kind: its name.
        ask: questions for it, by the one whose life it is: plain, in other words, as a request, and from a situation.
    """

    kind: str
    ask: tuple[str, str, str, str]


@functools.lru_cache(maxsize=1)
def load_kinds() -> tuple[Kind, ...]:
    """Return the kinds of question that come with the package."""
    lines = resources.files("everlearn.learner").joinpath("asked.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Kind(row["kind"], tuple(row["ask"])) for row in map(json.loads, lines))


@dataclass(frozen=True)
class Candidate:
    """A kind of question that a message may answer.

    Attributes:
        kind: it.
        anyway: log-likelihood of its plain question, no message read.
        guess: what the model answers to it after the message.
    """

    kind: Kind
    anyway: float
    guess: str


class Fit(NamedTuple):
    """That a kind of question asks for an answer, and how well (nats)."""

    score: float
    kind: Kind
    answer: str


def asks_well(score: float | None) -> bool:
    """Whether a question of that score, if it is a usual one, asks well for its answer."""
    return score is not None and score >= WELL


def best_fits(fits: Iterable[Fit]) -> dict[str, Fit]:
    """Return the best of the ``fits`` of each kind of question: one question has one answer."""
    return {fit.kind.kind: fit for fit in sorted(fits, key=lambda fit: fit.score)}


class Bank:
    """Finds the questions that a message answers.

    Args:
        model: the base model, not stacked.
        tokenizer: its tokenizer.
        practice: whose reading of texts is used.
        kinds: of question; the first ``COMMON`` are tried with every message. None: those of the package.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        practice: Practice,
        kinds: Sequence[Kind] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.kinds = load_kinds() if kinds is None else tuple(kinds)
        self._practice = practice
        self._plain = [encode(tokenizer, f" {kind.ask[0]}") for kind in self.kinds]

    def candidates(self, contexts: Sequence[str]) -> list[list[Candidate]]:
        """Return for each message the kinds of question that it may answer, the likeliest first."""
        if not contexts or not self.kinds:
            return [[] for _ in contexts]
        like = self._like(contexts)[:, COMMON:]
        others = COMMON + like.topk(min(LIKE, like.shape[1])).indices
        return [
            self._asked(context, [*range(min(COMMON, len(self.kinds))), *some])
            for context, some in zip(contexts, others.tolist(), strict=True)
        ]

    def fitting(self, context: str, answer: str, candidates: Sequence[Candidate]) -> Fit | None:
        """Return which of the ``candidates`` asks best for ``answer`` in ``context``, if any does."""
        if not candidates:
            return None
        plain = [encode(self.tokenizer, f" {one.kind.ask[0]}") for one in candidates]
        told = [torch.cat([question, encode(self.tokenizer, f" {answer}.")]) for question in plain]
        knowing = Prompt(self.model, self.tokenizer, prompts.ANSWER_FIRST + context)
        asked = knowing.log_likelihood([f" -> {answer}:"] * len(plain), plain)
        said = Prompt(self.model, self.tokenizer, prompts.QUESTION + context).log_likelihood([" ->"] * len(told), told)
        found = [
            (_likely(row, one.anyway) + float(reply[len(row) :].sum()), float(row.sum()) - one.anyway, one.kind)
            for one, row, reply in zip(candidates, asked, said, strict=True)
        ]
        (score, gain, kind), *others = sorted(found, key=lambda one: -one[0])
        lead = score - others[0][0] if others else LEAD
        fits = gain >= GAINED and score >= LEAST and (score >= SURE or lead >= LEAD)
        return Fit(score, kind, answer) if fits else None

    def _asked(self, context: str, near: Sequence[int]) -> list[Candidate]:
        """Return the ``ANSWERED`` of the kinds ``near`` whose plain question follows ``context`` best."""
        prompt = Prompt(self.model, self.tokenizer, prompts.QUESTION + context)
        rows = prompt.log_likelihood([" ->"] * len(near), [self._plain[i] for i in near])
        scores = [_likely(row, float(self._anyway[i])) for i, row in zip(near, rows, strict=True)]
        best = [near[k] for k in sorted(range(len(near)), key=lambda k: -scores[k])[:ANSWERED]]
        heads = [f" -> {self.kinds[i].ask[0]}" for i in best]
        guesses = prompt.sample(heads, max_new_tokens=12, generator=torch.Generator(), temperature=0)
        return [Candidate(self.kinds[i], float(self._anyway[i]), guess) for i, guess in zip(best, guesses, strict=True)]

    def _like(self, texts: Sequence[str]) -> Tensor:
        """Return how like each text is to each kind of question.

        In its words to all questions of that kind and in sense to the plain one; and how like it is in sense to what
        such plain questions are asked of in practice.
        """
        words, gists, senses, practised = self._places
        read = self._practice.placed(texts)
        told = F.normalize(read_gists(self.model, self.tokenizer, words, texts), dim=-1)
        between = (SHARP * self._practice.likeness(read)).softmax(-1) @ practised
        return told @ gists.T + read @ senses.T + BETWEEN * between

    @functools.cached_property
    def _anyway(self) -> Tensor:
        """Return the log-likelihoods of the plain questions, no message read, as kept in the user's cache folder."""

        def read() -> Tensor:
            prompt = Prompt(self.model, self.tokenizer, prompts.QUESTION + NEUTRAL)
            rows = prompt.log_likelihood([" ->"] * len(self._plain), self._plain)
            return torch.stack([row.sum() for row in rows])

        return kept(self.model, [prompts.QUESTION + NEUTRAL, *map(Tensor.tolist, self._plain)], read)

    @functools.cached_property
    def _places(self) -> tuple[Gist, Tensor, Tensor, Tensor]:
        """Return what reads words, and where the kinds are: by that, in sense, and beside practice's questions."""
        practice, every = self._practice, [" ".join(kind.ask) for kind in self.kinds]
        words = Gist(cast(int, self.model.config.get_text_config().hidden_size))
        words.fill(learn_words(self.model, self.tokenizer, [*(r.said for r in practice.records), *every]))
        gists = F.normalize(read_gists(self.model, self.tokenizer, words, every), dim=-1)
        asked = practice.read([record.questions[0] for record in practice.records])
        plain = practice.read([kind.ask[0] for kind in self.kinds])
        senses = standardised(plain, plain)
        return words, gists, senses, standardised(asked, asked) @ senses.T


def _likely(row: Tensor, anyway: float) -> float:
    """Score a question by the log-likelihood of its tokens, and by what it gains."""
    return EASE * float(row.mean()) + GAIN * (float(row.sum()) - anyway)
