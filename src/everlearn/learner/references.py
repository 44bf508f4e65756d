"""References: which earlier message says who or what a name in a new one stands for.

"My sister is named Paloma." tells of whom "Paloma moved to Asheville." speaks. A word is such a name when few messages
have it, another one answers a question with it or was told the same day, and that makes it much likelier. No word of a
language is known here, but a name needs letters on its own: none is found where words are not set apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from everlearn.learner import prompts
from everlearn.learner.texts import has, in_context, same, sentences, words

RARE, FEW = 0.05, 4  # share of the observations that may have a word for it to tell anything, and how many always may
SHORTEST = 3  # letters of a word that counts
NAMED = 7.0  # nats by which the earlier message makes a word likelier that it introduced

Follows = Callable[[Sequence[str], Sequence[str]], list[float]]


class Earlier(NamedTuple):
    """What a new message refers to by a ``name``: what was ``said`` in another ``observation``, a sentence or two."""

    observation: int
    said: str
    name: str


Beside = Sequence[Earlier | None] | None  # what stands beside each passage, if anything does


class RareWords:
    """Which observations have which words, endings aside; words of one or two letters do not count."""

    def __init__(self, texts: Mapping[int, Iterable[str]]) -> None:
        self._numbers: set[int] = set()
        self._by_start: dict[str, dict[str, set[int]]] = {}
        for number, some in texts.items():
            self.add(number, some)

    def add(self, number: int, texts: Iterable[str]) -> None:
        """Note the words of an observation."""
        self._numbers.add(number)
        for word in (word for text in texts for word in words(text) if len(word) >= SHORTEST):
            self._by_start.setdefault(word[:4], {}).setdefault(word, set()).add(number)

    def having(self, word: str) -> set[int]:
        """Return the observations that have ``word``."""
        return set().union(*(n for other, n in self._by_start.get(word[:4], {}).items() if same(word, other)))

    def rare(self, text: str) -> dict[str, set[int]]:
        """Return the words of ``text`` that only few observations have, and which these are."""
        found = {word: self.having(word) for word in words(text) if len(word) >= SHORTEST}
        return {word: few for word, few in found.items() if len(few) <= max(FEW, RARE * len(self._numbers))}


def references(
    follows: Follows, new: Mapping[int, str], known: Mapping[int, str], answers: Mapping[int, Iterable[str]]
) -> dict[int, Earlier]:
    """Return what the ``new`` observations refer to, those that refer to anything.

    Args:
        follows: by how many nats each first text makes the second one beside it likelier.
        new: id -> text of the night's observations. They may come in any order: each may refer to the other.
        known: id -> text of those of earlier nights.
        answers: id -> with what those answer; a word that is in none of these is not introduced there, or no more.
    """
    index = RareWords({number: [text] for number, text in (*known.items(), *new.items())})
    tried: list[tuple[int, Earlier, str, str]] = []  # where, what it may refer to, and a sentence up to the word
    for number, text in new.items():
        for word, numbers, before, with_it in _names(text, index):
            older = [n for n in numbers if n in known and any(has(word, answer) for answer in answers.get(n, ()))]
            for other in sorted(older or numbers & new.keys() - {number})[:FEW]:
                naming = Earlier(other, _naming(word, known.get(other) or new[other]), word)
                tried.append((number, naming, before, with_it))
    if not tried:
        return {}
    said = [earlier.said for _, earlier, _, _ in tried]
    whole = follows(said, [with_it for *_, with_it in tried])
    behind = [i for i, (_, _, before, _) in enumerate(tried) if before]
    without = dict(zip(behind, follows([said[i] for i in behind], [tried[i][2] for i in behind]), strict=True))
    best: dict[int, tuple[float, Earlier]] = {}
    for i, (number, earlier, *_) in enumerate(tried):
        gain = whole[i] - without.get(i, 0.0)
        if gain >= NAMED and (number not in best or gain > best[number][0]):
            best[number] = gain, earlier
    return {number: earlier for number, (_, earlier) in best.items()}


def _names(text: str, index: RareWords) -> Iterator[tuple[str, set[int], str, str]]:
    """Yield the rare words of ``text``, who has each, and its sentence up to it, without and with it."""
    for sentence in sentences(unicodedata.normalize("NFC", text)):
        rare = index.rare(sentence)
        for at in re.finditer(r"\w+", sentence):
            for word in words(at.group()):
                if word in rare:  # once
                    yield word, rare.pop(word), sentence[: at.start()].rstrip(), sentence[: at.end()]


def _naming(word: str, text: str) -> str:
    """Return the sentence of ``text`` that has ``word``, behind the one before it."""
    parts = in_context(sentences(text))
    return next((both for part, both in parts if has(word, part)), text)


def up_to_role(question: str, name: str) -> list[str]:
    """Return how ``question`` may begin up to a role in place of the ``name``; freely, if it is not in it."""
    at = next((word for word in re.finditer(r"\w+", question) if has(name, word.group())), None)
    if at is None:
        return [""]
    before = question[: at.start()].split()
    if before and before[-1].casefold() in prompts.DETERMINERS:
        before = before[:-1]
    return [" ".join([*before, owner]) for owner in prompts.OWNERS]


def by_role(line: str, question: str, told: Earlier) -> bool:
    """Whether ``line`` says whom ``question`` asks about by a word of what was ``told``, and not by the name."""
    taken = (word for word in words(line) if has(word, told.said) and not has(word, question))
    return not has(told.name, line) and any(len(word) >= SHORTEST for word in taken)
