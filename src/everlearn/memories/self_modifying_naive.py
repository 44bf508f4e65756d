"""The definition of a self-modifying memory, token by token: the reference of :mod:`everlearn.memories.self_modifying`.

Gradients come from ``torch.func.grad`` on the inner loss as it is written; nothing is batched over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.memories.matrix import Params
from everlearn.memories.self_modifying import SelfModifyingMemory
from everlearn.memories.self_modifying_config import SelfModifyingConfig

__all__ = ["self_modifying_naive"]

SMOOTH = {"silu": F.silu, "tanh": torch.tanh, "relu": torch.relu}


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _apply(config: SelfModifyingConfig, params: Params, x: Tensor) -> tuple[Tensor, Params]:
    """``M(x)`` and the input of each of its matrices; matrices ``[..., out, in]``, vectors ``[..., in]``."""

    def times(weight: Tensor, vector: Tensor) -> Tensor:
        return (weight @ vector.unsqueeze(-1)).squeeze(-1)

    if config.structure == "matrix":
        return times(params[0], x), (x,)
    hidden = SMOOTH[config.activation](times(params[0], x))
    return x + times(params[1], hidden), (x, hidden)


def _inner_loss(config: SelfModifyingConfig, params: Params, k: Tensor, target: Tensor) -> Tensor:
    """Summed over rows, heads and memories, which do not meet in it: each gets its own gradient."""
    out, _ = _apply(config, params, k)
    limit = config.max_error
    if config.objective == "dot":
        length = target.square().sum(-1, keepdim=True).sqrt()
        return -(out * target * (1.0 if limit is None else (limit / length).clamp(max=1))).sum()
    squared = (out - target).square().sum(-1)
    if limit is None:
        return 0.5 * squared.sum()
    return torch.where(squared <= limit**2, 0.5 * squared, limit * squared.sqrt() - 0.5 * limit**2).sum()


def self_modifying_naive(memory: SelfModifyingMemory, x: Tensor) -> tuple[Tensor, Params]:
    """Outputs ``[B, T, hidden_size]`` and the memories' parameters after the last token, from their trained starts."""
    config = memory.config
    batch, length, hidden = x.shape
    heads, size, roles, count = config.num_heads, config.head_size, config.roles, config.projections
    past = torch.cat((x.new_zeros(batch, config.conv_width - 1, hidden), x), dim=1)
    now: Params = tuple(p.expand(batch, *p.shape) for p in memory.starts)
    start, momentum, keep = list(now), [torch.zeros_like(p) for p in now], x.new_ones(batch, heads, count + 1)
    kicks: list[Tensor] = [torch.zeros_like(p) for p in now]
    periods = [config.outer_chunk_size] * count + [config.chunk_size]
    outs = []
    for t in range(length):
        mixed = F.silu((past[:, t : t + config.conv_width] * memory.conv_weight).sum(1))
        features = memory.in_proj(mixed).view(batch, heads, len(roles), size)
        parts = {name: features[:, :, i] for i, name in enumerate(roles)}
        for i, name in enumerate(roles[:count]):
            parts[name] = _apply(config, tuple(p[:, :, i] for p in start), parts[name])[0]
        q, k = _unit(parts["q"]), _unit(parts["k"])
        v = _unit(parts["v"]) if config.normalize_values else parts["v"]
        eta = config.eta_max * torch.sigmoid((memory.eta_weight * parts["eta"]).sum(-1) + memory.eta_bias)
        alpha = torch.ones_like(eta)
        if config.decay:
            alpha = torch.sigmoid((memory.alpha_weight * parts["alpha"]).sum(-1) + memory.alpha_bias)

        k_all, v_all = (z.unsqueeze(2).expand(batch, heads, count + 1, size) for z in (k, v))
        target = _apply(config, tuple(start), v_all)[0] if config.self_targets else v_all
        target = target if config.target_gradient else target.detach()
        grads = torch.func.grad(lambda p, k=k_all, g=target: _inner_loss(config, p, k, g))(tuple(start))
        keys = _apply(config, tuple(start), k_all)[1]
        scale = alpha[:, :, None, None, None]
        moved = []
        for weight, grad, key, forgets in zip(now, grads, keys, config.forgets):
            step = eta[:, :, None, None, None]
            if config.rule == "dgd" and forgets:
                step = step / (1 + step * key.square().sum(-1)[..., None, None])
                erased = step * (weight @ key.unsqueeze(-1)) @ key.unsqueeze(-2)
            else:
                erased = torch.zeros_like(weight)
            moved.append((scale if forgets else 1.0) * weight - erased - step * grad)
        now, keep = tuple(moved), keep * alpha.unsqueeze(-1)

        seen = tuple(s[:, :, -1] for s in start)
        if config.read == "token":
            seen = tuple(w[:, :, -1] + kick[:, :, -1] for w, kick in zip(now, kicks))
        outs.append(_apply(config, seen, q)[0])

        ends = torch.tensor([(t + 1) % period == 0 for period in periods])[:, None, None]
        for i, (weight, forgets) in enumerate(zip(now, config.forgets)):
            kept = keep[..., None, None] if forgets else 1.0
            change = kicks[i] + weight - kept * start[i]
            momentum[i] = torch.where(ends, change, momentum[i])
            given_back = (1 - kept) * memory.starts[i] if config.retention == "start" else 0.0
            start[i] = torch.where(ends, weight + kicks[i] + given_back, start[i])
        now = tuple(torch.where(ends, s, w) for s, w in zip(start, now))
        kicks = [config.momentum * m for m in momentum]
        keep = torch.where(ends[:, 0, 0], 1.0, keep)
    y = torch.stack(outs, dim=1)
    if config.output_norm:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = y.flatten(-2)
    if memory.norm_weight is not None:
        y = y * memory.norm_weight
    if memory.gate_proj is not None:
        y = y * F.silu(memory.gate_proj(x))
    return memory.out_proj(y), now
