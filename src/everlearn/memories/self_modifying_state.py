"""What a self-modifying memory carries from one call to the next; its size does not depend on the tokens seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from everlearn.errors import InvalidArgument
from everlearn.memories.matrix import Params

__all__ = ["SelfModifyingState"]

GROUPS = ("start", "now", "momentum")
PLAIN = ("log_keep", "conv", "position")


@dataclass(frozen=True)
class SelfModifyingState:
    """The state of all memories of a layer, for ``B`` rows and ``H`` heads.

    Attributes:
        start: parameters at each memory's last chunk boundary, ``[B, H, n, ...]`` each.
        now: parameters after the last token.
        momentum: of each parameter; empty without momentum.
        log_keep: sum of ``log alpha`` since the boundary ``[B, H, n]``.
        conv: the last inputs ``[B, conv_width - 1, hidden_size]``.
        position: tokens since the last boundary of the projections' chunk ``[B]``.
    """

    start: Params
    now: Params
    momentum: Params
    log_keep: Tensor
    conv: Tensor
    position: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> SelfModifyingState:
        """Apply ``change`` to every tensor."""
        start, now, momentum = (tuple(change(x) for x in group) for group in (self.start, self.now, self.momentum))
        return SelfModifyingState(start, now, momentum, *(change(getattr(self, name)) for name in PLAIN))

    def clone(self) -> SelfModifyingState:
        """A copy that shares no memory."""
        return self.map(torch.clone)

    def detach(self) -> SelfModifyingState:
        """The same values without their history."""
        return self.map(torch.Tensor.detach)

    def select(self, rows: Tensor) -> SelfModifyingState:
        """The states of some batch rows, by index; an index may come more than once."""
        return self.map(lambda x: x.index_select(0, rows.to(x.device)))

    def replace(self, **changes: object) -> SelfModifyingState:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, to be saved; :meth:`from_state_dict` is the way back."""
        grouped = {f"{name}.{i}": x for name in GROUPS for i, x in enumerate(getattr(self, name))}
        return {**grouped, **{name: getattr(self, name) for name in PLAIN}}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> SelfModifyingState:
        """Rebuild a state from :meth:`state_dict`; raises InvalidArgument where a tensor is missing or unknown."""
        groups: dict[str, Params] = {}
        for name in GROUPS:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            groups[name] = tuple(tensors[f"{name}.{i}"] for i in range(count) if f"{name}.{i}" in tensors)
        known = {f"{name}.{i}" for name in GROUPS for i in range(len(groups[name]))} | set(PLAIN)
        if known != set(tensors) or not groups["start"] or len(groups["start"]) != len(groups["now"]):
            wrong = sorted(known ^ set(tensors)) or "unequal groups"
            raise InvalidArgument(f"tensors: got names that do not make a state ({wrong})")
        start, now, momentum = (groups[name] for name in GROUPS)
        return cls(start, now, momentum, *(tensors[name] for name in PLAIN))
