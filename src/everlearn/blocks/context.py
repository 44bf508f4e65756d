"""What all layers of one call share: where documents begin, which tokens count, positions, masks and chunk plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from everlearn.memories.self_modifying_plan import FAR, Plan

__all__ = ["Context", "MixerState", "Ranks", "visible_keys"]


class MixerState(Protocol):
    """What a sequence mixer carries between calls."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        ...

    def select(self, rows: Tensor) -> Any:
        """The states of some batch rows, by index."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, batch rows first."""
        ...


@dataclass(frozen=True)
class Ranks:
    """The tokens of each row in their order, masked ones moved to the end.

    Attributes:
        token: index of the token of each rank ``[B, T]``.
        rank: rank of each token ``[B, T]``, the inverse of ``token``.
        count: tokens that count ``[B]``.
        age: by rank, tokens of the same document before it, as far as they are known: a document that began before
            the call has at least ``FAR`` of them ``[B, T]``.
        last_age: the age of the last token that counts, ``FAR`` where there is none ``[B]``.
    """

    token: Tensor
    rank: Tensor
    count: Tensor
    age: Tensor
    last_age: Tensor


@dataclass
class Context:
    """The call at hand.

    Attributes:
        positions: position of each token in its document ``[B or 1, T]``.
        mask: which tokens count ``[B, T]``, or None for all.
        starts: tokens that begin a document ``[B, T]``, or None for none.
        visible: for attention, which keys each query may see ``[B, 1, T, S]``, or None for all up to itself.
        plans: chunk plans made so far, by chunk sizes; layers of one size share one.
    """

    positions: Tensor
    mask: Tensor | None = None
    starts: Tensor | None = None
    visible: Tensor | None = None
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> Ranks | None:
        """See :class:`Ranks`; None where every token counts and none begins a document."""
        given = self.mask if self.mask is not None else self.starts
        if given is None:
            return None
        kept = torch.ones_like(given) if self.mask is None else self.mask
        token = torch.argsort((~kept).int(), dim=1, stable=True)
        rank = torch.argsort(token, dim=1)
        count, index = kept.sum(1), torch.arange(kept.shape[1], device=kept.device)
        age = torch.full_like(token, FAR)
        if self.starts is not None:
            begins = self.starts.gather(1, token) & (index < count[:, None])
            begun = torch.where(begins, index, -FAR).cummax(1).values
            age = (index - begun).clamp(max=FAR)
        last = age.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
        return Ranks(token, rank, count, age, torch.where(count > 0, last, FAR))


def visible_keys(length: int, seen: int, mask: Tensor | None, first: Tensor | None) -> Tensor | None:
    """Which of ``seen + length`` keys each of the last ``length`` tokens may see.

    Args:
        length: queries, T.
        seen: keys before them.
        mask: which keys are tokens ``[B, seen + T]``, or None for all.
        first: index of the first key of each query's document ``[B, T]``, or None for 0.

    Returns:
        ``[B or 1, 1, T, seen + T]`` booleans, or None where that is the plain causal mask of a call without a past.
    """
    if mask is None and first is None and (seen == 0 or length == 1):
        return None
    device = mask.device if mask is not None else first.device if first is not None else None
    query = torch.arange(seen, seen + length, device=device)[:, None]
    key = torch.arange(seen + length, device=device)[None, :]
    allowed = (key <= query)[None]
    if first is not None:
        allowed = allowed & (key >= first[..., None])
    if mask is not None:
        allowed = allowed & mask[:, None, :].bool()
    return (allowed | (key == query)).unsqueeze(1)  # a masked query sees itself, so that its softmax is finite
