"""References: which earlier message says who or what a name in a new one stands for.

"My sister is named Paloma." tells of whom "Paloma moved to Asheville." speaks. A word is such a name when few messages
have it and another, the first that did, makes it much likelier; nothing here knows a language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

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


def references(follows: Follows, new: Mapping[int, str], told: Mapping[int, str]) -> dict[int, Earlier]:
    """Return what the ``new`` observations refer to, those that refer to anything.

    Args:
        follows: by how many nats each first text makes the second one beside it likelier.
        new: id -> text of the night's observations.
        told: id -> text of all that was told, the ``new`` ones too; what has a lower id was told earlier. Of what was
            told in one night, that may come in any order, each may refer to the other.
    """
    index = RareWords({number: [text] for number, text in told.items()})
    tried: list[tuple[int, Earlier, str, str]] = []  # where, what it may refer to, and a sentence up to the word
    for number, text in new.items():
        for sentence in sentences(text):
            for word, numbers in index.rare(sentence).items():
                first = min(numbers - {number}, default=None)
                if first is not None and (first in new or first < number):
                    earlier = Earlier(first, _naming(word, told[first]), word)
                    tried.append((number, earlier, *_up_to(word, sentence)))
    if not tried:
        return {}
    said = [earlier.said for _, earlier, _, _ in tried]
    whole = follows(said, [with_it for *_, with_it in tried])
    behind = [index for index, (_, _, before, _) in enumerate(tried) if before]
    without = dict(zip(behind, follows([said[i] for i in behind], [tried[i][2] for i in behind]), strict=True))
    best: dict[int, tuple[float, Earlier]] = {}
    for i, (number, earlier, *_) in enumerate(tried):
        gain = whole[i] - without.get(i, 0.0)
        if gain >= NAMED and gain > best.get(number, (0.0, earlier))[0]:
            best[number] = gain, earlier
    return {number: earlier for number, (_, earlier) in best.items()}


def _up_to(word: str, sentence: str) -> tuple[str, str]:
    """Return ``sentence`` up to, and including, the first word that is ``word``."""
    found = next(at for at in re.finditer(r"\w+", sentence) if word in words(at.group()))
    return sentence[: found.start()].rstrip(), sentence[: found.end()]


def _naming(word: str, text: str) -> str:
    """Return the sentence of ``text`` that has ``word``, behind the one before it."""
    parts = in_context(sentences(text))
    return next((both for part, both in parts if has(word, part)), text)
