"""References: which earlier message says who or what a name in a new one is.

"My sister is named Paloma." tells what "Paloma moved to Asheville." is an answer to. A word that few messages have is
such a name if the first of them makes it much likelier: then it is read there in the earlier one's light.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

RARE, FEW = 0.05, 4  # share of the observations that may have a word for it to tell anything, and how many always may
NAMED = 5.0  # nats by which the earlier message makes the word likelier

Follows = Callable[[Sequence[str], Sequence[str]], list[float]]


class Earlier(NamedTuple):
    """What was ``said`` in an older ``observation``: the sentence that a new message refers to."""

    observation: int
    said: str


def words(text: str) -> list[str]:
    raise NotImplementedError
