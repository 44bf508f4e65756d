"""Between the store and a sleep: which old dreams still hold, which give way to what is new, which to replay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from everlearn.learner.dreams import Dream, Dreamer, given_away, same, words
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.store import MemoryStore, records

ABOUT = 4.0  # nats by which a new passage must make an old question likelier for it to be about the same thing
SHARE = 0.4  # and the share of what the old passage does
ALIKE = 0.5  # share of the words that an old question must have in common with a new one to ask the same
MOST, SOME = 0.5, 0.2  # share of the old questions that a new one asks too, and of the new ones that an old one does
LIKE = 15.0  # nats between what is new and an old answer, no passage read, from which one is no answer to the question
NEAR = 10.0  # nats by which a passage gives another answer, from which the old one has nothing to do with it
RARE, FEW = 0.05, 4  # share of the observations that may have a word for it to tell anything, and how many always may
CANDIDATES = 2  # old answers that are compared with a new passage for the words they share, and as many asked again
LOOKED_AT = 5  # questions of an old answer that are put to a new passage

Answer = tuple[int, tuple[str, ...]]  # an observation and the words of an answer that it gave


@dataclass(frozen=True)
class Kept:
    """A dream of an earlier night, as stored, and what was ``said`` that it comes from."""

    id: int
    observation: int
    dream: Dream
    said: str


class Given(NamedTuple):
    """What a new observation takes over: the ``ids`` of old dreams, and those ``dreams`` with the new answer."""

    ids: list[int]
    dreams: list[Dream]


def kept_dreams(store: MemoryStore, without: Iterable[int] = (), night: int | None = None) -> list[Kept]:
    """Return the dreams on the way to the current night that still hold, or held after ``night`` on that way.

    Not the dreams of observations in ``without``. One that gave way to a later observation holds again when that is
    forgotten, or without it. A question that was taken over is not stored twice, and goes with the observation that it
    was first asked of.
    """
    gone = set(without)
    history = {item.id: item for item in store.history()}
    nights = {night.n: night for night in store.nights()}
    dropped: set[int] = set()
    number = store.head if night is None else night
    while number:
        for later, ids in nights[number].metrics.get("superseded", {}).items():
            item = history.get(int(later))
            if int(later) not in gone and item is not None and item.state == "consolidated":
                dropped |= set(ids)
        number = nights[number].parent
    rows = {row.id: row for row in store.dreams()}
    kept = []
    for row in rows.values():
        question = None if row.id in dropped else _question(row, rows, gone)
        if question is not None:
            dream = Dream(**{**row.payload, "question": question})
            kept.append(Kept(row.id, row.observation, dream, history[row.observation].text))
    return kept


def _question(row: records.Dream, rows: Mapping[int, records.Dream], gone: Collection[int]) -> str | None:
    """Return the question of a stored dream; None if it, or one that it was taken over from, is of those gone."""
    if row.observation in gone:
        return None
    if row.payload.get("taken") is None:
        return row.payload["question"]
    first = rows.get(row.payload["taken"])
    return None if first is None else _question(first, rows, gone)


def superseded(
    dreamer: Dreamer, new: Mapping[int, tuple[str, Sequence[Dream]]], old: Sequence[Kept]
) -> dict[int, Given]:
    """Return what each new observation takes over of the old dreams: what is told later wins.

    An old answer gives way if most of its questions, put to the new passage, have another answer there. One has if the
    passage is about the question, nearly as much so as what was said then, if the answer is in its words, is rather
    given than the old one, and answers the question by its kind. Compared are those answers

    * whose passage has rare words of the new one; there the old answer must not be out of the question, as it is not
      where the passage names it or is about the same thing ("I gave up on Estonian, I'm studying Basque" of what I
      learn, "The dentist pushed my appointment back to May 6"; but not "My sister lives in Boise" of where I live);
    * most of whose questions are asked again by the new dreams, nearly in the same words.

    With the answer go all dreams of its observation that give it. The questions that the new passage answers are from
    then on asked of that: it is to be remembered when what it replaces was (as in reconsolidation).

    Args:
        dreamer: judges what a question is about, and which answer a passage gives.
        new: id -> (text, dreams) of the night's observations.
        old: the dreams that held so far.
    """
    groups: dict[Answer, list[Kept]] = {}
    for item in old:
        if not item.dream.contrast:
            groups.setdefault((item.observation, tuple(words(item.dream.answer))), []).append(item)
    plain = {answer: [k for k in items if not k.dream.echo][:LOOKED_AT] for answer, items in groups.items()}
    again = _asked_again(new, groups)
    compared = {*again, *_alike_in_words(new, groups)}
    asked = [(number, answer, item) for number, answer in sorted(compared) for item in plain[answer]]
    taken: dict[tuple[int, Answer], list[Dream]] = {}
    for (number, answer, item), found in zip(asked, _answers(dreamer, new, asked, again), strict=True):
        if found:
            taken.setdefault((number, answer), []).append(_taken(item, found, new[number][1]))
    given = {number: Given([], []) for number in new}
    latest = {answer: number for (number, answer), d in sorted(taken.items()) if len(d) >= MOST * len(plain[answer])}
    for answer, number in latest.items():
        own = {tuple(words(dream.question)) for dream in (*new[number][1], *given[number].dreams)}
        given[number].ids.extend(item.id for item in groups[answer])
        given[number].dreams.extend(d for d in taken[number, answer] if tuple(words(d.question)) not in own)
    return {number: Given(sorted(ids), dreams) for number, (ids, dreams) in given.items()}


def _answers(
    dreamer: Dreamer,
    new: Mapping[int, tuple[str, Sequence[Dream]]],
    asked: Sequence[tuple[int, Answer, Kept]],
    again: Collection[tuple[int, Answer]],
) -> list[str]:
    """Return the other answer that the new passage has to each old question; empty where it has none."""
    found = [""] * len(asked)
    passages, questions = [new[number][0] for number, *_ in asked], [item.dream.question for *_, item in asked]

    def of(which: Sequence[int], texts: Sequence[str]) -> list[str]:
        return [texts[i] for i in which]

    now = dreamer.about(passages, questions)
    some = [i for i, gain in enumerate(now) if gain >= ABOUT]
    was = dreamer.about([asked[i][2].said for i in some], of(some, questions))
    some = [i for i, gain in zip(some, was, strict=True) if now[i] >= SHARE * gain]
    told = dict(zip(some, dreamer.answers(of(some, passages), of(some, questions)), strict=True))
    before = [item.dream.answer for *_, item in asked]
    some = [i for i in some if _another(told[i], before[i]) and not given_away(told[i], questions[i])]
    ones, others = [told[i] for i in some], of(some, before)
    rather = dreamer.rather(of(some, passages), of(some, questions), ones, others)
    fits = dreamer.rather([NEUTRAL] * len(some), of(some, questions), ones, others)
    for i, margin, fit in zip(some, rather, fits, strict=True):
        most = math.inf if asked[i][:2] in again else NEAR
        if 0 < margin <= most and abs(fit) < LIKE:
            found[i] = told[i]
    return found


def _another(answer: str, before: str) -> bool:
    """Whether there is an ``answer`` and it has no long word of the one ``before``."""
    return bool(answer) and words(answer) != words(before) and not given_away(before, answer)


def _taken(item: Kept, answer: str, own: Sequence[Dream]) -> Dream:
    """Return an old question with a new answer; if the ``own`` dreams of the passage give that, replied to as there."""
    for dream in own:
        if dream.answer and given_away(answer, dream.answer):
            return replace(item.dream, answer=dream.answer, reply=dream.reply, taken=item.id)
    return replace(item.dream, answer=answer, reply=f"{answer[:1].upper()}{answer[1:]}.", taken=item.id)


def _alike_in_words(
    new: Mapping[int, tuple[str, Sequence[Dream]]], groups: Mapping[Answer, Sequence[Kept]]
) -> list[tuple[int, Answer]]:
    """Return new observations with those old answers whose passage shares the most words with them, rare ones only."""
    said = {answer: _long(items[0].said) for answer, items in groups.items()}
    texts = {answer[0]: said[answer] for answer in groups} | {number: _long(text) for number, (text, _) in new.items()}
    pairs: list[tuple[int, Answer]] = []
    for number in new:
        shared = {}
        for word in texts[number]:
            having = {key for key, theirs in texts.items() if any(same(word, other) for other in theirs)}
            if len(having) <= max(FEW, RARE * len(texts)):
                for answer in groups:
                    if answer[0] in having:
                        shared[answer] = shared.get(answer, 0.0) + 1 / len(having)
        pairs += [(number, answer) for answer in sorted(shared, key=shared.__getitem__, reverse=True)[:CANDIDATES]]
    return pairs


def _long(text: str) -> set[str]:
    return {word for word in words(text) if len(word) > 3}


def _asked_again(
    new: Mapping[int, tuple[str, Sequence[Dream]]], groups: Mapping[Answer, Sequence[Kept]]
) -> set[tuple[int, Answer]]:
    """Return new observations with the old answers most of whose questions their dreams ask again.

    Two questions are alike by the share of their words that they have in common, rare words counting more. Those of
    common words alone ("What is her name?") tell nothing.
    """
    asked = {
        number: [set(words(dream.question)) for dream in dreams if not dream.contrast and not dream.echo]
        for number, (_, dreams) in new.items()
    }
    before = {
        answer: [set(words(item.dream.question)) for item in items if not item.dream.echo]
        for answer, items in groups.items()
    }
    sources: dict[int, set[str]] = {}
    for (observation, _), theirs in before.items():
        sources.setdefault(observation, set()).update(*theirs)
    spread = Counter(word for known in sources.values() for word in known)
    spread.update(word for theirs in asked.values() for word in set().union(*theirs))
    total = len(sources) + len(asked)
    rarity = {word: math.log(1 + total / count) for word, count in spread.items()}
    rare = {word for word, count in spread.items() if len(word) > 3 and count <= max(FEW, RARE * total)}
    pairs: set[tuple[int, Answer]] = set()
    for number, (text, _) in new.items():
        told, found = set(words(text)), {}
        for answer in groups:
            theirs = [question for question in before[answer] if question & rare]
            likest = [max((_alike(q, o, rarity) for q in asked[number]), default=0.0) for o in theirs]
            back = [max((_alike(q, o, rarity) for o in theirs), default=0.0) for q in asked[number]]
            again = sum(share >= ALIKE for share in likest) >= MOST * max(len(theirs), 1)
            if again and sum(share >= ALIKE for share in back) >= SOME * len(back) and not set(answer[1]) <= told:
                found[answer] = max(likest)
        pairs |= {(number, answer) for answer in sorted(found, key=found.__getitem__, reverse=True)[:CANDIDATES]}
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
    dreams = kept_dreams(store, without=gone)
    held = {item.id for item in dreams}
    before = kept_dreams(store, without=gone, night=number)
    lost = {item.observation for item in before if item.observation in known and item.id not in held}
    again, rest = relearned(dreams, {item.observation for item in dreams} - known | lost)
    return number, again, rest, lost
