r"""A residual two-layer network as an associative memory, ``M(x) = x + W1 s(W2 x)`` (Eq. 89); names as in ``matrix``.

Both matrices are written with the recurrence of section 2, each with its own input and the gradient by its own output,
taken at the start of the chunk (``e`` the gradient by the memory's output, ``h = s(W2 k)``):

    W2: input k, gradient g2 = (W1^T e) . s'(W2 k)           W1: input h, gradient g1 = e

All memories share ``k``, so their ``W2`` are one stacked matrix with one triangular system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.memories.matrix import Chunk, Params, WriteRule, read_matrix, write_matrix

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
    """``M(x) = x + W1 s(W2 x)``; parameters ``W2`` ``[..., r, d]`` and ``W1`` ``[..., d, r]``."""

    activation: str = "silu"

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

    def write(self, start: Params, now: Params | None, chunk: Chunk, rule: WriteRule) -> tuple[Params, Params, Params]:
        """Write a chunk with gradients taken at ``start`` into ``now`` (``None``: the same as ``start``).

        Returns the parameters after the chunk, and the keys and writes ``(x, U)`` of both matrices for :meth:`read`.
        """
        w2, w1 = start
        (memories, width), length = w2.shape[-3:-1], chunk.k.shape[-1]
        inputs = torch.cat((chunk.k, chunk.v), dim=-1) if rule.self_targets else chunk.k
        pre = (w2.flatten(-3, -2) @ inputs).unflatten(-2, (memories, width))
        activation, slope = ACTIVATIONS[self.activation]
        hidden = activation(pre)
        out = w1 @ hidden
        pre_k, h = (x.split(length, dim=-1)[0] for x in (pre, hidden))
        out_k, *out_v = out.split(length, dim=-1)
        target = chunk.v.unsqueeze(-3)
        if rule.self_targets:
            target = target + out_v[0]
        e = rule.gradient(chunk.k.unsqueeze(-3) + out_k, target.expand_as(out_k))
        g2 = (w1.mT @ e) * slope(pre_k, h)
        w2_now, w1_now = start if now is None else now
        w2_now = w2_now.flatten(-3, -2)
        held2 = pre_k.flatten(-3, -2) if now is None else w2_now @ chunk.k
        held1 = out_k if now is None else w1_now @ h
        u2, w2_after = write_matrix(w2_now, chunk.k, g2.flatten(-3, -2), held2, chunk.rate, chunk.ratios, rule)
        u1, w1_after = write_matrix(w1_now, h, e, held1, chunk.rate.unsqueeze(-2), chunk.ratios.unsqueeze(-3), rule)
        after = (w2_after.unflatten(-2, (memories, width)), w1_after)
        return after, (chunk.k, h), (u2.unflatten(-2, (memories, width)), u1)

    def read(
        self, now: Params, q: Tensor, keys: Params, writes: Params, ratios: Tensor, extra: Params | None
    ) -> Tensor:
        """Read the last memory with ``q`` ``[N, d, C]`` after every token of the chunk: ``q + W1_t s(W2_t q)``."""
        kick2, kick1 = (None, None) if extra is None else (x[:, -1] for x in extra)
        pre = read_matrix(now[0][:, -1], q, keys[0], writes[0][:, -1], ratios, kick2)
        hidden = ACTIVATIONS[self.activation][0](pre)
        return q + read_matrix(now[1][:, -1], hidden, keys[1][:, -1], writes[1][:, -1], ratios, kick1)
