"""Between the store and a sleep: which old dreams still hold, which give way to what is new, which to replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from everlearn.learner.dreams import Dream, Dreamer, words
from everlearn.learner.store import MemoryStore

ABOUT = 4.0  # nats by which a new passage must make an old question likelier for it to be about the same thing
SHARE = 0.6  # and the share of what the old passage does
CANDIDATES = 4  # older observations that one new one is compared with


@dataclass(frozen=True)
class Kept:
    """A dream of an earlier night, as stored."""

    id: int
    observation: int
    dream: Dream


def kept_dreams(store: MemoryStore, without: Iterable[int] = ()) -> list[Kept]:
    """Return the dreams on the way to the current night that still hold.

    A dream that gave way to a later observation holds again when that is forgotten, or named in ``without``.
    """
    gone = set(without)
    history = {item.id: item.state for item in store.history()}
    nights = {night.n: night for night in store.nights()}
    dropped: set[int] = set()
    number = store.head
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

    An old dream gives way when the new passage makes its question likelier, and nearly as much so as the passage it
    was made from did: the new passage answers it now. Only the older observations that share the rarest words with the
    new one are compared.

    Args:
        dreamer: judges what a question is about.
        new: id -> (text, dreams) of the night's observations.
        old: the dreams that held so far.
    """
    passages: dict[int, list[Kept]] = {}
    for item in (item for item in old if not item.dream.contrast):
        passages.setdefault(item.observation, []).append(item)
    vocabulary = {number: _words(item.dream for item in items) for number, items in passages.items()}
    spread = Counter(word for known in vocabulary.values() for word in known)
    pairs: list[tuple[int, str, Kept]] = []
    for number, (text, dreams) in new.items():
        said = _words(dreams) | set(words(text))
        shared = {other: sum(1 / spread[word] for word in said & known) for other, known in vocabulary.items()}
        nearest = sorted((other for other in shared if shared[other] > 0), key=lambda other: -shared[other])
        pairs += [(number, text, item) for other in nearest[:CANDIDATES] for item in passages[other]]
    questions = [item.dream.question for _, _, item in pairs]
    now = dreamer.about([text for _, text, _ in pairs], questions)
    then = dreamer.about([item.dream.reply for _, _, item in pairs], questions)
    given: dict[int, list[int]] = {number: [] for number in new}
    for (number, _, item), gain, before in zip(pairs, now, then, strict=True):
        if gain >= max(ABOUT, SHARE * before):
            given[number].append(item.id)
    return given


def _words(dreams: Iterable[Dream]) -> set[str]:
    return {
        word for dream in dreams if not dream.contrast for text in (dream.question, dream.reply) for word in words(text)
    }


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


def before_knowing(store: MemoryStore, ids: Sequence[int]) -> tuple[int, list[list[Dream]], list[Kept]]:
    """Return from where, and with what, the slow level is rebuilt as if the observations ``ids`` had never been told.

    Returns:
        the last night before any of them was learned whose snapshot is there (0: the untouched base), the dreams of the
        other observations learned since, and the dreams of those it knew already, for replay.
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
    again: dict[int, list[Dream]] = {}
    for item in dreams:
        if item.observation not in known:
            again.setdefault(item.observation, []).append(item.dream)
    return number, list(again.values()), [item for item in dreams if item.observation in known]
