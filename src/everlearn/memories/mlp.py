r"""A residual two-layer network as an associative memory, ``M(x) = x + W1 s(W2 x)`` (Eq. 89); names as in ``matrix``.

Both matrices are written with the recurrence of section 2, each with its own input and the gradient by its own output,
taken at the start of the chunk (``e`` the gradient by the memory's output, ``h = s(W2 k)``):

    W2: input k, gradient g2 = (W1^T e) . s'(W2 k)           W1: input h, gradient g1 = e

All memories share ``k``, so their ``W2`` are one stacked matrix with one triangular system.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.memories.matrix import Chunk, Params, Trace, WriteRule, read_matrix, write_matrix
from everlearn.ops.recompute import Call

__all__ = ["ACTIVATIONS", "MlpMemory"]


def _silu_slope(x: Tensor, value: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return torch.addcmul(gate, value, 1 - gate)


def _tanh_slope(x: Tensor, value: Tensor) -> Tensor:
    return 1 - value * value


def _relu_slope(x: Tensor, value: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


# name -> s, and its slope s' from x and s(x)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "tanh": (torch.tanh, _tanh_slope),
    "relu": (torch.relu, _relu_slope),
}


@dataclass(frozen=True)
class MlpMemory:
    """``M(x) = x + W1 s(W2 x)``; parameters ``W2`` ``[..., r, d]`` and ``W1`` ``[..., d, r]``.

    ``forgets``: whether ``W2`` and ``W1`` decay and erase; one that does not is written by plain gradient descent.
    """

    activation: str = "silu"
    forgets: tuple[bool, ...] = (True, True)

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InvalidArgument(f"activation: got {self.activation!r}, expected one of {sorted(ACTIVATIONS)}")

    def shapes(self, size: int, width: int) -> tuple[tuple[int, int], ...]:
        """The shapes of the parameters of one memory."""
        return ((width, size), (size, width))

    def start(self, count: int, heads: int, size: int, width: int) -> Params:
        """Starts ``[heads, count, ...]``: ``W2 ~ N(0, 1)`` (inputs have unit length), ``W1 ~ N(0, 0.02^2)``."""
        return torch.randn(heads, count, width, size), 0.02 * torch.randn(heads, count, size, width)

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """``M(x)`` for every memory's own input ``[..., n, d, C]``."""
        w2, w1 = params
        return x + w1 @ ACTIVATIONS[self.activation][0](w2 @ x)

    def write(
        self, start: Params, now: Params | None, chunk: Chunk, rule: WriteRule, again: Call
    ) -> tuple[Params, tuple[Trace, ...]]:
        """Write a chunk with gradients taken at ``start`` into ``now`` (``None``: the same as ``start``).

        Returns the parameters after the chunk, and what was written into the last memory, for :meth:`read`. ``again``:
        see :func:`everlearn.memories.self_modifying_chunk.memorize`.
        """
        w2, w1 = start
        rows = w2.shape[-3:-1]
        activation, slope = ACTIVATIONS[self.activation]

        def gradients(w2: Tensor, w1: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            pre = w2 @ k
            h = activation(pre)
            out = w1 @ h.unflatten(-2, rows)
            if rule.self_targets and rule.target_gradient and rule.objective == "l2":  # M(k) - M(v) in one product
                behind = activation(w2 @ v)
                e = rule.bounded((k - v).unsqueeze(-3) + w1 @ (h - behind).unflatten(-2, rows))
            elif rule.self_targets:
                e = rule.gradient(k.unsqueeze(-3) + out, v.unsqueeze(-3) + w1 @ activation(w2 @ v).unflatten(-2, rows))
            else:
                e = rule.gradient(k.unsqueeze(-3) + out, v.unsqueeze(-3).expand_as(out))
            return pre, h, out, (w1.mT @ e).flatten(-3, -2) * slope(pre, h), e

        held2, h, held1, g2, e = again(gradients, w2.flatten(-3, -2), w1, chunk.k, chunk.v)
        h = h.unflatten(-2, rows)
        w2_now, w1_now = start if now is None else now
        w2_now = w2_now.flatten(-3, -2)
        if now is not None:
            held2, held1 = w2_now @ chunk.k, w1_now @ h
        (ratios2, rule2), (ratios1, rule1) = (_forgetting(chunk.ratios, rule, own) for own in self.forgets)
        p2, strength2, w2_after = write_matrix(w2_now, chunk.k, g2, held2, chunk.rate, ratios2, rule2)
        p1, strength1, w1_after = write_matrix(w1_now, h, e, held1, chunk.rate, ratios1, rule1)
        after = w2_after.unflatten(-2, rows), w1_after
        last2 = Trace(chunk.k, p2.unflatten(-2, rows)[:, -1], strength2)
        return after, (last2, Trace(h[:, -1], p1[:, -1], strength1[:, -1]))

    def read(self, now: Params, q: Tensor, traces: Sequence[Trace], ratios: Tensor, extra: Params | None) -> Tensor:
        """Read one memory with ``q`` ``[N, d, C]`` after every token of the chunk: ``q + W1_t s(W2_t q)``."""
        kick2, kick1 = (None, None) if extra is None else extra
        ratios2, ratios1 = (ratios if own else _lasting(ratios) for own in self.forgets)
        hidden = ACTIVATIONS[self.activation][0](read_matrix(now[0], q, traces[0], ratios2, kick2))
        return q + read_matrix(now[1], hidden, traces[1], ratios1, kick1)


def _forgetting(ratios: Tensor, rule: WriteRule, own: bool) -> tuple[Tensor, WriteRule]:
    return (ratios, rule) if own else (_lasting(ratios), replace(rule, rule="gd"))


def _lasting(ratios: Tensor) -> Tensor:
    """Decay ratios of a matrix that does not decay."""
    return torch.ones_like(ratios).tril()
