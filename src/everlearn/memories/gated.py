"""The gated memory: a residual memory that speaks only where a gate, computed once a pass, is open."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument

_EPS = 1e-5


def rms_normalise(x: Tensor) -> Tensor:
    """Return ``x`` [..., d] scaled to mean square 1, in its own dtype."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS)


class Gate(nn.Module):
    """``g(x) = clamp(w . x/rms(x) + b, 0, 1)``: exactly 0, not just small, where the input is ordinary.

    One gate serves all memories of a stack: the memory of the lowest layer opens it with its own input, the others take
    what it said in this pass. Its input lies below every memory, so it does not depend on what was learned: what it
    shuts out passes through the model exactly as through the base. Starts closed everywhere (w = 0, b = -1). ``w`` and
    ``b`` are buffers, fitted in closed form or by :meth:`set_`, never by the optimiser of the memories.

    Args:
        hidden_size: size d of the input.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        if hidden_size < 1:
            raise InvalidArgument(f"hidden_size: got {hidden_size}, expected at least 1")
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(hidden_size))
        self.register_buffer("bias", torch.full((), -1.0))
        self._pass = _Pass()

    @torch.no_grad()
    def set_(self, weight: Tensor, bias: Tensor) -> None:
        """Write ``w`` [d] and ``b`` [] in place."""
        if weight.shape != self.weight.shape or bias.shape != self.bias.shape:
            raise InvalidArgument(f"weight, bias: got {tuple(weight.shape)}, {tuple(bias.shape)}, expected [d], []")
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return g [..., 1] for ``x`` [..., d]."""
        return self.raw(x).clamp(0, 1)

    def raw(self, x: Tensor) -> Tensor:
        """Return g before it is clamped."""
        return (rms_normalise(x.to(self.weight.dtype)) @ self.weight + self.bias)[..., None]

    def open(self, x: Tensor) -> Tensor:
        """Compute g for this pass, for the memories above too (an activation of the pass, kept per thread)."""
        self._pass.raw = self.raw(x)
        return self.opened()

    def opened(self) -> Tensor:
        """Return what :meth:`open` computed in this pass."""
        return self.opened_raw().clamp(0, 1)

    def opened_raw(self) -> Tensor:
        """Return the same before it is clamped."""
        if self._pass.raw is None:
            raise InvalidArgument("gate: the memory that opens it has not run; run the model from its lowest memory")
        return self._pass.raw


class _Pass(threading.local):
    """The gate's value, not clamped, in the pass that this thread runs; never copied with the module."""

    raw: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> _Pass:
        return _Pass()

    def __reduce__(self) -> tuple[type[_Pass], tuple[()]]:
        return _Pass, ()


class GatedMemory(nn.Module):
    """``M(x) = x + g W1 silu(W2 x/rms(x) + b)``, exactly the identity until W1 first moves or where g = 0.

    Args:
        hidden_size: size d of what is read and written.
        width: hidden units r; W1 is [d, r], W2 is [r, d], b is [r]. With 0 it only opens the gate.
        gate: shared by all memories of a stack.
        opens: whether this is the lowest memory, which opens the gate and keeps it in its state.
    """

    def __init__(self, hidden_size: int, width: int, gate: Gate, *, opens: bool) -> None:
        super().__init__()
        if hidden_size < 1 or width < (not opens):
            raise InvalidArgument(
                f"hidden_size, width: got {hidden_size}, {width}, expected at least 1 (width 0 only to open a gate)"
            )
        self.W1 = nn.Parameter(torch.zeros(hidden_size, width))
        self.W2 = nn.Parameter(torch.randn(width, hidden_size) * hidden_size**-0.5)
        self.b = nn.Parameter(torch.zeros(width))
        self.opens = opens
        self._shared = (gate,)  # in a tuple, so that it is a submodule of the lowest memory alone
        if opens:
            self.gate = gate

    def extra_repr(self) -> str:
        """Return the sizes, as ``repr`` and a memory file's layout show them."""
        return f"hidden_size={self.W1.shape[0]}, width={self.W1.shape[1]}"

    def delta(self, x: Tensor) -> Tensor:
        """Return what the memory adds to ``x`` [..., hidden_size]."""
        gate = self._shared[0].open(x) if self.opens else self._shared[0].opened()
        read = rms_normalise(x.to(self.W2.dtype))
        return (gate * F.linear(F.silu(F.linear(read, self.W2, self.b)), self.W1)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + delta(x)``."""
        return x + self.delta(x)


def gated_memories(width: int, *, below: bool = False) -> _Factory:
    """Return a factory for ``stack_levels(memory=...)``: memories of ``width`` under one gate, lowest layer first.

    With ``below`` the lowest layer only opens the gate for those above.
    """
    return _Factory(width, below)


class _Factory:
    def __init__(self, width: int, below: bool) -> None:
        self.width, self.below = width, below
        self.gate: Gate | None = None

    def __call__(self, hidden_size: int) -> GatedMemory:
        opens = self.gate is None
        if self.gate is None:
            self.gate = Gate(hidden_size)
        return GatedMemory(hidden_size, 0 if opens and self.below else self.width, self.gate, opens=opens)
