"""What gives way to what is new: old answers whose questions a later message answers otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import fmean
from typing import Any, NamedTuple

from everlearn.learner.dreams import Dream, Dreamer, alone
from everlearn.learner.judging import NEUTRAL
from everlearn.learner.night import Kept, without
from everlearn.learner.references import Earlier, RareWords
from everlearn.learner.texts import given_away, in_context, sentences, words

CANDIDATES = 3  # older observations whose questions are put to a new passage
LOOKED_AT = 8  # questions of each of its answers
MOST = 0.5  # share of the questions that the new passage must be about, and to which it must have another answer
ABOUT = 2.0  # nats by which it must make those likelier, on average; the old passage counts for at least that
FOLLOWS = 10.0  # by which the old passage makes the new one likelier, that count as much as being all about them
USUAL = 15  # words of a sentence, for the nats of a longer one to be counted as if it had no more
CHANGED = 1.6  # what both must come to, at most 1 of it by being about the questions
OF_THE_SAME = 1.0  # the same where both speak of somebody that a third names: all about the questions is enough
STILL = -6.0  # nats by which the new passage must give another answer rather than the old one
LIKE = 20.0  # nats by which, no passage read, the new answer may be less likely than the old one: else of another kind

Answer = tuple[int, tuple[str, ...]]  # an observation and the words of an answer that it gave
Pair = tuple[int, Answer]  # a new observation and an old answer


class Given(NamedTuple):
    """What a new observation takes over: the ``ids`` of old dreams; and all its ``dreams`` then, taken over ones first.

    None of them says again what has been replaced. Some ids it takes over only ``beside`` another observation.
    """

    ids: list[int]
    dreams: list[Dream]
    beside: dict[int, int]


def superseding(given: Mapping[int, Given]) -> dict[str, Any]:
    """Return, for the metrics of a night, what gave way to what, and to what beside which other observation."""
    return {
        "superseded": {str(key): taken.ids for key, taken in given.items() if taken.ids},
        "beside": {str(number): other for taken in given.values() for number, other in taken.beside.items()},
    }


def superseded(
    dreamer: Dreamer,
    new: Mapping[int, tuple[str, Sequence[Dream]]],
    old: Sequence[Kept],
    beside: Mapping[int, Earlier] | None = None,
) -> dict[int, Given]:
    """Return what each new observation takes over of the old dreams: what is told later wins.

    The questions of those old answers that have the most rare words in common with a new observation are put to its
    passage; those of answers that have them in common with what it refers to, to both. An old answer gives way if the
    passage is about most of its questions, follows from what was said then and has another answer to most; with it go
    all dreams of its observation that give it. The questions that the new passage answers are from then on asked of
    that: it is to be remembered when what it replaces was (as in reconsolidation).

    Args:
        dreamer: judges what a question is about, and which answer a passage gives.
        new: id -> (text, dreams) of the night's observations.
        old: the dreams that held so far.
        beside: what new observations refer to.
    """
    groups: dict[Answer, list[Kept]] = {}
    for item in old:
        if not item.dream.contrast:
            groups.setdefault((item.observation, tuple(words(item.dream.answer))), []).append(item)
    plain = {answer: [k for k in items if not k.dream.echo][:LOOKED_AT] for answer, items in groups.items()}
    told = RareWords({number: [text] for number, (text, _) in new.items()})
    for (number, _), items in groups.items():
        told.add(number, [items[0].said])
    asked_for = [answer for answer, some in plain.items() if some]
    pairs: dict[Pair, Earlier | None] = {}
    for number, (text, _) in new.items():
        pairs |= {(number, answer): None for answer in _alike(text, asked_for, told)}
        if earlier := (beside or {}).get(number):
            others = [answer for answer in asked_for if answer[0] != earlier.observation]
            pairs |= {(number, answer): earlier for answer in _alike(f"{earlier.said} {text}", others, told)}
    put = [
        _Put(new[number][0], item, (number, answer), earlier)
        for (number, answer), earlier in pairs.items()
        for item in plain[answer]
    ]
    taken: dict[Pair, list[Dream]] = {}
    for one, found in zip(put, _answers(dreamer, new, put), strict=True):
        if found:
            taken.setdefault(one.pair, []).append(_taken(one, found, new[one.pair[0]][1]))
    latest = {answer: number for (number, answer), d in sorted(taken.items()) if len(d) >= MOST * len(plain[answer])}
    given = {}
    for number, (_, dreams) in new.items():
        gone = [answer for answer, later in latest.items() if later == number]
        before = [groups[answer][0].dream.answer for answer in gone]
        still = [d for d in dreams if d.contrast or not any(given_away(answer, d.answer) for answer in before)]
        own, over = {tuple(words(dream.question)) for dream in still}, {}
        for dream in (dream for answer in gone for dream in taken[number, answer]):
            over.setdefault(tuple(words(dream.question)), dream)
        some = [dream for question, dream in over.items() if question not in own]
        ids = sorted(item.id for answer in gone for item in groups[answer])
        lit = {answer: earlier.observation for answer in gone if (earlier := pairs[number, answer])}
        leant = {item.id: other for answer, other in lit.items() for item in groups[answer]}
        given[number] = Given(ids, [without(before, dream) for dream in (*some, *still)], leant)
    return given


def _alike(text: str, answers: Sequence[Answer], told: RareWords) -> list[Answer]:
    """Return the old ``answers`` of those observations that share the most rare words with ``text``."""
    shared: dict[int, float] = {}
    for numbers in told.rare(text).values():
        for number in numbers:
            shared[number] = shared.get(number, 0.0) + 1 / len(numbers)
    known = dict.fromkeys(number for number, _ in answers if number in shared)
    nearest = sorted(known, key=lambda number: -shared[number])[:CANDIDATES]
    return [answer for number in nearest for answer in answers if answer[0] == number]


@dataclass(frozen=True)
class _Put:
    """An old question that is put to a new ``passage``: of which ``pair``, and behind what the passage refers to."""

    passage: str
    item: Kept
    pair: Pair
    earlier: Earlier | None

    def behind(self, text: str) -> str:
        """Return ``text`` behind what it refers to."""
        return f"{self.earlier.said} {text}" if self.earlier else text


def _gains(
    measure: Callable[[list[str], list[str]], list[float]], put: Sequence[_Put], rows: Sequence[tuple[str, str]]
) -> list[float]:
    """Return by how many nats each first text makes the second one likelier, by ``measure``.

    What it refers to is there either way: what counts is what the text has beyond that.
    """
    gains = measure([one.behind(text) for one, (text, _) in zip(put, rows, strict=True)], [later for _, later in rows])
    told = [i for i, one in enumerate(put) if one.earlier]
    both = measure([put[i].behind(NEUTRAL) for i in told], [rows[i][1] for i in told]) if told else []
    anyway = dict(zip(told, both, strict=True))
    return [gain - anyway.get(i, 0.0) for i, gain in enumerate(gains)]


def _follows(dreamer: Dreamer, put: Sequence[_Put]) -> dict[Pair, float]:
    """Return by how many nats what was said of each old answer makes something in the new passage likelier.

    Sentences are compared, each with the one before it: long messages are in some way alike, whatever they say. So are
    long sentences, of which every word becomes likelier: what counts is the gain of ``USUAL`` words.
    """
    once = {one.pair: one for one in reversed(put)}
    rows = [(one, part) for one in once.values() for _, part in in_context(sentences(one.passage))]
    gains = _gains(dreamer.follows, [one for one, _ in rows], [(_said(one.item), part) for one, part in rows])
    found: dict[Pair, float] = {}
    for (one, part), gain in zip(rows, gains, strict=True):
        share = gain * min(1.0, USUAL / max(len(words(part)), 1))
        found[one.pair] = max(found.get(one.pair, share), share)
    return found


def _said(item: Kept) -> str:
    """Return the sentence in which the old answer was told, with the one before it; or all, if it is in none."""
    answer = item.dream.answer.casefold()
    return next((part for last, part in in_context(sentences(item.said)) if answer in last.casefold()), item.said)


def _changed(dreamer: Dreamer, put: Sequence[_Put]) -> set[Pair]:
    """Return the pairs whose new passage is about what the old answer is asked for, and follows from what said it.

    The less of the one, the more of the other. How much it is about them: the nats by which it makes the better half
    of the questions likelier (those it does so most for, ``MOST``), as a share of those by which what was said then
    does. Of what both speak of by what a third says, that alone may be enough.
    """

    def about(some: Sequence[_Put], texts: Sequence[str]) -> list[float]:
        return _gains(dreamer.about, some, [(text, one.item.dream.question) for one, text in zip(some, texts)])

    might: dict[Pair, list[tuple[_Put, float]]] = {}
    for one, gain in zip(put, about(put, [one.passage for one in put]), strict=True):
        might.setdefault(one.pair, []).append((one, gain))
    might = {pair: rows for pair, rows in might.items() if fmean(g for _, g in _half(rows, itemgetter(1))) >= ABOUT}
    left = [one for rows in might.values() for one, _ in rows]
    was = iter(about(left, [_said(one.item) for one in left]))
    follows, found = _follows(dreamer, left), set[Pair]()
    for pair, rows in might.items():
        best = _half([(new, max(next(was), ABOUT)) for _, new in rows], lambda row: row[0] / row[1])
        new, old = sum(min(row) for row in best), sum(old for _, old in best)
        enough = OF_THE_SAME if rows[0][0].earlier else CHANGED
        if new >= ABOUT * len(best) and new / old + follows.get(pair, 0.0) / FOLLOWS >= enough:
            found.add(pair)
    return found


def _half(rows: Iterable[Any], by: Callable[[Any], float]) -> list[Any]:
    """Return the better half of ``rows``."""
    ranked = sorted(rows, key=by, reverse=True)
    return ranked[: math.ceil(MOST * len(ranked))]


def _answers(dreamer: Dreamer, new: Mapping[int, tuple[str, Sequence[Dream]]], put: Sequence[_Put]) -> list[str]:
    """Return the other answer that the new passage has to each old question; empty where it has none.

    The answer is what the model finds in it, or if that is the old one the first that was dreamt and is another; and it
    must be of the old one's kind ("Northgate" is no other answer to "What is my job?" than "surveyor"), and not much
    less likely there than that ("Imogen left, so Yolanda babysits"; but "Paloma moved to Asheville" of her name).
    """
    found = [""] * len(put)
    questions, before = [one.item.dream.question for one in put], [one.item.dream.answer for one in put]
    passages = [one.behind(one.passage) for one in put]

    def of(which: Sequence[int], texts: Sequence[str]) -> list[str]:
        return [texts[i] for i in which]

    changed = _changed(dreamer, put)
    some = [i for i, one in enumerate(put) if one.pair in changed]
    told = dict(zip(some, dreamer.answers(of(some, passages), of(some, questions)), strict=True))
    for i in some:
        own = [dream.answer for dream in new[put[i].pair[0]][1] if not dream.contrast]
        others = [answer for answer in (told[i], *own) if _another(answer, before[i])]
        others = [answer for answer in others if not given_away(answer, questions[i])]
        if earlier := put[i].earlier:
            others = [answer for answer in others if not set(words(answer)) <= set(words(earlier.said))]
        found[i] = others[0] if told[i] and others else ""
    some = [i for i in some if found[i]]
    asking = of(some, questions), of(some, found), of(some, before)
    margins = zip(some, dreamer.rather(of(some, passages), *asking), dreamer.rather([NEUTRAL] * len(some), *asking))
    for i, here, anyway in margins:
        found[i] = found[i] if here > STILL and anyway > -LIKE else ""
    return found


def _another(answer: str, before: str) -> bool:
    """Whether there is an ``answer`` and it has no long word of the one ``before``."""
    return bool(answer) and words(answer) != words(before) and not given_away(before, answer)


def _taken(one: _Put, answer: str, own: Sequence[Dream]) -> Dream:
    """Return an old question with a new answer; if the ``own`` dreams of the passage give that, replied to as there."""
    given = (dream for dream in own if dream.answer and given_away(answer, dream.answer))
    as_there = next(given, Dream("", alone(answer), answer))
    beside = one.earlier.observation if one.earlier else None
    return replace(
        one.item.dream, answer=as_there.answer, reply=as_there.reply, taken=one.item.id, beside=beside, fit=None
    )
