"""The formal languages of Irie et al. (2023), on the construction of Bhattamishra et al. (2020); synthetic-tasks.md, C.

All strings are members of their language. At every step the label says which next letters are legal, and a string
counts as right only if every label is. Lengths lie in a window ``lo..hi``; for the counters that is the number of each
letter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from everlearn.errors import InvalidArgument

__all__ = ["LANGUAGES", "Language", "Sample", "window"]

Sample = tuple[tuple[int, ...], tuple[int, ...]]
"""The letters of a string and the label of each prefix."""

TRIES = 20_000
"""Draws in a row without a new string, after which a window is taken to be exhausted."""


@dataclass(frozen=True)
class Language:
    """A language.

    Args:
        letters, labels: how many of each.
        draw: ``(rng, lo, hi)`` -> a string of the window, or None when the draw is to be rejected.
        label: letters -> labels.
        few: has so few strings in a window that duplicates are kept.
        gap: how far the next bin's window starts above the last one's end.
    """

    letters: int
    labels: int
    draw: Callable[[random.Random, int, int], tuple[int, ...] | None]
    label: Callable[[tuple[int, ...]], tuple[int, ...]]
    few: bool = False
    gap: int = 2

    def samples(self, rng: random.Random, count: int, lo: int, hi: int, *, distinct: bool) -> list[Sample]:
        """Return ``count`` strings of the window; fewer where ``distinct`` ones run out.

        Raises:
            InvalidArgument: the window holds no string.
        """
        found: list[tuple[int, ...]] = []
        seen: set[tuple[int, ...]] = set()
        misses = 0
        while len(found) < count and misses < TRIES:
            letters = self.draw(rng, lo, hi)
            if letters is None or (distinct and letters in seen):
                misses += 1
                continue
            misses = 0
            seen.add(letters)
            found.append(letters)
        if not found:
            raise InvalidArgument(f"lo, hi: got {lo}, {hi}, expected a window that holds a string")
        return [(letters, self.label(letters)) for letters in found]

    def train(self, rng: random.Random, count: int, lo: int, hi: int) -> list[Sample]:
        """Return strings to train on; languages of few strings repeat them."""
        return self.samples(rng, count, lo, hi, distinct=not self.few)

    def test(self, rng: random.Random, count: int, lo: int, hi: int) -> list[Sample]:
        """Return distinct strings."""
        return self.samples(rng, count, lo, hi, distinct=True)


def window(language: Language, bin: int, lo: int = 2, hi: int = 50) -> tuple[int, int]:
    """Return the window of a bin: 0 is that of training, each further one begins just above the one before.

    2..50, then 52..100 and 102..150 (51..100 and 101..150 for parity, (aa)* and (abab)*).
    """
    return (lo, hi) if bin == 0 else (bin * hi + language.gap, (bin + 1) * hi)


def _parity(rng: random.Random, lo: int, hi: int) -> tuple[int, ...] | None:
    """Bits drawn with ``p = q = L / (2 (1 + L))``, ``L`` the middle of the window, else the end; made even."""
    middle = (lo + hi) // 2
    share = middle / (2 * (1 + middle))
    bits: list[int] = []
    while len(bits) <= hi:
        drawn = rng.random()
        if drawn >= 2 * share:
            break
        bits.append(int(drawn >= share))
    if sum(bits) % 2:
        bits.append(1)
    return tuple(bits) if lo <= len(bits) <= hi else None


def _parity_labels(letters: tuple[int, ...]) -> tuple[int, ...]:
    labels, even = [], 1
    for letter in letters:
        even ^= letter
        labels.append(even)
    return tuple(labels)


def _repeated(block: tuple[int, ...]) -> Callable[[random.Random, int, int], tuple[int, ...] | None]:
    def draw(rng: random.Random, lo: int, hi: int) -> tuple[int, ...] | None:
        length = rng.randint(lo, hi) // len(block) * len(block)
        return block * (length // len(block)) if length >= lo else None

    return draw


def _whole_blocks(size: int) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    return lambda letters: tuple(int(i % size == 0) for i in range(1, len(letters) + 1))


def _counter(letters: int) -> Callable[[random.Random, int, int], tuple[int, ...]]:
    def draw(rng: random.Random, lo: int, hi: int) -> tuple[int, ...]:
        count = rng.randint(lo, hi)
        return tuple(letter for letter in range(letters) for _ in range(count))

    return draw


def _counter_labels(letters: tuple[int, ...]) -> tuple[int, ...]:
    """While reading a: "a or b" (0); then the next letter (1: b, 2: c, ...); at last the end, one more."""
    kinds = max(letters) + 1
    count = len(letters) // kinds
    labels = [0] * count
    for letter in range(1, kinds):
        labels += [letter] * (count - 1) + [letter + 1]
    return tuple(labels)


def _brackets(rng: random.Random, hi: int, types: int) -> tuple[int, ...] | None:
    """``S -> (S)`` with probability 1/2, ``S S`` 1/4, empty 1/4, each pair of a random type; None when over-long.

    The letters are ``2 type`` for an opening and ``2 type + 1`` for a closing bracket.
    """
    letters: list[int] = []
    pending: list[int] = [-1]  # -1 is S
    closing = 0
    while pending:
        top = pending.pop()
        if top >= 0:
            letters.append(top)
            closing -= 1
            continue
        drawn = rng.random()
        if drawn < 0.5:
            kind = 2 * rng.randrange(types) if types > 1 else 0
            letters.append(kind)
            pending += [kind + 1, -1]
            closing += 1
        elif drawn < 0.75:
            pending += [-1, -1]
        if len(letters) + closing > hi or len(pending) > 8 * hi + 64:
            return None
    return tuple(letters)


def _dyck(types: int) -> Callable[[random.Random, int, int], tuple[int, ...] | None]:
    def draw(rng: random.Random, lo: int, hi: int) -> tuple[int, ...] | None:
        letters = _brackets(rng, hi, types)
        return letters if letters is not None and len(letters) >= lo else None

    return draw


def _shuffle_labels(letters: tuple[int, ...]) -> tuple[int, ...]:
    """Bit ``type`` is set while more brackets of that type are open than closed, the other type apart."""
    labels, depth = [], [0, 0]
    for letter in letters:
        depth[letter // 2] += -1 if letter % 2 else 1
        labels.append(sum((depth[kind] > 0) << kind for kind in range(2)))
    return tuple(labels)


def _depth_labels(letters: tuple[int, ...]) -> tuple[int, ...]:
    """Whether a closing bracket is legal; letter 2 resets."""
    labels, depth = [], 0
    for letter in letters:
        depth = 0 if letter == 2 else depth + (-1 if letter else 1)
        labels.append(int(depth > 0))
    return tuple(labels)


def _reset_dyck(rng: random.Random, lo: int, hi: int) -> tuple[int, ...] | None:
    """A random prefix of one string, the reset letter, another string."""
    first, second = _brackets(rng, hi, 1), _brackets(rng, hi, 1)
    if not first or not second:
        return None
    letters = (*first[: rng.randint(1, len(first))], 2, *second)
    return letters if lo <= len(letters) <= hi else None


# name on the command line -> the language
LANGUAGES: dict[str, Language] = {
    "parity": Language(2, 2, _parity, _parity_labels, gap=1),
    "aa": Language(1, 2, _repeated((0, 0)), _whole_blocks(2), few=True, gap=1),
    "abab": Language(2, 2, _repeated((0, 1, 0, 1)), _whole_blocks(4), few=True, gap=1),
    "counter-2": Language(2, 3, _counter(2), _counter_labels, few=True),
    "counter-3": Language(3, 4, _counter(3), _counter_labels, few=True),
    "shuffle-2": Language(4, 4, _dyck(2), _shuffle_labels),
    "dyck-1": Language(2, 2, _dyck(1), _depth_labels),
    "reset-dyck-1": Language(3, 2, _reset_dyck, _depth_labels),
}
