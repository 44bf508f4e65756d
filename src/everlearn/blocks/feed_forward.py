"""Gated feed-forward networks, alone or as the levels of a continuum memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.memories.continuum import Continuum

__all__ = ["ContinuumFeedForward", "ResidualSwiGLU", "SwiGLU", "continuum_of_swiglu"]


class SwiGLU(nn.Module):
    """``W_down (silu(W_gate x) . W_up x)`` on ``[..., hidden_size]``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``."""
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up)


class ResidualSwiGLU(SwiGLU):
    """``x + SwiGLU(x)``: a level of a chain, which passes on what it is given."""

    def delta(self, x: Tensor) -> Tensor:
        """What it adds to ``x``."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + delta(x)``."""
        return x + self.delta(x)


class ContinuumFeedForward(Continuum):
    """What a chain of residual levels adds to its input, ``M_k(... M_1(x)) - x`` (Eq. 70 within ``x + CMS(norm(x))``).

    With one level this is a feed-forward network. A level works on the input and all that the levels before it added:
    on their small output alone, a later network would hardly learn (docs/log.md). Independent levels are no chain:
    InvalidArgument.
    """

    def __init__(self, names: Sequence[str], memories: Sequence[ResidualSwiGLU], *, wiring: str = "sequential") -> None:
        if wiring == "independent":
            raise InvalidArgument("wiring: got 'independent', expected 'sequential' or 'nested' for a chain")
        super().__init__(names, memories, wiring=wiring)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[..., hidden_size]``."""
        first, *later = (cast(ResidualSwiGLU, memory) for memory in self.memories)
        added = first.delta(x)
        for level in later:
            added = added + level.delta(x + added)
        return added


def continuum_of_swiglu(hidden_size: int, intermediate_size: int, names: Sequence[str], wiring: str) -> Continuum:
    """A continuum memory in a feed-forward network's place, its width shared out equally among the levels."""
    width = intermediate_size // len(names)
    if width < 1:
        raise InvalidArgument(
            f"intermediate_size: got {intermediate_size}, expected at least one unit a level ({names})"
        )
    if wiring == "independent":
        return Continuum(names, [SwiGLU(hidden_size, width) for _ in names], wiring=wiring)
    return ContinuumFeedForward(names, [ResidualSwiGLU(hidden_size, width) for _ in names], wiring=wiring)
