"""What most sequence mixers carry between calls: a few named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["TensorState"]


@dataclass(frozen=True)
class TensorState:
    """Tensors by name, batch rows first; their size does not depend on the tokens seen."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors.values())

    def select(self, rows: Tensor) -> TensorState:
        """The states of some batch rows, by index."""
        return TensorState({name: x.index_select(0, rows.to(x.device)) for name, x in self.tensors.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name; :meth:`from_state_dict` is the way back."""
        return dict(self.tensors)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> TensorState:
        """Rebuild from :meth:`state_dict`."""
        return cls(dict(tensors))
