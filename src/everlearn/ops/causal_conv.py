"""Short causal depthwise convolution over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["causal_conv"]


def causal_conv(x: Tensor, weight: Tensor, age: Tensor | None = None) -> Tensor:
    """``y_t = sum_j weight_{K-1-j} x_{t-j}`` for every channel by itself.

    Args:
        x: inputs behind the ``K - 1`` that came before them ``[B, K - 1 + T, D]``.
        weight: taps, the oldest first ``[K, D]``.
        age: how many inputs back each output may see ``[B, T]``; None is all.

    Returns:
        ``[B, T, D]``.
    """
    if age is None:
        return _Conv.apply(x, weight) if torch.is_grad_enabled() else _slide(x, weight)  # type: ignore[return-value]
    taps = weight.shape[0]
    length = x.shape[1] - taps + 1
    out = torch.zeros_like(x[:, :length])
    for tap in range(taps):
        term = x[:, tap : tap + length] * weight[tap]
        out = out + torch.where((age >= taps - 1 - tap).unsqueeze(-1), term, 0.0)
    return out


def _slide(x: Tensor, weight: Tensor) -> Tensor:
    """``y_t = sum_j weight_j x_{t + j}``, summed in place."""
    taps, length = weight.shape[0], x.shape[1] - weight.shape[0] + 1
    out = x[:, :length] * weight[0]
    for tap in range(1, taps):
        out.addcmul_(x[:, tap : tap + length], weight[tap])
    return out


class _Conv(torch.autograd.Function):
    """Keeps its inputs only; the backward is made of differentiable operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _slide(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (d_out,), (x, weight) = grads, ctx.saved_tensors
        taps, length = weight.shape[0], d_out.shape[1]
        d_x = _slide(F.pad(d_out, (0, 0, taps - 1, taps - 1)), weight.flip(0))
        d_weight = [(d_out * x[:, tap : tap + length]).sum((0, 1)) for tap in range(taps)]
        return d_x, torch.stack(d_weight)
