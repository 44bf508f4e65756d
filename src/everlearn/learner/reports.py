"""What a learner reports: what a sleep did, and of what a question reminds it."""

from __future__ import annotations

from dataclasses import dataclass

from everlearn.learner.consolidation import Report
from everlearn.learner.store import Observation


@dataclass(frozen=True)
class SleepReport:
    """What a sleep did.

    Attributes:
        night: number of the new night, None when there was nothing to learn.
        consolidated: ids of the observations learned.
        dismissed: ids of those judged to be small talk, or of which nothing could be dreamt.
        superseded: ids of older observations some of whose dreams gave way to what was told later.
        learning: what the consolidation measured, None when there was nothing to learn.
        seconds: of the whole sleep.
    """

    night: int | None
    consolidated: tuple[int, ...]
    dismissed: tuple[int, ...]
    superseded: tuple[int, ...]
    learning: Report | None
    seconds: float


@dataclass(frozen=True)
class Reminder:
    """An observation that a question brings up.

    Attributes:
        observation: what was told.
        likeness: of the question to those dreamt of it, a cosine in the memory's coordinates, and .3 of that of its
            words with those of the reply.
        heard: whether it speaks where the reply begins: the gate is open there, and no other is as like.
    """

    observation: Observation
    likeness: float
    heard: bool
