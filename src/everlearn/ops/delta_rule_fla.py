"""Exact mappings onto the CUDA kernels of the optional package ``flash-linear-attention``.

Only a rule whose recurrence is the same term for term is mapped: the (gated) delta rule. A write with a free vector
``w`` would need ``v = w / rate``, not exact for small rates, so ``delta_rule`` itself never comes here.
Their layout is ``[batch, time, heads, dim]`` with states ``[batch, heads, K, V]``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gated_delta_rule", "serves"]


def serves(q: Tensor) -> bool:
    """Whether the kernels can take this tensor: on CUDA, ``[batch, heads, T, K]``, package installed."""
    return q.is_cuda and q.dim() == 4 and q.dtype is not torch.float64 and (importlib.util.find_spec("fla") is not None)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    rate: Tensor,
    initial_state: Tensor | None,
    kernel: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = alpha_t S_{t-1} (I - rate_t k k^T) + rate_t v k^T`` by ``chunk_gated_delta_rule`` at scale 1.

    Args:
        q, k, v: ``[B, H, T, K]``, ``[B, H, T, K]``, ``[B, H, T, V]``.
        log_decay: ``[B, H, T]`` or ``None``.
        rate: ``[B, H, T]``.
        initial_state: ``[B, H, V, K]`` or ``None``.
        kernel: A function with that kernel's signature; the installed kernel if ``None``.

    Returns:
        Outputs ``[B, H, T, V]`` and the final state ``[B, H, V, K]``.
    """
    run = kernel or importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    decay = torch.zeros_like(rate) if log_decay is None else log_decay
    out, state = run(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        g=decay.transpose(1, 2),
        beta=rate.transpose(1, 2),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.mT.contiguous(),
        output_final_state=True,
    )
    return out.transpose(1, 2), state.mT
