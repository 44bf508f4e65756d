"""Short causal depthwise convolution over time."""

from __future__ import annotations

import torch
from torch import Tensor

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
    taps = weight.shape[0]
    length = x.shape[1] - taps + 1
    out = torch.zeros_like(x[:, :length])
    for tap in range(taps):
        term = x[:, tap : tap + length] * weight[tap]
        if age is not None:
            term = torch.where((age >= taps - 1 - tap).unsqueeze(-1), term, 0.0)
        out = out + term
    return out
