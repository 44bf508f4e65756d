"""Sequence mixers around the one recurrence of a matrix memory (nested-learning.md, section 2).

What differs between them is what they make of the input: keys, writes, decay and rate of erasing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.blocks.attention import rotate
from everlearn.blocks.context import Context
from everlearn.blocks.short_conv import ShortConv
from everlearn.blocks.state import TensorState
from everlearn.errors import InvalidArgument
from everlearn.ops.delta_rule import delta_rule, gated_delta_rule

__all__ = ["DeltaNet", "GatedDeltaNet", "LinearAttention", "Retention", "Writes", "initial_step_bias"]
__all__ += ["run_recurrence", "share"]


class Writes(NamedTuple):
    """A sequence for ``S_t = alpha_t S_{t-1} (I - rate_t k_t k_t^T) + w_t k_t^T``, read as ``S_t q_t``.

    Attributes:
        q, k: ``[B, heads, T, K]``.
        w: what is written ``[B, heads, T, V]``; times ``rate`` where there is one.
        log_decay: ``log alpha`` ``[B, heads, T]``, or None for 0.
        rate: ``[B, heads, T]``, or None for no erasing.
    """

    q: Tensor
    k: Tensor
    w: Tensor
    log_decay: Tensor | None = None
    rate: Tensor | None = None


def run_recurrence(writes: Writes, state: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    """Reads ``[B, heads, T, V]`` and the last state ``[B, heads, V, K]``.

    Masked tokens neither write nor decay; at the start of a document ``alpha`` is 0, which forgets what was before.
    """
    q, k, w, log_decay, rate = writes
    mask, starts = context.mask, context.starts
    if mask is not None:
        kept = mask[:, None]
        w = torch.where(kept.unsqueeze(-1), w, 0.0)
        log_decay = None if log_decay is None else torch.where(kept, log_decay, 0.0)
        rate = None if rate is None else torch.where(kept, rate, 0.0)
    if starts is not None:
        log_decay = torch.zeros_like(w[..., 0]) if log_decay is None else log_decay
        log_decay = torch.where(starts[:, None], -torch.inf, log_decay)
    if rate is not None and starts is None:
        return gated_delta_rule(q, k, w, log_decay, rate, state)
    beta = None
    if rate is not None:
        beta, w = rate if log_decay is None else rate * log_decay.exp(), rate.unsqueeze(-1) * w
    out, state = delta_rule(q, k, w, log_decay, beta, state)
    assert out is not None
    return out, state


def share(name: str, size: float, num_heads: int, *, even: bool = False) -> int:
    """The size of one of ``num_heads`` equal parts of ``size``; raises InvalidArgument where it is not whole."""
    part = size / num_heads
    if part < 1 or part != int(part) or (even and int(part) % 2):
        raise InvalidArgument(f"{name}: got {size:g}, expected a multiple of {num_heads * (2 if even else 1)}")
    return int(part)


def initial_step_bias(count: int, low: float = 0.001, high: float = 0.1) -> Tensor:
    """``b`` with ``softplus(b)`` spread evenly over the logarithms from ``low`` to ``high`` (Mamba's step sizes)."""
    ratio = torch.tensor(high / low, dtype=torch.float32)
    step = low * torch.exp(torch.rand(count) * ratio.log())
    return step + torch.log(-torch.expm1(-step))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, T, heads d]`` to ``[B, heads, T, d]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """``[B, heads, T, d]`` to ``[B, T, heads d]``."""
    return x.transpose(1, 2).flatten(2)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class LinearAttention(nn.Module):
    """Linear attention (Katharopoulos et al. 2020): ``S q / (z . q)`` with features ``elu(x) + 1`` of ``q`` and ``k``.

    The sum of the keys ``z`` is one more row of the memory: the value 1 is appended to every ``v``.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        share("hidden_size", hidden_size, num_heads)
        self.num_heads = num_heads
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``."""
        q, k, v = (_heads(part, self.num_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        write = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        read, memory = run_recurrence(Writes(q, k, write), state and state["memory"], context)
        y = read[..., :-1] / (read[..., -1:] + 1e-6)
        return self.out_proj(_joined(y)), TensorState({"memory": memory})


class Retention(nn.Module):
    """Multi-scale retention (RetNet, Sun et al. 2023): a constant decay ``1 - 2^(-5 - head)`` for each head.

    Rotary positions on ``q`` and ``k`` (the published code drops the scale of xPos, which the decay replaces), values
    of twice the size, a norm for every head and a SiLU gate.

    Args:
        hidden_size, num_heads: as everywhere.
        expand_v: size of all values together, over ``hidden_size``.
        rope_theta: base of the rotary wavelengths.
        eps: of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        expand_v: float = 2.0,
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.head_size = share("hidden_size", hidden_size, num_heads, even=True)
        value_size = num_heads * share("expand_v hidden_size", expand_v * hidden_size, num_heads)
        self.num_heads, self.rope_theta = num_heads, rope_theta
        self.sizes = [hidden_size, hidden_size, value_size, value_size]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.norm = nn.RMSNorm(value_size // num_heads, eps=eps, elementwise_affine=False)
        self.out_proj = nn.Linear(value_size, hidden_size, bias=False)

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``."""
        q, k, v, gate = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (_heads(part, self.num_heads) for part in (q, k, v))
        q, k = (rotate(part, context.positions, self.rope_theta) for part in (q, k))
        exact = torch.promote_types(x.dtype, torch.float32)
        decay = -torch.exp2(-5 - torch.arange(self.num_heads, device=x.device, dtype=exact))
        writes = Writes(q * self.head_size**-0.5, k, v, torch.log1p(decay)[:, None].expand(k.shape[:-1]))
        read, memory = run_recurrence(writes, state and state["memory"], context)
        return self.out_proj(_joined(self.norm(read)) * F.silu(gate)), TensorState({"memory": memory})


class DeltaNet(nn.Module):
    """DeltaNet (Yang et al. 2024): a write replaces what its key held, at the rate ``sigmoid(W_b x)``.

    A short convolution and SiLU on ``q``, ``k`` and ``v``, unit length for ``q`` and ``k``, a norm for every head.

    Args:
        hidden_size, num_heads: as everywhere.
        conv_width: taps of the convolution.
        eps: of the norms.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, conv_width: int = 4, eps: float = 1e-6) -> None:
        super().__init__()
        self.head_size, self.num_heads = share("hidden_size", hidden_size, num_heads), num_heads
        self.sizes = [3 * hidden_size, num_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.conv = ShortConv(3 * hidden_size, conv_width)
        self.norm = nn.RMSNorm(self.head_size, eps=eps)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``."""
        mixed, rate = self.in_proj(x).split(self.sizes, dim=-1)
        mixed, history = self.conv(mixed, state["conv"] if state else self.conv.init_state(x.shape[0]), context)
        q, k, v = (_heads(part, self.num_heads) for part in F.silu(mixed).chunk(3, dim=-1))
        writes = Writes(_unit(q) * self.head_size**-0.5, _unit(k), v, rate=torch.sigmoid(rate).mT)
        read, memory = run_recurrence(writes, state and state["memory"], context)
        return self.out_proj(_joined(self.norm(read))), TensorState({"memory": memory, "conv": history})


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (Yang et al. 2025): DeltaNet with a decay ``exp(-A softplus(W_a x + b))`` and a SiLU output gate.

    Args:
        hidden_size, num_heads: as everywhere.
        expand_k, expand_v: size of all keys and of all values together, over ``hidden_size``.
        conv_width: taps of the convolution.
        eps: of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv_width: int = 4,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key_size = share("expand_k hidden_size", expand_k * hidden_size, num_heads)
        value_size = share("expand_v hidden_size", expand_v * hidden_size, num_heads)
        keys, values = num_heads * self.key_size, num_heads * value_size
        self.sizes, self.mixed_sizes = [2 * keys + values, values, num_heads, num_heads], [keys, keys, values]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.conv = ShortConv(2 * keys + values, conv_width)
        self.decay_log = nn.Parameter(torch.empty(num_heads))
        self.decay_bias = nn.Parameter(torch.empty(num_heads))
        self.norm = nn.RMSNorm(value_size, eps=eps)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name: ``A`` uniform up to 16 and Mamba's step sizes."""
        scale = torch.empty(self.num_heads).uniform_(0.01, 16)
        return {"decay_log": scale.log(), "decay_bias": initial_step_bias(self.num_heads)}

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``."""
        mixed, gate, rate, step = self.in_proj(x).split(self.sizes, dim=-1)
        mixed, history = self.conv(mixed, state["conv"] if state else self.conv.init_state(x.shape[0]), context)
        q, k, v = (_heads(part, self.num_heads) for part in F.silu(mixed).split(self.mixed_sizes, dim=-1))
        wide = self.decay_log.dtype  # float32 under autocast
        log_decay = -(self.decay_log.exp() * F.softplus(step.to(wide) + self.decay_bias)).mT
        writes = Writes(_unit(q) * self.key_size**-0.5, _unit(k), v, log_decay, torch.sigmoid(rate.to(wide)).mT)
        read, memory = run_recurrence(writes, state and state["memory"], context)
        y = self.norm(read) * F.silu(_heads(gate, self.num_heads))
        return self.out_proj(_joined(y)), TensorState({"memory": memory, "conv": history})
