"""Where chunks begin and end when a call's tokens meet memories that stand in the middle of one.

A memory's chunks are counted from the start of its document. Rows of a batch may stand at different places: one prompt
is shorter than another, documents are packed behind each other. The plan lays the tokens out so that all rows meet
their chunk boundaries together; slots that hold no token write nothing and do not decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["FAR", "Layout", "Piece", "Plan", "make_plan"]

FAR = 1 << 30
"""More tokens than any convolution looks back."""


@dataclass(frozen=True)
class Piece:
    """Slots ``begin`` to ``end``, within one chunk.

    Attributes:
        fresh: every row stands at the start of a chunk.
        done: whether the chunk ends here, for all rows or for each (``[B]``).
        reset: rows ``[B]`` where a document starts here, or None.
    """

    begin: int
    end: int
    fresh: bool
    done: bool | Tensor
    reset: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """A move of tokens to slots.

    Attributes:
        source: token of each slot ``[B, L]`` (any, where there is none).
        valid: which slots hold a token ``[B, L]``.
        age: tokens of its own document before each slot's token, as far as a convolution sees them ``[B, L]``.
        slot: slot of each token ``[B, T]`` (any, where masked).
        kept: which tokens have a slot ``[B, T]``.
        offset: slots before each row's first token ``[B]``.
        last: slot of each row's last token, ``offset - 1`` without any ``[B]``.
    """

    source: Tensor
    valid: Tensor
    age: Tensor
    slot: Tensor
    kept: Tensor
    offset: Tensor
    last: Tensor

    def to_slots(self, x: Tensor) -> Tensor:
        """Tokens ``[B, T, D]`` in their slots ``[B, L, D]``, zero where a slot holds none."""
        slots = x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.where(self.valid.unsqueeze(-1), slots, 0.0)

    def from_slots(self, y: Tensor) -> Tensor:
        """Back from slots to tokens, zero where a token was masked."""
        out = y.gather(1, self.slot.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
        return torch.where(self.kept.unsqueeze(-1), out, 0.0)


@dataclass(frozen=True)
class Plan:
    """The pieces of a call by the projections' chunks, each with its pieces by the main memory's chunks."""

    pieces: tuple[tuple[Piece, tuple[Piece, ...]], ...]
    slots: int
    position: Tensor
    layout: Layout | None = None


def make_plan(
    length: int,
    position: Tensor,
    chunk_size: int,
    outer_chunk_size: int,
    *,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Plan:
    """Plan a call.

    Args:
        length: tokens of the call, T.
        position: tokens each row has seen since its last outer boundary ``[B]``.
        chunk_size: chunk of the main memory.
        outer_chunk_size: chunk of the projections' memories, a multiple of ``chunk_size``.
        mask: which tokens count ``[B, T]``, or None for all.
        starts: tokens that begin a document ``[B, T]``, or None for none.

    Returns:
        the plan; its ``position`` is that after the call.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    if starts is not None and not bool(starts.any()):
        starts = None
    places = position.tolist()
    if mask is None and starts is None and (length == 1 or len(set(places)) == 1):
        after = (position + length) % outer_chunk_size
        if len(set(places)) == 1:
            return Plan(_aligned(places[0], length, chunk_size, outer_chunk_size), length, after)
        inner = Piece(0, 1, False, (position + 1) % chunk_size == 0)
        return Plan(((Piece(0, 1, False, after == 0), (inner,)),), 1, after)
    return _laid_out(length, position, chunk_size, outer_chunk_size, mask, starts)


def _spans(offset: int, length: int, chunk_size: int) -> list[tuple[int, int]]:
    """Cut ``length`` tokens that follow ``offset`` others at multiples of ``chunk_size``."""
    cuts = [0, *range(chunk_size - offset % chunk_size, length, chunk_size), length]
    return list(pairwise(cuts))


def _aligned(offset: int, length: int, chunk_size: int, outer: int) -> tuple[tuple[Piece, tuple[Piece, ...]], ...]:
    def piece(begin: int, end: int, size: int) -> Piece:
        return Piece(begin, end, (offset + begin) % size == 0, (offset + end) % size == 0)

    return tuple(
        (
            piece(begin, end, outer),
            tuple(piece(begin + a, begin + b, chunk_size) for a, b in _spans(offset + begin, end - begin, chunk_size)),
        )
        for begin, end in _spans(offset, length, outer)
    )


def _laid_out(
    length: int, position: Tensor, chunk_size: int, outer: int, mask: Tensor | None, starts: Tensor | None
) -> Plan:
    batch, device = position.shape[0], position.device
    kept = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    begins = torch.zeros_like(kept) if starts is None else starts.bool() & kept

    # tokens of each row moved to the front, in order
    order = torch.argsort((~kept).int(), dim=1, stable=True)
    count = kept.sum(1)
    rank = torch.arange(length, device=device).expand(batch, length)
    real = rank < count[:, None]
    begin = begins.gather(1, order) & real
    first_rank = torch.where(begin, rank, 0).cummax(1).values
    in_first = begin.int().cumsum(1) == 0
    offset = torch.where(begin[:, 0], 0, position)
    place = rank - first_rank + torch.where(in_first, offset[:, None], 0)

    # every document begins at the next multiple of the outer chunk
    used = torch.cat((torch.zeros_like(place[:, :1]), place[:, :-1] + 1), dim=1)
    base = torch.where(begin, -(-used // outer) * outer, 0).cumsum(1)
    slot_of_rank = base + place
    last = torch.where(real, slot_of_rank, -1).max(1).values
    last = torch.where(count > 0, last, offset - 1)
    slots = int(last.max()) + 1 if bool((count > 0).any()) else 0

    def to_slots(values: Tensor, fill: int) -> Tensor:
        table = torch.full((batch, slots + 1), fill, dtype=values.dtype, device=device)
        index = torch.where(real, slot_of_rank, slots).clamp(max=slots)
        return table.scatter(1, index, values)[:, :slots]

    valid = to_slots(real.int(), 0).bool()
    age = torch.where(in_first, FAR, place)  # what came before the call is in the convolution's state
    begins_at = to_slots(begin.int(), 0).bool()
    slot = torch.zeros_like(order).scatter(1, order, slot_of_rank)
    layout = Layout(to_slots(order, 0), valid, to_slots(age, 0), slot.clamp(max=max(slots - 1, 0)), kept, offset, last)

    def piece(start: int, end: int, size: int) -> Piece:
        done = valid[:, end - 1] if end - start == size else False
        reset = begins_at[:, start] if bool(begins_at[:, start].any()) else None
        return Piece(start, end, False, done, reset)

    pieces = tuple(
        (piece(a, b, outer), tuple(piece(a + c, a + d, chunk_size) for c, d in _spans(0, b - a, chunk_size)))
        for a, b in _spans(0, slots, outer)
        if b > a
    )
    return Plan(pieces, slots, (last + 1) % outer, layout)
