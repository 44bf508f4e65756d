"""Whitening by the anchor: a memory learns in coordinates in which what is ordinary is small (memory-runtime.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from everlearn.memories.gated import GatedMemory

FRACTION = 0.1  # of the mean eigenvalue: directions with less than this pass nearly as they are


def whitener(moment: Tensor, fraction: float = FRACTION) -> Tensor:
    """Return ``P = c (l / (C + l))^(1/2)`` [d, d] for a second moment C, l a ``fraction`` of its mean eigenvalue.

    ``c`` keeps the mean square: ``trace(P C P) = trace(C)``. P is symmetric and invertible.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    ridge = fraction * values.mean()
    damped = (ridge / (values + ridge)).sqrt()
    scale = (values.sum() / (damped.square() * values).sum()).sqrt()
    return ((vectors * (scale * damped)) @ vectors.T).to(moment.dtype)


class Whitened:
    """The parameters that are trained: of each memory W1 and b themselves, and V in place of W2 = V P.

    Reading ``W2 x = V (P x)``, so the memory is the same function; only what a step of the optimiser does differs.
    A memory that has learned nothing yet (W1 = 0) starts from V = W2.

    Args:
        memories: those that learn, lowest layer first.
        moments: second moments [layers, d, d] of what they read, in the same order.
    """

    def __init__(self, memories: Sequence[GatedMemory], moments: Tensor) -> None:
        self._keys: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.params: list[Tensor] = []
        with torch.no_grad():
            for memory, moment in zip(memories, moments, strict=True):
                P = whitener(moment)
                untouched = not bool(memory.W1.any())
                V = memory.W2.detach().clone() if untouched else torch.linalg.solve(P, memory.W2.T).T.contiguous()
                self._keys.append((memory.W2, V, P))
                self.params += [memory.W1, memory.b, V]
        self.write()

    def collect(self) -> None:
        """Turn the gradients of W2 into those of V."""
        for W2, V, P in self._keys:
            V.grad = None if W2.grad is None else W2.grad @ P
            W2.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Write V into the memories, after a step."""
        for W2, V, P in self._keys:
            W2.copy_(V @ P)
