"""Between the store and a sleep: which old dreams still hold, which give way to what is new, which to replay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from everlearn.learner.dreams import Dream, Dreamer, same, words
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.store import MemoryStore

ABOUT = 4.0  # nats by which a new passage must make an old question likelier for it to be about the same thing
SHARE = 0.6  # and the share of what the old passage does
ALIKE = 0.5  # share of the words that an old question must have in common with a new one to ask the same
MOST, SOME = 0.5, 0.2  # share of the old questions that a new one asks too, and of the new ones that an old one does
LIKE = 15.0  # nats between what is new and an old answer, no passage read, from which one is no answer to the question
CANDIDATES = 6  # old questions that the model compares with one new passage
LOOKED_AT = 3  # questions of an old answer that is named by a new passage

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

    An old answer gives way if the new passage is about its questions, nearly as much so as what told it was, if both
    are answers to them by their kind, and

    * most of its questions are asked again, nearly in the same words, and the new passage does not hold it; or
    * the new passage names it, and answers its questions rather by what is new ("I gave up on Estonian, I'm studying
      Basque" of what I learn; but not "Nils caught a mouse" of what my cat is called).

    With it go all dreams of its observation that give that answer.

    Args:
        dreamer: judges what a question is about, and which answer a passage gives.
        new: id -> (text, dreams) of the night's observations.
        old: the dreams that held so far.
    """
    live = [item for item in old if not item.dream.contrast]
    groups: dict[Answer, list[Kept]] = {}
    for item in live:
        groups.setdefault((item.observation, tuple(words(item.dream.answer))), []).append(item)
    answers = {number: next((d.answer for d in found if not d.contrast), "") for number, (_, found) in new.items()}
    pairs = [*_asked_again(new, groups), *_named(dreamer, new, answers, groups)]
    questions = [item.dream.question for _, item in pairs]
    now = dreamer.about([new[number][0] for number, _ in pairs], questions)
    then = dreamer.about([item.dream.reply for _, item in pairs], questions)
    both = [answers[number] for number, _ in pairs], [item.dream.answer for _, item in pairs]
    fits = dreamer.rather([NEUTRAL] * len(pairs), questions, *both)
    given: dict[int, set[int]] = {number: set() for number in new}
    for (number, item), gain, was, fit in zip(pairs, now, then, fits, strict=True):
        if gain >= max(ABOUT, SHARE * was) and abs(fit) < LIKE:
            given[number] |= {other.id for other in groups[item.observation, tuple(words(item.dream.answer))]}
    return {number: sorted(ids) for number, ids in given.items()}


def _named(
    dreamer: Dreamer,
    new: Mapping[int, tuple[str, Sequence[Dream]]],
    answers: Mapping[int, str],
    groups: Mapping[Answer, Sequence[Kept]],
) -> list[tuple[int, Kept]]:
    """Return new observations with old questions whose answer they name, and which they answer otherwise."""
    pairs: list[tuple[int, Kept]] = []
    for number, (text, _) in new.items():
        told, answer = words(text), words(answers[number])
        for (_, before), items in groups.items():
            named = any(len(word) > 3 and any(same(word, other) for other in told) for word in before)
            if named and answer and not any(same(a, b) for a in answer for b in before):
                pairs += [(number, item) for item in items[:LOOKED_AT]]
    margins = dreamer.rather(
        [new[number][0] for number, _ in pairs],
        [item.dream.question for _, item in pairs],
        [answers[number] for number, _ in pairs],
        [item.dream.answer for _, item in pairs],
    )
    return [pair for pair, margin in zip(pairs, margins, strict=True) if margin > 0]


def _asked_again(
    new: Mapping[int, tuple[str, Sequence[Dream]]], groups: Mapping[Answer, Sequence[Kept]]
) -> list[tuple[int, Kept]]:
    """Return new observations with those old questions that they ask again, of answers most of whose are.

    Two questions are alike by the share of their words that they have in common, rare words counting more.
    """
    asked = {
        number: [set(words(dream.question)) for dream in dreams if not dream.contrast and not dream.echo]
        for number, (_, dreams) in new.items()
    }
    before = {
        answer: {item.id: set(words(item.dream.question)) for item in items if not item.dream.echo}
        for answer, items in groups.items()
    }
    sources: dict[int, set[str]] = {}
    for (observation, _), theirs in before.items():
        sources.setdefault(observation, set()).update(*theirs.values())
    spread = Counter(word for known in sources.values() for word in known)
    spread.update(word for theirs in asked.values() for word in set().union(*theirs))
    rarity = {word: math.log(1 + (len(sources) + len(asked)) / count) for word, count in spread.items()}
    pairs: list[tuple[int, Kept]] = []
    for number, (text, _) in new.items():
        told, mine = set(words(text)), []
        for answer, items in groups.items():
            theirs = before[answer]
            likest = {key: max((_alike(q, o, rarity) for q in asked[number]), default=0.0) for key, o in theirs.items()}
            back = [max((_alike(q, o, rarity) for o in theirs.values()), default=0.0) for q in asked[number]]
            again = sum(share >= ALIKE for share in likest.values()) >= MOST * max(len(theirs), 1)
            if again and sum(share >= ALIKE for share in back) >= SOME * len(back) and not set(answer[1]) <= told:
                mine += [(likest[item.id], item) for item in items if likest.get(item.id, 0.0) >= ALIKE]
        mine.sort(key=lambda pair: -pair[0])
        pairs += [(number, item) for _, item in mine[:CANDIDATES]]
    return pairs


def _alike(a: set[str], b: set[str], rarity: Mapping[str, float]) -> float:
    """Return the share of their words that two questions have in common, each counted by its rarity."""
    return sum(rarity[word] for word in a & b) / max(sum(rarity[word] for word in a | b), 1e-9)


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
