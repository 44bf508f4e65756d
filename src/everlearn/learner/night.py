"""Between the store and a sleep: which old dreams still hold, which give way to what was told later, which to replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from everlearn.learner.dreams import Dream, Dreamer, words
from everlearn.learner.store import MemoryStore

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

    An old dream gives way when the new passage is about its question too, as far as the dreamer can tell, and answers
    it differently. Only the older observations that share the rarest words with the new one are looked at.
    """
    raise NotImplementedError


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
