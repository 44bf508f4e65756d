"""The memory in the weights: a stack on a shared base, its slow level, and what training it needs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument
from everlearn.learner.anchor import Anchor, load_anchor, read_pairs
from everlearn.learner.chat import chat_prompt
from everlearn.learner.sampling import encode
from everlearn.learner.voice import Voice, load_voice
from everlearn.levels import Level
from everlearn.memories.carried import embedded
from everlearn.memories.gated import Gate, GatedMemory, gated_memories
from everlearn.memories.residual import ResidualMemory
from everlearn.memories.slots import LIKEST, SlotMemory, slot_memories
from everlearn.models.memory_file import fingerprint, load_memory, memory_bytes
from everlearn.models.stacking import continua, is_stacked, memory_state, reset_level, stack_levels
from everlearn.models.structure import find_decoder
from everlearn.models.trunk import SplitModel

SLOW = "slow"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Layout:
    """Where the slow level sits and what it is, depths as shares of the model's layers.

    Attributes:
        gate: depth at which the gate reads.
        first: depth of the lowest memory; what lies below runs once per text. 1 is the last layer alone.
        last: depth at which the memories end.
        width: hidden units of each memory that is trained by gradient; None: slots in the last of the layers, which
            are written in closed form and grow with what they hold.
        day_width: hidden units of the memories of the levels above the slow one, if there are any.
    """

    gate: float = 0.4
    first: float = 1.0
    last: float = 1.0
    width: int | None = None
    day_width: int = 16

    def layers(self, count: int) -> list[int]:
        """Return the layers that carry memories, of a model of ``count`` layers; the first one opens the gate."""
        first = min(round(self.first * count), count - 1)
        carrying = list(range(first, max(first + 1, round(self.last * count))))
        return sorted({min(round(self.gate * count), first), *carrying})

    def below(self, count: int) -> bool:
        """Return whether the gate reads below the lowest memory."""
        return self.layers(count)[0] < min(round(self.first * count), count - 1)


TRAINED = Layout(first=0.8, width=128)  # memories that are trained by gradient: what slots are compared with


class Weights:
    """One user's memory as weights beside those of ``base``, which it never writes.

    Args:
        base: the base model, not stacked; any number of users share it.
        tokenizer: its tokenizer.
        levels: the levels faster than the slow one, each with a period.
        layout: where the memories sit.
        voice: the base's own voice; default: from the cache, or sampled when first needed.
        progress: called with what is being done and the share done, from 0 to 1.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        levels: Sequence[Level],
        layout: Layout,
        voice: Voice | None,
        progress: Progress,
    ) -> None:
        if is_stacked(base):
            raise InvalidArgument("model: got a stacked model, expected its base")
        if any(level.every is None for level in levels):
            raise InvalidArgument("levels: got one without a period; the slow level is there by itself")
        self.base, self.tokenizer, self.layout = base, tokenizer, layout
        self.name = getattr(base.config, "_name_or_path", "") or type(base).__name__
        self.fingerprint = fingerprint(base)
        self.model = self._stack(levels)
        self._voice, self._progress = voice, progress
        self._split: SplitModel | None = None
        self._anchor: Anchor | None = None

    def load(self, state: bytes | None) -> None:
        """Put a night's snapshot, or the untouched start (None), into the slow level, in place."""
        if state is None:
            reset_level(self.model, SLOW)
            return
        load_memory(self.model, state)

    def dump(self) -> bytes:
        """Return a snapshot of the slow level as it is now, for :meth:`load`; nothing of it touches a disk."""
        return memory_bytes(self.model, level=SLOW)

    @property
    def bytes(self) -> int:
        """Size of the slow level."""
        return sum(tensor.numel() * tensor.element_size() for tensor in memory_state(self.model, SLOW).values())

    @property
    def layers(self) -> list[int]:
        """The layers that carry memories."""
        return list(continua(self.model))

    @property
    def gate(self) -> Gate:
        """The gate of the slow level."""
        lowest = next(iter(continua(self.model).values()))
        memory = lowest.memories[lowest.names.index(SLOW)]
        if not isinstance(memory, GatedMemory | SlotMemory):
            raise InvalidArgument(f"memory: got {type(memory).__name__} in the lowest layer, expected one with a gate")
        return memory.gate

    @property
    def slots(self) -> list[SlotMemory]:
        """The slow level's memories of slots, lowest layer first; none in a layout that is trained by gradient."""
        memories = (memory for continuum in continua(self.model).values() for memory in continuum.memories)
        return [memory for memory in memories if isinstance(memory, SlotMemory)]

    def be_cautious(self, least: float) -> None:
        """Let no slot begin a reply where a question is less like those dreamt than ``least``."""
        number = isinstance(least, int | float) and not isinstance(least, bool)
        if not number or not -LIKEST <= least <= LIKEST or not self.slots:
            raise InvalidArgument(
                f"caution: got {least!r}, expected a likeness from {-LIKEST} to {LIKEST}, and a layout of slots"
            )
        for memory in self.slots:
            memory.asked = float(least)

    def reminded(self, question: str) -> tuple[dict[int, float], int | None]:
        """Return how like ``question`` is to what was dreamt of each observation, and which speaks, if any does."""
        if not self.slots:
            raise InvalidArgument("layout: got one that is trained by gradient, expected slots, which have owners")
        memory, ids = self.slots[-1], encode(self.tokenizer, chat_prompt(self.tokenizer, question))
        below, above = read_pairs(self.split, self.tokenizer, [question])[0].to(memory.lean.dtype).chunk(2)
        about = memory.gist([memory.gist.asked(ids)], functools.partial(embedded, self.base))[0]
        likeness = memory.likeness(above, about)
        nearest = max(likeness, key=likeness.__getitem__, default=None)
        if (
            nearest is None
            or likeness[nearest] <= memory.bar(above, about)
            or memory.opening(above, self.gate.raw(below)) <= 0
        ):
            return likeness, None
        return likeness, nearest

    @property
    def split(self) -> SplitModel:
        """The stack, cut below the slow level's lowest memory; the faster levels must be at their start."""
        if self._split is None:
            self._split = SplitModel(self.model, SLOW)
        return self._split

    @property
    def anchor(self) -> Anchor:
        """The base's own voice behind the trunk, made on an untouched stack of the same layout."""
        if self._anchor is None:
            voice = self._voice or load_voice(self.base, self.tokenizer, progress=self._progress)
            self._progress("reading the base model's own voice", 0.0)
            fresh = SplitModel(self._stack(()), SLOW)
            self._anchor = load_anchor(
                fresh, self.tokenizer, voice, f"{self.fingerprint}-{self.layers[0]}-{fresh.layer}-{_digest(voice)}"
            )
        return self._anchor

    def _stack(self, levels: Sequence[Level]) -> PreTrainedModel:
        day: dict[str, Any] = {level.name: self._day_memory for level in levels}
        count = len(find_decoder(self.base).mlps)
        width, below = self.layout.width, self.layout.below(count)
        slow = slot_memories(below=below) if width is None else gated_memories(width, below=below)
        return stack_levels(
            self.base,
            [*levels, Level(SLOW)],
            wiring="independent",
            layers=self.layout.layers(count),
            memory={**day, SLOW: slow},
        )

    def _day_memory(self, hidden_size: int) -> ResidualMemory:
        return ResidualMemory(hidden_size, self.layout.day_width)


def _digest(voice: Voice) -> str:
    return hashlib.sha256(repr(voice).encode()).hexdigest()[:12]
