"""Dreaming: from a passage the base model makes the questions a user may ask later, and says what it was told.

No rule here knows a language or a kind of fact; the lists do. The model first says what is new in a passage, one thing
or two, then finds the usual question that asks for it, if there is one, and asks on its own after the practice that is
most like the passage, with the beginnings of its questions. Of its own a question is kept when the model, with the
passage before it, gives that answer, which it would not give without it (support), when the question becomes likelier
with the passage (it is about it), and when it is asked by the one who told it. Beside these stand *echoes*, the passage
with "what?" in place of the answer: plain, but always about the passage and right. What is learned as the reply is the
answer, and the passage as the assistant would say it. Where a passage refers to something told earlier by its name, it
is also asked for by what was said of that ("Where does Paloma live?", "Where does my sister live?").
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner import prompts
from everlearn.learner.asked import Bank, Candidate, Fit, Kind, asks_well, best_fits
from everlearn.learner.judging import DROP, NEUTRAL, Criteria, Judge
from everlearn.learner.practice import Practice, Record
from everlearn.learner.references import Beside, Earlier, by_role, up_to_role
from everlearn.learner.sampling import Prompt
from everlearn.learner.texts import (
    as_told,
    distinct,
    ended,
    given_away,
    has,
    in_context,
    part_of,
    same,
    split_passage,
    unambiguous,
    words,
)
from everlearn.learner.voice import greedy_replies

SHOWN = 5  # records of practice that are shown before a passage
NEAR = 24  # those like it whose questions lend their beginnings
BEGINNING = 2  # words of such
OPEN = 8  # questions sampled without knowing the answer
ALONE = 24  # answers sampled without knowing the question
FEW = 4  # questions sampled for an answer that a usual one asks for well, and kept beside that
NEWS = 0.3  # share of its unlikeliness without the passage that an answer is credited with
STRANGERS = 2  # questions of a passage that are asked again about somebody else
ANSWERS = 2  # of a passage that are learned, at most
TRIED = 3  # that are asked for until there are so many
RETOLD = 4  # ways of saying a passage that are sampled beside the likeliest

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Dream:
    """A self-study example: what may be asked, what is to be said, and the words that matter (none: a contrast).

    Attributes:
        echo: whether the question is the passage itself, with "what?" in place of the answer.
        taken: the stored dream, of an older observation, whose question this is: it was taken over with a new answer.
        beside: the older observation that it takes to ask so, as it says who is meant.
        fit: how well the question, a usual one, asks for the answer (nats).
    """

    question: str
    reply: str
    answer: str
    echo: bool = False
    taken: int | None = None
    beside: int | None = None
    fit: float | None = None

    @property
    def contrast(self) -> bool:
        """Whether this is a near miss, whose reply is the base's own: what must not be answered with what was told."""
        return not self.answer

    def payload(self) -> dict[str, Any]:
        """Return the dream as JSON, for the store; a question that was taken over is only referred to."""
        left_out = "taken" if self.taken is None else "question"
        return {key: value for key, value in asdict(self).items() if key != left_out}


@dataclass(frozen=True)
class Studied:
    """An answer in a passage, the usual question that asks for it, and others, ``found``, with their scores."""

    answer: str
    fit: Fit | None
    found: dict[str, float]

    def asked(self, best: Mapping[str, Fit], keep: int) -> dict[str, float | None]:
        """Return its questions, best first: usual ones, if none of the night's answers fits them better, then others.

        None has the answer in it, and none comes twice. Of the others at most ``keep``, fewer beside usual ones that
        ask well. With each comes how well it fits, if it is a usual one.
        """
        fit = self.fit if self.fit and best[self.fit.kind.kind] is self.fit else None
        usual = [question for question in fit.kind.ask if not given_away(self.answer, question)] if fit else []
        others = sorted(self.found, key=lambda line: -self.found[line])
        others = [line for line in distinct([*usual, *others]) if line not in usual]
        most = min(FEW, keep) if fit and asks_well(fit.score) else keep
        return dict.fromkeys(usual, fit and fit.score) | dict.fromkeys(others[:most])


class Dreamer(Protocol):
    """Makes dreams: for each passage a list, best first; an empty list means that nothing in it can be learned.

    What a passage refers to stands ``beside`` it.
    """

    def dream(
        self, passages: Sequence[str], generator: torch.Generator, progress: Progress, beside: Beside = None
    ) -> list[list[Dream]]: ...

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]: ...

    def follows(self, passages: Sequence[str], later: Sequence[str]) -> list[float]: ...

    def answers(self, passages: Sequence[str], questions: Sequence[str]) -> list[str]: ...

    def rather(
        self, passages: Sequence[str], questions: Sequence[str], ones: Sequence[str], others: Sequence[str]
    ) -> list[float]: ...


class SelfStudyDreamer:
    """Dreams by few-shot continuation and judges by likelihood.

    Args:
        model: the base model, not stacked: dreams do not depend on what was learned before.
        tokenizer: its tokenizer.
        samples: the most questions sampled for each answer, each of another beginning.
        keep: the most questions of its own kept of an answer, echoes aside.
        temperature: of the sampling.
        criteria: what a question must show to be kept.
        kinds: of usual question; None for those of the package.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples: int = 12,
        keep: int = 8,
        temperature: float = 0.7,
        criteria: Criteria | None = None,
        kinds: Sequence[Kind] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.samples, self.keep, self.temperature = samples, keep, temperature
        self._judge = Judge(model, tokenizer, criteria)
        self._practice = Practice(model, tokenizer)
        self._bank = Bank(model, tokenizer, self._practice, kinds)
        self._asking = Prompt(model, tokenizer, prompts.QUESTION)
        self._saying = Prompt(model, tokenizer, prompts.RESTATEMENT)
        self._missing = Prompt(model, tokenizer, prompts.NEAR_MISS)
        self._swapping = Prompt(model, tokenizer, prompts.SOMEBODY_ELSE)
        self._naming = Prompt(model, tokenizer, prompts.BY_ROLE)

    def dream(
        self, passages: Sequence[str], generator: torch.Generator, progress: Progress, beside: Beside = None
    ) -> list[list[Dream]]:
        """Return the dreams of each passage, best first: also by what is said ``beside`` it, which it refers to."""
        earlier = beside or [None] * len(passages)
        parts = [in_context(split_passage(passage)) for passage in passages]
        pieces = [(i, piece, context) for i, part in enumerate(parts) for piece, context in part]
        texts = [text for _, text, _ in pieces]
        usual = self._bank.candidates([context for *_, context in pieces])
        studies: list[list[Studied]] = []
        for (*_, context), near, candidates in zip(pieces, self._practice.nearest(texts, NEAR), usual, strict=True):
            progress("dreaming", 0.8 * len(studies) / len(texts))
            studies.append(self._study(context, near, candidates, generator))
        best = best_fits(one.fit for studied in studies for one in studied if one.fit)
        fits = [{(q, s.answer): fit for s in some for q, fit in s.asked(best, self.keep).items()} for some in studies]
        kept = [list(asked) for asked in fits]
        echoes = []
        for (_, text, context), studied in zip(pieces, studies, strict=True):
            within = [(text if as_told(one.answer, text) else context, one.answer) for one in studied]
            echoes.append([(question, answer) for said, answer in within for question in _echoes(said, answer)])
        roles = [
            self._by_role(told, context, found, generator) if (told := earlier[index]) else []
            for (index, _, context), found in zip(pieces, kept, strict=True)
        ]
        both = unambiguous([found + role for found, role in zip(kept, roles, strict=True)])
        roles = [[pair for pair in role if pair in left] for role, left in zip(roles, both, strict=True)]
        asked = unambiguous(kept)
        ways = self._restate(texts, generator)
        dreams: list[list[Dream]] = [[] for _ in passages]
        rows = zip(pieces, asked, roles, echoes, ways, fits, strict=True)
        for (index, text, _), found, role, echo, said, fit in rows:
            for dream in _answered(text, found + role + echo, said):
                pair, told = (dream.question, dream.answer), earlier[index]
                by = told.observation if told and pair in role else None
                dreams[index].append(replace(dream, echo=pair in echo, beside=by, fit=fit.get(pair)))
        progress("dreaming", 0.9)
        self._add_contrasts(passages, dreams, generator)
        progress("dreaming", 1.0)
        return dreams

    def _study(
        self, context: str, near: Sequence[Record], usual: Sequence[Candidate], generator: torch.Generator
    ) -> list[Studied]:
        """Return what is new in ``context``, the best first, each with the questions that it answers.

        Without any question there is one answer, if the model finds any; of two a question has the likelier one.

        Args:
            context: what is to be learned with what was said just before, which may name what it is about ("Bo ate the
                soap. She's our dog.").
            near: practice, the likest last.
            usual: what people ask that it may answer.
            generator: of the sampling.
        """
        practice = self._list(near[-SHOWN:])
        questions, guesses = self._ask_openly(context, generator)
        guesses += [candidate.guess for candidate in usual]
        answers = self._answers(context, practice, guesses, generator)
        beginnings = _beginnings(near)
        studied: list[Studied] = []
        for answer in answers[:TRIED]:
            if len(studied) == ANSWERS or any(part_of(answer, other.answer) for other in studied):
                continue
            fit = self._bank.fitting(context, answer, [one for one in usual if not given_away(answer, one.kind.ask[0])])
            starts = beginnings[: FEW if fit and asks_well(fit.score) else self.samples]
            heads = [f"{context} -> {answer}: {start}" for start in starts]
            ends = practice.sample(heads, max_new_tokens=20, generator=generator, temperature=self.temperature)
            lines = [*questions, *(prompts.joined(start, end) for start, end in zip(starts, ends, strict=True))]
            lines = [line for line in distinct(lines) if ended(line) and not given_away(answer, line)]
            scores = self._judge.scores(context, answer, lines)
            found = {line: score for line, score in zip(lines, scores, strict=True) if score > DROP}
            if found or fit:
                studied.append(Studied(answer, fit, found))
        self._share_out(context, studied)
        return [one for one in studied if one.found or one.fit] or [Studied((answers or [""])[0], None, {})]

    def _by_role(
        self, told: Earlier, context: str, found: Sequence[tuple[str, str]], generator: torch.Generator
    ) -> list[tuple[str, str]]:
        """Return the questions ``found`` by what was ``told`` of a name in ``context``, not by that; with answers."""
        if not has(told.name, context):
            return []
        by_answer: dict[str, list[tuple[str, str]]] = {}
        for question, answer in found:
            if not given_away(answer, told.said):
                starts = [(question, start) for start in up_to_role(question, told.name)]
                by_answer.setdefault(answer, []).extend(starts)
        own = {tuple(words(question)) for question, _ in found}
        roles: list[tuple[str, str]] = []
        for answer, begun in by_answer.items():
            heads = [f"{told.said} {question} -> {start}".rstrip() for question, start in begun]
            ends = self._naming.sample(heads, max_new_tokens=24, generator=generator, temperature=0)
            lines = [prompts.joined(start, end).strip() for (_, start), end in zip(begun, ends, strict=True)]
            lines = [line for line, (question, _) in zip(lines, begun, strict=True) if by_role(line, question, told)]
            lines = [line for line in distinct(lines) if ended(line) and tuple(words(line)) not in own]
            lines = [line for line in lines if not given_away(answer, line)]
            scores = self._judge.scores(f"{told.said} {context}", answer, lines)
            best = sorted(zip(scores, lines, strict=True), key=lambda pair: -pair[0])[: self.keep]
            roles += [(line, answer) for score, line in best if score > DROP]
        return roles

    def _share_out(self, context: str, studied: Sequence[Studied]) -> None:
        """Leave a question that two answers have, in place, to the one that ``context`` gives rather."""
        for one, other in itertools.combinations(studied, 2):
            same_words = {tuple(words(line)): line for line in other.found}
            both = [(line, same_words[tuple(words(line))]) for line in one.found if tuple(words(line)) in same_words]
            answers = [one.answer] * len(both), [other.answer] * len(both)
            rather = self.rather([context] * len(both), [line for line, _ in both], *answers)
            for (line, its), margin in zip(both, rather, strict=True):
                if margin > 0:
                    del other.found[its]
                else:
                    del one.found[line]

    def _list(self, shown: Sequence[Record]) -> Prompt:
        """Return the practice ``shown`` as a list of messages, answers and plain questions."""
        lines = [f"{record.said} -> {record.answer}: {record.questions[0]}\n" for record in shown]
        return Prompt(self.model, self.tokenizer, "".join(lines))

    def _ask_openly(self, text: str, generator: torch.Generator) -> tuple[list[str], list[str]]:
        """Return questions about ``text``, of every kind a question can begin with, and the answers to them."""
        starts = [prompts.ASKING[index % len(prompts.ASKING)] for index in range(OPEN)]
        heads = [f"{text} -> {start}" for start in starts]
        lines = self._asking.sample(heads, max_new_tokens=24, generator=generator, temperature=0.7)
        parted = [prompts.joined(start, line).partition("?") for start, line in zip(starts, lines, strict=True)]
        return [question + mark for question, mark, _ in parted if mark], [answer for *_, answer in parted]

    def _answers(self, context: str, practice: Prompt, guesses: Sequence[str], generator: torch.Generator) -> list[str]:
        """Return what may be new in ``context``, in its words, best first; nothing if the model finds no such.

        Of the ``guesses`` and others without a question, those that are most often made and, by ``NEWS``, least likely
        without the passage: rare or complete phrases rather than common or clipped ones. What a question
        brought up counts twice; what was guessed only once is chance.
        """
        heads = [f"{context} ->"] * ALONE
        more = practice.sample(heads, max_new_tokens=12, generator=generator, temperature=1.0, stop=":")
        asked, alone = (Counter(as_told(guess, context) for guess in some) for some in (guesses, more))
        votes = asked + alone
        found = [answer for answer, count in votes.items() if answer and count > 1]
        blank = practice.log_likelihood([f"{NEUTRAL} ->"] * len(found), [f" {answer}:" for answer in found])
        news = {a: math.log(votes[a] + asked[a]) - NEWS * float(row.sum()) for a, row in zip(found, blank, strict=True)}
        return sorted(found, key=news.__getitem__, reverse=True)

    def _add_contrasts(self, passages: Sequence[str], dreams: list[list[Dream]], generator: torch.Generator) -> None:
        """Add to each passage's dreams its near misses, with the base's reply.

        A question about the world in the passage's words, and questions like its own about somebody else.
        """
        which = [index for index, found in enumerate(dreams) if found]
        near = [f"{split_passage(passages[index])[0]} ->" for index in which]
        world = self._missing.sample(near, max_new_tokens=24, generator=generator, temperature=0.5)
        plain = [[dream.question for dream in found if not dream.echo and dream.beside is None] for found in dreams]
        asked = [(index, question) for index in which for question in plain[index][:STRANGERS]]
        drawn = torch.randint(len(prompts.OTHERING), (len(asked),), generator=generator).tolist()
        starts = [prompts.OTHERING[index] for index in drawn]
        heads = [f"{question} -> {start}" for (_, question), start in zip(asked, starts, strict=True)]
        ends = self._swapping.sample(heads, max_new_tokens=16, generator=generator, temperature=0.5)
        made = [*zip(which, world, strict=True)]
        made += [(i, prompts.joined(start, end)) for (i, _), start, end in zip(asked, starts, ends, strict=True)]
        own = {tuple(words(dream.question)) for found in dreams for dream in found}
        near_misses = [(index, q) for index, q in made if q.endswith("?") and tuple(words(q)) not in own]
        replies = greedy_replies(self.model, self.tokenizer, [question for _, question in near_misses])
        for (index, question), reply in zip(near_misses, replies, strict=True):
            dreams[index].append(Dream(question, reply, ""))

    def about(self, passages: Sequence[str], questions: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the question beside it likelier."""
        return self._judge.about(passages, questions)

    def follows(self, passages: Sequence[str], later: Sequence[str]) -> list[float]:
        """Return by how many nats each passage makes the ``later`` one beside it likelier."""
        return self._judge.follows(passages, later)

    def answers(self, passages: Sequence[str], questions: Sequence[str]) -> list[str]:
        """Return what each passage answers the question beside it, in the passage's words; empty if it does not."""
        heads = [f"{passage} -> {question}" for passage, question in zip(passages, questions, strict=True)]
        said = self._asking.sample(heads, max_new_tokens=12, generator=torch.Generator(), temperature=0)
        return [as_told(answer, passage) for answer, passage in zip(said, passages, strict=True)]

    def rather(
        self, passages: Sequence[str], questions: Sequence[str], ones: Sequence[str], others: Sequence[str]
    ) -> list[float]:
        """Return by how many nats each passage answers the question beside it rather by ``ones`` than by ``others``."""
        return self._judge.rather(passages, questions, ones, others)

    def _restate(self, texts: Sequence[str], generator: torch.Generator) -> list[tuple[str, ...]]:
        """Return for each text some ways in which the assistant would say it: the likeliest, then sampled ones."""
        heads = [f"{text} ->" for text in texts]
        ways = self._saying.sample(heads, max_new_tokens=48, generator=generator, temperature=0)
        more = self._saying.sample(heads * RETOLD, max_new_tokens=48, generator=generator, temperature=0.5)
        return list(zip(ways, *(more[i * len(texts) : (i + 1) * len(texts)] for i in range(RETOLD)), strict=True))


def _beginnings(near: Sequence[Record]) -> list[str]:
    """Return how the questions of ``near``, the likest last, begin: plain ones before those in other words."""
    asked = [record.questions[style] for style in (0, 1) for record in reversed(near)]
    return list(dict.fromkeys(" ".join(question.split()[:BEGINNING]) for question in asked))


def _echoes(text: str, answer: str) -> list[str]:
    """Return ``text`` with words that ask in place of the ``answer``, which is in it; nothing without an answer."""
    before, _, after = text.partition(answer) if answer else ("", "", "")
    return [f"{before}{asking}{after}".rstrip(" .!。！") + "?" for asking in prompts.ECHOING if words(before + after)]


def _answered(text: str, found: Sequence[tuple[str, str]], ways: Sequence[str]) -> list[Dream]:
    """Return the questions ``found``, best first, replied to with the answer and the passage as the assistant says it.

    The answer comes first, so that the one token which decides between all that is known comes where the question was
    just read. Of the ``ways`` of saying the passage that have all the answers, are not much longer than it and not just
    a part of it, the one with the fewest words of its own serves; if there is none, every answer stands alone, and so
    does one that is not in ``text`` but in what was said just before.
    """
    said, most = f" {' '.join(words(text))} ", 1.5 * len(words(text)) + 3
    fit = [way for way in ways if f" {' '.join(words(way))} " not in said and len(words(way)) <= most]
    whole = [way for way in fit if all(_holds(way, answer) for _, answer in found if as_told(answer, text))]
    told = set(words(text))
    way = min(whole, key=lambda way: len(set(words(way)) - told), default="")
    replies = {answer: f"{alone(answer)} {way if as_told(answer, text) else ''}".rstrip() for _, answer in found}
    return [Dream(question, replies[answer], answer) for question, answer in found]


def alone(answer: str) -> str:
    """Return ``answer`` as a reply of its own."""
    return f"{answer[:1].upper()}{answer[1:]}."


def _holds(reply: str, answer: str) -> bool:
    """Whether all words of ``answer`` are in ``reply``, endings and, beside others, short ones aside ("my", "your")."""
    said, all_ = words(reply), words(answer)
    sought = [word for word in all_ if len(word) > 3] or all_
    return all(any(same(word, other) for other in said) for word in sought)
