"""Dreaming: from a passage the base model makes the questions a user may ask later, and says what it was told.

Nothing here knows a language or a kind of fact. A question is kept when the model, with the passage before it, finds
an answer in the passage's own words that it would not give without it (support), and when the question itself becomes
likelier with the passage (it is about it). What is learned as the reply is the passage as the assistant would say it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner import prompts
from everlearn.learner.judging import DROP, Candidate, Criteria, Judge
from everlearn.learner.sampling import Prompt
from everlearn.learner.voice import greedy_replies

LONG = 40  # words; a longer message is dreamt of sentence by sentence
DRESSED = 2  # questions of a passage that are asked again in a situation
STRANGERS = 2  # questions of a passage that are asked again about somebody else
RETOLD = 4  # ways of saying a passage that are sampled beside the likeliest

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
        self._swapping = Prompt(model, tokenizer, prompts.SOMEBODY_ELSE)
        self._situating = Prompt(model, tokenizer, prompts.SITUATIONS)

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
        for (index, text), found, ways in zip(pieces, kept, restated, strict=True):
            dreams[index] += _answered(text, found, ways)[: self.keep]
        progress("dreaming", 0.8)
        self._dress(dreams, generator)
        self._add_contrasts(passages, dreams, generator)
        progress("dreaming", 1.0)
        return dreams

    def _dress(self, dreams: list[list[Dream]], generator: torch.Generator) -> None:
        """Add to each passage's dreams its best questions once more, each behind words of a situation of its own."""
        best = [(found, dream) for found in dreams for dream in found[:DRESSED]]
        starts = [prompts.SITUATING[index % len(prompts.SITUATING)] for index in range(len(best))]
        lines = self._situating.sample(starts, max_new_tokens=16, generator=generator, temperature=0.8)
        for (found, dream), start, line in zip(best, starts, lines, strict=True):
            situation, end, _ = prompts.joined(start, line).partition(".")
            if end and "?" not in situation:
                found.append(replace(dream, question=f"{situation}. {dream.question}"))

    def _add_contrasts(self, passages: Sequence[str], dreams: list[list[Dream]], generator: torch.Generator) -> None:
        """Add to each passage's dreams its near misses, with the base's reply.

        A question about the world in the passage's words, and questions like its own about somebody else.
        """
        which = [index for index, found in enumerate(dreams) if found]
        near = [f"{split_passage(passages[index])[0]} ->" for index in which]
        world = self._missing.sample(near, max_new_tokens=24, generator=generator, temperature=0.5)
        asked = [(index, dream.question) for index in which for dream in dreams[index][:STRANGERS]]
        drawn = torch.randint(len(prompts.OTHERING), (len(asked),), generator=generator).tolist()
        starts = [prompts.OTHERING[index] for index in drawn]
        heads = [f"{question} -> {start}" for (_, question), start in zip(asked, starts, strict=True)]
        ends = self._swapping.sample(heads, max_new_tokens=16, generator=generator, temperature=0.5)
        made = [*zip(which, world, strict=True)]
        made += [(i, prompts.joined(start, end)) for (i, _), start, end in zip(asked, starts, ends, strict=True)]
        own = {tuple(words(dream.question)) for found in dreams for dream in found}
        near_misses = [(index, q) for index, q in made if q.endswith("?") and tuple(words(q)) not in own]
        replies = greedy_replies(self._asking.model, self._asking.tokenizer, [question for _, question in near_misses])
        for (index, question), reply in zip(near_misses, replies, strict=True):
            dreams[index].append(Dream(question, reply, ""))

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the question beside it likelier."""
        return self._judge.about(passages, questions)

    def _restate(self, texts: Sequence[str], generator: torch.Generator) -> list[tuple[str, ...]]:
        """Return for each text some ways in which the assistant would say it: the likeliest, then sampled ones."""
        heads = [f"{text} ->" for text in texts]
        ways = self._saying.sample(heads, max_new_tokens=48, generator=generator, temperature=0)
        more = self._saying.sample(heads * RETOLD, max_new_tokens=48, generator=generator, temperature=0.5)
        return list(zip(ways, *(more[i * len(texts) : (i + 1) * len(texts)] for i in range(RETOLD)), strict=True))

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
    """Return ``text`` on one line, or, when it is long, its sentences, none of more than ``LONG`` words."""
    line = " ".join(text.split())
    if len(line.split()) <= LONG:
        return [line]
    sentences = [part.split() for part in re.split(r"(?<=[.!?。！？])\s*", line)]
    cut = [" ".join(part[start : start + LONG]) for part in sentences for start in range(0, len(part), LONG)]
    return [part for part in cut if len(part.split()) > 2] or [" ".join(line.split()[:LONG])]


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


def _same(a: str, b: str) -> bool:
    return a == b or (min(len(a), len(b)) >= 4 and (a.startswith(b) or b.startswith(a)))


def _answered(text: str, found: Sequence[tuple[str, str]], ways: Sequence[str]) -> list[Dream]:
    """Return the questions ``found``, best first, replied to with the answer and the passage as the assistant says it.

    The answer comes first, so that the one token which decides between all that is known comes where the question was
    just read. Of the ``ways`` of saying the passage the one serves that holds the most answers, the best question's
    among them, is not much longer than the passage and not just a part of it; of equals the one with the fewest words
    of its own. Questions whose answer it lacks are dropped; if there is no such way, the answer stands alone.
    """
    said, most = f" {' '.join(words(text))} ", 1.5 * len(words(text)) + 3
    fit = [way for way in ways if f" {' '.join(words(way))} " not in said and len(words(way)) <= most]
    good = [way for way in fit if found and _holds(way, found[0][1])]
    if not good:
        return [Dream(question, f"{_begun(answer)}.", answer) for question, answer in found]
    told = set(words(text))
    best = max(good, key=lambda way: (sum(_holds(way, answer) for _, answer in found), -len(set(words(way)) - told)))
    return [Dream(question, f"{_begun(answer)}. {best}", answer) for question, answer in found if _holds(best, answer)]


def _begun(answer: str) -> str:
    return answer[:1].upper() + answer[1:]


def _holds(reply: str, answer: str) -> bool:
    said = words(reply)
    return all(any(_same(word, other) for other in said) for word in words(answer))


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
