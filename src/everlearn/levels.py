"""Levels and their clock: which part of a model is updated after how many tokens.

Levels are ordered by update frequency (*Nested Learning*, section 7): attention has infinite frequency, a frozen
network has frequency 0, and a continuum memory fills what lies between. This module is light: it does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from everlearn.errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

OptimizerFactory = Callable[[list["Tensor"]], "Optimizer"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def adamw(params: list[Tensor]) -> Optimizer:
    """The optimiser of a level that names none: AdamW, rate 1e-3, no weight decay."""
    from torch.optim import AdamW

    return AdamW(params, lr=1e-3, weight_decay=0.0)


@dataclass(frozen=True)
class Level:
    """One level of a continuum memory: a name, a period in tokens, and the optimiser that steps at its end.

    Args:
        name: letters, digits, ``_`` and ``-``; unique among the levels of a model.
        every: the period in tokens (C_l); ``None``: never updated by the stream, only at sleep.
        optimizer: parameters -> ``torch.optim.Optimizer``, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``.

    Raises:
        InvalidArgument: a name that cannot be one, or a period below 1.
    """

    name: str
    every: int | None = None
    _: KW_ONLY
    optimizer: OptimizerFactory = adamw

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidArgument(f"name: got {self.name!r}, expected a letter followed by letters, digits, '_' or '-'")
        whole = isinstance(self.every, int) and not isinstance(self.every, bool)
        if self.every is not None and not (whole and self.every >= 1):
            raise InvalidArgument(f"every: got {self.every!r} for level {self.name!r}, expected tokens >= 1 or None")


def check_levels(levels: Iterable[Level]) -> tuple[Level, ...]:
    """Return ``levels`` as a tuple, or raise InvalidArgument when it is empty, not of levels, or repeats a name."""
    levels = tuple(levels)
    if not levels:
        raise InvalidArgument("levels: got none, expected at least one Level")
    for level in levels:
        if not isinstance(level, Level):
            raise InvalidArgument(f"levels: got {level!r}, expected Level objects")
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise InvalidArgument(f"levels: got the names {names}, expected each name once")
    return levels


def parent_of(level: Level, levels: Sequence[Level]) -> Level | None:
    """Return the next slower level (``every=None`` is the slowest of all), or None for the slowest."""
    slower = [other for other in levels if level.every is not None and (other.every or float("inf")) > level.every]
    return min(slower, key=lambda other: other.every or float("inf"), default=None)


@dataclass(frozen=True)
class Boundary:
    """A moment at which levels are due: ``offset`` tokens into what was counted, and the ``due`` levels in order."""

    offset: int
    due: tuple[Level, ...]


class Clock:
    """Counts tokens and says which levels are due: level l after tokens C_l, 2 C_l, 3 C_l, ...

    However the tokens are cut into calls, the same boundaries come at the same tokens.

    Args:
        levels: the levels, in any order; ``every=None`` levels are never due.
        tokens: tokens counted so far.
    """

    def __init__(self, levels: Iterable[Level], tokens: int = 0) -> None:
        self.levels = check_levels(levels)
        self.tokens = _count("tokens", tokens)

    def boundaries(self, count: int) -> list[Boundary]:
        """Return the boundaries met within the next ``count`` tokens, without counting them."""
        end = self.tokens + _count("count", count)
        periods = {level.every for level in self.levels if level.every}
        ends = {n for every in periods for n in range((self.tokens // every + 1) * every, end + 1, every)}
        return [Boundary(n - self.tokens, self._due(n)) for n in sorted(ends)]

    def advance(self, count: int) -> list[Boundary]:
        """Count ``count`` tokens and return the boundaries met, the last of which may be the last token itself."""
        met = self.boundaries(count)
        self.tokens += count
        return met

    def pieces(self, count: int, chunk_size: int | None = None) -> list[int]:
        """Cut the next ``count`` tokens so that each boundary, and each multiple of ``chunk_size``, ends a piece.

        Returns the sizes, which sum to ``count``: 10 tokens over ``every=4`` give ``[4, 4, 2]``.
        """
        cuts = {boundary.offset for boundary in self.boundaries(count)} | {count}
        if chunk_size is not None:
            first = chunk_size - self.tokens % _count("chunk_size", chunk_size, least=1)
            cuts |= set(range(first, count, chunk_size))
        edges = [0, *sorted(cuts - {0})]
        return [end - start for start, end in pairwise(edges)]

    def resets(self, due: Iterable[Level]) -> tuple[Level, ...]:
        """Return the levels that nested wiring resets when ``due`` are due: those whose parent's period has ended."""
        due = set(due)
        return tuple(level for level in self.levels if parent_of(level, self.levels) in due)

    def state_dict(self) -> dict[str, Any]:
        """Return the tokens counted and the periods they were counted for."""
        return {"tokens": self.tokens, "every": {level.name: level.every for level in self.levels}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; raises InvalidArgument when it was written for other levels."""
        every = {level.name: level.every for level in self.levels}
        if state.get("every") != every:
            raise InvalidArgument(f"state: got the levels {state.get('every')}, expected {every}")
        self.tokens = _count("tokens", state["tokens"])

    def _due(self, tokens: int) -> tuple[Level, ...]:
        return tuple(level for level in self.levels if level.every and tokens % level.every == 0)


def _count(name: str, value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name}: got {value!r}, expected a whole number of at least {least}")
    return value
