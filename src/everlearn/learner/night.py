"""Between the store and a sleep: what is dreamt anew, which old dreams still hold, and which to replay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from everlearn.learner.asked import asks_well
from everlearn.learner.dreams import Dream, Dreamer, Progress, alone
from everlearn.learner.references import Earlier, references
from everlearn.learner.store import MemoryStore, records
from everlearn.learner.texts import given_away, sentences, words


@dataclass(frozen=True)
class Kept:
    """A dream of an earlier night, as stored, and what was ``said`` that it comes from."""

    id: int
    observation: int
    dream: Dream
    said: str


def _gave_way(metrics: Mapping[str, Any], gone: Collection[int]) -> set[int]:
    """Return the dreams that gave way in a night to what is not ``gone``, nor what it was read beside."""
    beside = metrics.get("beside", {})
    return {
        number
        for later, ids in metrics.get("superseded", {}).items()
        for number in ids
        if int(later) not in gone and beside.get(str(number)) not in gone
    }


def dreamt(
    dreamer: Dreamer, texts: Mapping[int, str], old: Sequence[Kept], generator: torch.Generator, progress: Progress
) -> tuple[dict[int, list[Dream]], dict[int, Earlier]]:
    """Return the dreams of those of the night's observations that have any, and what these refer to.

    What refers to something that is not learned either is dreamt of by its name alone. A usual question that asks well
    for an older answer has no other that it does not ask well for: what it asks of is known. It has none when the older
    one is forgotten either.

    Args:
        dreamer: who dreams.
        texts: id -> text of the night's observations.
        old: the dreams that held so far.
        generator: of the sampling.
        progress: called with what is being done and the share done.
    """
    answers: dict[int, list[str]] = {}
    for item in old:
        answers.setdefault(item.observation, []).append(item.dream.answer)
    refers = references(dreamer.follows, texts, {item.observation: item.said for item in old}, answers)
    found = dreamer.dream(list(texts.values()), generator, progress, [refers.get(n) for n in texts]) if texts else []
    new, learned = dict(zip(texts, _not_taken(found, old), strict=True)), set[int | None]()
    while learned != {None, *answers, *new}:
        learned = {None, *answers, *new}
        new = {number: [dream for dream in dreams if dream.beside in learned] for number, dreams in new.items()}
        new = {number: dreams for number, dreams in new.items() if any(not dream.contrast for dream in dreams)}
    return new, {n: earlier for n, earlier in refers.items() if n in new and earlier.observation in learned}


def _not_taken(found: Sequence[list[Dream]], old: Sequence[Kept]) -> list[list[Dream]]:
    """Return the dreams ``found`` without those whose question asks well for an ``old`` answer, and not for theirs."""
    taken: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for dream in (item.dream for item in old if asks_well(item.dream.fit)):
        taken.setdefault(tuple(words(dream.question)), set()).add(tuple(words(dream.answer)))

    def holds(dream: Dream) -> bool:
        answers = taken.get(tuple(words(dream.question)))
        if answers is None or dream.contrast or tuple(words(dream.answer)) in answers:
            return True
        return asks_well(dream.fit)

    return [[dream for dream in dreams if holds(dream)] for dreams in found]


def kept_dreams(store: MemoryStore, without: Iterable[int] = (), night: int | None = None) -> list[Kept]:
    """Return the dreams on the way to the current night that still hold, or held after ``night`` on that way.

    Not the dreams of observations in ``without``. One that gave way to a later observation holds again when that is
    forgotten, or without it. A question that was taken over is not stored twice, and goes with the observation that it
    was first asked of.
    """
    history = {item.id: item for item in store.history()}
    gone = {*without, *(item.id for item in history.values() if item.state != "consolidated")}
    nights = {night.n: night for night in store.nights()}
    dropped: set[int] = set()
    number = store.head if night is None else night
    while number:
        dropped |= _gave_way(nights[number].metrics, gone)
        number = nights[number].parent
    rows = {row.id: row for row in store.dreams()}
    kept = []
    for row in rows.values():
        question = _question(row, rows, gone)
        if question is not None:
            dream = Dream(**{**row.payload, "question": question})
            kept.append(Kept(row.id, row.observation, dream, history[row.observation].text))
    return holding(kept, dropped)


def holding(dreams: Sequence[Kept], dropped: Collection[int]) -> list[Kept]:
    """Return the ``dreams`` without those ``dropped``; what else their observations say does not name their answers."""
    before: dict[int, list[str]] = {}
    for item in dreams:
        if item.id in dropped:
            before.setdefault(item.observation, []).append(item.dream.answer)
    left = [item for item in dreams if item.id not in dropped]
    return [replace(item, dream=without(before.get(item.observation, ()), item.dream)) for item in left]


def _question(row: records.Dream, rows: Mapping[int, records.Dream], gone: Collection[int]) -> str | None:
    """Return the question of a stored dream; None if it, or what it was taken over from or refers to, is gone."""
    if row.observation in gone or row.payload.get("beside") in gone:
        return None
    if row.payload.get("taken") is None:
        return row.payload["question"]
    first = rows.get(row.payload["taken"])
    return None if first is None else _question(first, rows, gone)


def without(before: Sequence[str], dream: Dream) -> Dream:
    """Return the dream without those sentences of its reply that name what holds no more; the answer stays."""
    if dream.contrast or any(given_away(answer, dream.answer) for answer in before):
        return dream
    parts = sentences(dream.reply)
    left = [part for part in parts if not any(given_away(answer, part) for answer in before)]
    return dream if left == parts else replace(dream, reply=" ".join(left) or alone(dream.answer))


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
    dreams = kept_dreams(store, without=gone)
    held = {item.id for item in dreams}
    before = kept_dreams(store, without=gone, night=number)
    lost = {item.observation for item in before if item.observation in known and item.id not in held}
    again, rest = relearned(dreams, {item.observation for item in dreams} - known | lost)
    return number, again, rest, lost
