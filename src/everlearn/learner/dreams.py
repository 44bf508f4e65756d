"""Dreaming: from a passage the base model makes the questions a user may ask later, and says what it was told.

Nothing here knows a language or a kind of fact. A question is kept when the model, with the passage before it, finds
an answer in the passage's own words that it would not give without it (support), and when the question itself becomes
likelier with the passage (it is about it). What is learned as the reply is the passage as the assistant would say it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner import prompts
from everlearn.learner.judging import DROP, Candidate, Criteria, Judge
from everlearn.learner.sampling import Prompt
from everlearn.learner.voice import greedy_replies

LONG = 40  # words; a longer message is dreamt of sentence by sentence
RETOLD = 2  # ways of saying a passage that are sampled beside the likeliest

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Dream:
    """A self-study example: what may be asked, what is to be said, and the words that matter (none: a contrast)."""

    question: str
    reply: str
    answer: str

    @property
    def contrast(self) -> bool:
        """Whether this is a near miss, whose reply is the base's own: what must not be answered with what was told."""
        return not self.answer

    def payload(self) -> dict[str, Any]:
        """Return the dream as JSON, for the store."""
        return asdict(self)


class Dreamer(Protocol):
    """Makes dreams: for each passage a list, best first; an empty list means that nothing in it can be learned."""

    def dream(self, passages: Sequence[str], generator: torch.Generator, progress: Progress) -> list[list[Dream]]: ...

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]: ...


class SelfStudyDreamer:
    """Dreams by few-shot continuation and judges by likelihood.

    Args:
        model: the base model, not stacked: dreams do not depend on what was learned before.
        tokenizer: its tokenizer.
        samples: questions sampled for each passage; one left with fewer than half of ``keep`` gets a second round.
        keep: the most dreams kept of a passage.
        temperature: of the sampling.
        criteria: what a question must show to be kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples: int = 24,
        keep: int = 8,
        temperature: float = 0.7,
        criteria: Criteria | None = None,
    ) -> None:
        self.samples, self.keep, self.temperature = samples, keep, temperature
        self._judge = Judge(model, tokenizer, criteria)
        self._asking = Prompt(model, tokenizer, prompts.QUESTION)
        self._saying = Prompt(model, tokenizer, prompts.RESTATEMENT)
        self._missing = Prompt(model, tokenizer, prompts.NEAR_MISS)

    def dream(self, passages: Sequence[str], generator: torch.Generator, progress: Progress) -> list[list[Dream]]:
        """Return the dreams of each passage, best first."""
        pieces = [(index, piece) for index, passage in enumerate(passages) for piece in split_passage(passage)]
        texts = [piece for _, piece in pieces]
        progress("dreaming", 0.0)
        restated = self._restate(texts, generator)
        progress("dreaming", 0.2)
        kept = self._ask(texts, list(range(len(texts))), generator)
        progress("dreaming", 0.7)
        poor = [index for index, found in enumerate(kept) if len(found) < self.keep / 2]
        if poor:
            for index, found in zip(poor, self._ask(texts, poor, generator), strict=True):
                kept[index] = _distinct([*kept[index], *found])
        kept = _unambiguous(kept)
        dreams: list[list[Dream]] = [[] for _ in passages]
        for (index, text), found, said in zip(pieces, kept, restated, strict=True):
            dreams[index] += [Dream(q, _reply(said, text, a), a) for q, a in found[: self.keep]]
        self._add_contrasts(passages, dreams, generator)
        progress("dreaming", 1.0)
        return dreams

    def _add_contrasts(self, passages: Sequence[str], dreams: list[list[Dream]], generator: torch.Generator) -> None:
        """Add to each passage's dreams a near miss, a question about the world in its words, with the base's reply."""
        which = [index for index, found in enumerate(dreams) if found]
        made = self._missing.sample(
            [f"{split_passage(passages[index])[0]} ->" for index in which],
            max_new_tokens=24,
            generator=generator,
            temperature=0.5,
        )
        own = {tuple(words(dream.question)) for found in dreams for dream in found}
        near = [(index, q) for index, q in zip(which, made, strict=True) if q and tuple(words(q)) not in own]
        replies = greedy_replies(self._asking.model, self._asking.tokenizer, [question for _, question in near])
        for (index, question), reply in zip(near, replies, strict=True):
            dreams[index].append(Dream(question, reply, ""))

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the question beside it likelier."""
        return self._judge.about(passages, questions)

    def _restate(self, texts: Sequence[str], generator: torch.Generator) -> list[str]:
        """Return each text as the assistant would say it: of the likeliest and some sampled ways, the most faithful."""
        heads = [f"{text} ->" for text in texts]
        ways = [self._saying.sample(heads, max_new_tokens=48, generator=generator, temperature=0)]
        again = self._saying.sample(heads * RETOLD, max_new_tokens=48, generator=generator, temperature=0.5)
        ways += [again[i * len(texts) : (i + 1) * len(texts)] for i in range(RETOLD)]
        return [max(said, key=lambda way: _overlap(way, text)) for text, *said in zip(texts, *ways, strict=True)]

    def _ask(
        self, texts: Sequence[str], which: Sequence[int], generator: torch.Generator
    ) -> list[list[tuple[str, str]]]:
        """Sample questions with answers about the texts ``which``, judge them, and return the good, best first."""
        starts = [prompts.ASKING[index % len(prompts.ASKING)] for index in range(self.samples)]
        asked = [(index, start) for index in which for start in starts]
        lines = self._asking.sample(
            [f"{texts[index]} -> {start}" for index, start in asked],
            max_new_tokens=26,
            generator=generator,
            temperature=self.temperature,
        )
        candidates = []
        for (index, start), line in zip(asked, lines, strict=True):
            question, mark, answer = prompts.joined(start, line).partition("?")
            answer = _as_told(answer.strip().rstrip("."), texts[index])
            candidate = Candidate(index, question.strip() + mark, answer)
            if mark and _grounded(candidate, texts[index]) and candidate not in candidates:
                candidates.append(candidate)
        scores = self._judge.scores(candidates, texts)
        ranked = sorted(zip(scores, candidates, strict=True), key=lambda pair: -pair[0])
        return [
            _distinct([(c.question, c.answer) for score, c in ranked if c.passage == index and score > DROP])
            for index in which
        ]


def split_passage(text: str) -> list[str]:
    """Return ``text`` on one line, or, when it is long, its sentences."""
    line = " ".join(text.split())
    if len(line.split()) <= LONG:
        return [line]
    return [part for part in re.split(r"(?<=[.!?。！？])\s*", line) if len(part.split()) > 2] or [line]


def words(text: str) -> list[str]:
    """Return the words of ``text``, in lower case and without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c)))


def _grounded(candidate: Candidate, text: str) -> bool:
    """Whether the answer is in the passage's words (endings aside) and not given away by the question."""
    said, asked, answer = words(text), words(candidate.question), words(candidate.answer)
    if not answer or any(len(word) > 3 and word in asked for word in answer):
        return False
    return all(any(_same(word, other) for other in said) for word in answer)


def _as_told(answer: str, text: str) -> str:
    """Return ``answer`` as ``text`` writes it, if it is there word by word."""
    tokens = list(re.finditer(r"\w+", text))
    said, sought = [word.group() for word in tokens], re.findall(r"\w+", answer)
    for start in range(len(said) - len(sought) + 1 if sought else 0):
        if [word.casefold() for word in said[start : start + len(sought)]] == [word.casefold() for word in sought]:
            return text[tokens[start].start() : tokens[start + len(sought) - 1].end()]
    return answer


def _overlap(way: str, text: str) -> float:
    """Return the share of words that two texts have in common (F1), each counted once."""
    ours, theirs = set(words(way)), set(words(text))
    return 2 * len(ours & theirs) / max(len(ours) + len(theirs), 1)


def _same(a: str, b: str) -> bool:
    return a == b or (min(len(a), len(b)) >= 4 and (a.startswith(b) or b.startswith(a)))


def _reply(restated: str, text: str, answer: str) -> str:
    """Return the passage as the assistant says it if that holds the answer and is not much longer, else the answer."""
    said = words(restated)
    holds = all(any(_same(word, other) for other in said) for word in words(answer))
    return restated if holds and len(said) <= 1.5 * len(words(text)) + 3 else f"{answer}."


def _unambiguous(kept: Sequence[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """Drop the questions that were asked of several passages with different answers ("What is her name?")."""
    answers: dict[tuple[str, ...], set[str]] = {}
    for found in kept:
        for question, answer in found:
            answers.setdefault(tuple(words(question)), set()).add(" ".join(words(answer)))
    return [[(q, a) for q, a in found if len(answers[tuple(words(q))]) == 1] for found in kept]


def _distinct(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep the first of all pairs whose questions have the same words."""
    seen: dict[tuple[str, ...], tuple[str, str]] = {}
    for question, answer in pairs:
        seen.setdefault(tuple(words(question)), (question, answer))
    return list(seen.values())
