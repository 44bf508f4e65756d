"""Between the store and a sleep: which old dreams still hold, which give way to what is new, which to replay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from everlearn.learner.dreams import Dream, Dreamer, words
from everlearn.learner.store import MemoryStore

ABOUT = 4.0  # nats by which a new passage must make an old question likelier for it to be about the same thing
SHARE = 0.6  # and the share of what the old passage does
ALIKE = 0.5  # share of the words that an old question must have in common with a new one to ask the same
MOST, SOME = 0.5, 0.2  # share of the old questions that a new one asks too, and of the new ones that an old one does
CANDIDATES = 6  # old questions that the model compares with one new passage

Answer = tuple[int, tuple[str, ...]]  # an observation and the words of an answer that it gave


@dataclass(frozen=True)
class Kept:
    """A dream of an earlier night, as stored."""

    id: int
    observation: int
    dream: Dream


def kept_dreams(store: MemoryStore, without: Iterable[int] = (), night: int | None = None) -> list[Kept]:
    """Return the dreams on the way to the current night that still hold, or held after ``night`` on that way.

    A dream that gave way to a later observation holds again when that is forgotten, or named in ``without``.
    """
    gone = set(without)
    history = {item.id: item.state for item in store.history()}
    nights = {night.n: night for night in store.nights()}
    dropped: set[int] = set()
    number = store.head if night is None else night
    while number:
        for later, ids in nights[number].metrics.get("superseded", {}).items():
            if int(later) not in gone and history.get(int(later)) == "consolidated":
                dropped |= set(ids)
        number = nights[number].parent
    return [Kept(row.id, row.observation, Dream(**row.payload)) for row in store.dreams() if row.id not in dropped]


def superseded(
    dreamer: Dreamer, new: Mapping[int, tuple[str, Sequence[Dream]]], old: Sequence[Kept]
) -> dict[int, list[int]]:
    """Return, for each new observation, the ids of the old dreams that it contradicts: what is told later wins.

    Only an answer most of whose questions are asked again is looked at. An old question that asks nearly in the
    words of a new one, rare words counting more, gives way when the new passage makes it likelier too, nearly as much
    so as the old one did, and does not hold its answer. With it go all dreams of its observation that give that answer.

    Args:
        dreamer: judges what a question is about.
        new: id -> (text, dreams) of the night's observations.
        old: the dreams that held so far.
    """
    live = [item for item in old if not item.dream.contrast]
    asked = {number: [_asked(dream) for dream in dreams if not dream.contrast] for number, (_, dreams) in new.items()}
    before = [_asked(item.dream) for item in live]
    sources: dict[int, set[str]] = {}
    for item, question in zip(live, before, strict=True):
        sources.setdefault(item.observation, set()).update(question)
    spread = Counter(word for known in sources.values() for word in known)
    spread.update(word for questions in asked.values() for word in set().union(*questions))
    rarity = {word: math.log(1 + (len(sources) + len(asked)) / count) for word, count in spread.items()}
    given_by = [(item.observation, tuple(words(item.dream.answer))) for item in live]
    pairs: list[tuple[int, str, Kept]] = []
    for number, (text, _) in new.items():
        alike = [max((_alike(q, question, rarity) for question in asked[number]), default=0.0) for q in before]
        told = set(words(text))
        again = _asked_again(alike, given_by, asked[number], before, rarity)
        for index in sorted(range(len(live)), key=lambda index: -alike[index])[:CANDIDATES]:
            if given_by[index] in again and alike[index] >= ALIKE and not set(words(live[index].dream.answer)) <= told:
                pairs.append((number, text, live[index]))
    questions = [item.dream.question for _, _, item in pairs]
    now = dreamer.about([text for _, text, _ in pairs], questions)
    then = dreamer.about([item.dream.reply for _, _, item in pairs], questions)
    given: dict[int, set[int]] = {number: set() for number in new}
    for (number, _, item), gain, was in zip(pairs, now, then, strict=True):
        if gain >= max(ABOUT, SHARE * was):
            same = item.observation, tuple(words(item.dream.answer))
            given[number] |= {other.id for other, by in zip(live, given_by, strict=True) if by == same}
    return {number: sorted(ids) for number, ids in given.items()}


def _asked(dream: Dream) -> set[str]:
    return set(words(dream.question))


def _alike(a: set[str], b: set[str], rarity: Mapping[str, float]) -> float:
    """Return the share of their words that two questions have in common, each counted by its rarity."""
    return sum(rarity[word] for word in a & b) / max(sum(rarity[word] for word in a | b), 1e-9)


def _asked_again(
    alike: Sequence[float],
    given_by: Sequence[Answer],
    new: Sequence[set[str]],
    old: Sequence[set[str]],
    rarity: Mapping[str, float],
) -> set[Answer]:
    """Return the answers most of whose ``old`` questions some of the ``new`` ones ask again."""
    found: set[Answer] = set()
    for answer in set(given_by):
        rows = [index for index, other in enumerate(given_by) if other == answer]
        if sum(alike[index] >= ALIKE for index in rows) < MOST * len(rows):
            continue
        back = [max(_alike(question, old[index], rarity) for index in rows) >= ALIKE for question in new]
        if sum(back) >= SOME * len(back):
            found.add(answer)
    return found


def choose_replay(old: Sequence[Kept], count: int, generator: torch.Generator) -> list[Dream]:
    """Choose at most ``count`` old dreams, evenly over the observations they come from, at random within each."""
    by_observation: dict[int, list[Dream]] = {}
    for index in torch.randperm(len(old), generator=generator).tolist():
        by_observation.setdefault(old[index].observation, []).append(old[index].dream)
    chosen: list[Dream] = []
    queues = list(by_observation.values())
    while queues and len(chosen) < count:
        chosen += [queue.pop() for queue in queues][: count - len(chosen)]
        queues = [queue for queue in queues if queue]
    return chosen


def relearned(dreams: Sequence[Kept], which: Collection[int]) -> tuple[dict[int, list[Dream]], list[Kept]]:
    """Return the dreams of the observations ``which``, to be learned anew, and those of the others."""
    again: dict[int, list[Dream]] = {}
    for item in dreams:
        if item.observation in which:
            again.setdefault(item.observation, []).append(item.dream)
    return again, [item for item in dreams if item.observation not in which]


def before_knowing(store: MemoryStore, ids: Sequence[int]) -> tuple[int, dict[int, list[Dream]], list[Kept], set[int]]:
    """Return from where, and with what, the slow level is rebuilt as if the observations ``ids`` had never been told.

    Returns:
        the last night before any of them was learned whose snapshot is there (0: the untouched base), the dreams of the
        other observations learned since and of those that have lost some dreams since, by observation, the dreams of
        those it knew otherwise, for replay, and the observations that have lost some: their slots are to be dropped.
    """
    gone = set(ids)
    nights = {night.n: night for night in store.nights()}
    learned = {item.id: item.night for item in store.history() if item.state == "consolidated"}
    first = min(night for key, night in learned.items() if key in gone and night is not None)
    number = store.head
    while number and (number >= first or nights[number].unavailable is not None):
        number = nights[number].parent
    known = {item.id for item in store.history(number) if item.state == "consolidated"}
    dreams = [item for item in kept_dreams(store, without=gone) if item.observation not in gone]
    held = {item.id for item in dreams}
    before = kept_dreams(store, without=gone, night=number)
    lost = {item.observation for item in before if item.observation in known and item.id not in held}
    again, rest = relearned(dreams, {item.observation for item in dreams} - known | lost)
    return number, again, rest, lost
