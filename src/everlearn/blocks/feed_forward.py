"""Gated feed-forward networks, alone or as the levels of a continuum memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.memories.continuum import Continuum

__all__ = ["ResidualSwiGLU", "SwiGLU", "continuum_of_swiglu"]


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
    """``x + SwiGLU(x)``: a later level of a chain, which passes on what the earlier ones made."""

    def delta(self, x: Tensor) -> Tensor:
        """What it adds to ``x``."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + delta(x)``."""
        return x + self.delta(x)


def continuum_of_swiglu(hidden_size: int, intermediate_size: int, names: Sequence[str], wiring: str) -> Continuum:
    """A continuum memory in a feed-forward network's place, its width shared out equally among the levels.

    The first level of a chain is a plain network (it starts from the layer's normed input); later ones are residual.
    """
    width = intermediate_size // len(names)
    if width < 1:
        raise InvalidArgument(
            f"intermediate_size: got {intermediate_size}, expected at least one unit a level ({names})"
        )
    chained = wiring != "independent"
    kinds = [ResidualSwiGLU if chained and i else SwiGLU for i in range(len(names))]
    return Continuum(names, [kind(hidden_size, width) for kind in kinds], wiring=wiring)
