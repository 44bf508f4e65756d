"""Mamba-2's state space layer with a scalar decay a head (SSD, Dao & Gu 2024), on the common recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.blocks.context import Context
from everlearn.blocks.recurrent import Writes, initial_step_bias, run_recurrence, share
from everlearn.blocks.short_conv import ShortConv
from everlearn.blocks.state import TensorState

__all__ = ["StateSpace"]


class StateSpace(nn.Module):
    """``S_t = exp(-dt A) S_{t-1} + dt x_t B_t^T``, ``y_t = S_t C_t + D x_t``; all heads share ``B`` and ``C``.

    A short convolution and SiLU on ``x``, ``B`` and ``C``; the output is normed after its SiLU gate.

    Args:
        hidden_size, num_heads: as everywhere; there are ``expand num_heads`` heads here.
        expand: inner size over ``hidden_size``.
        state_size: size of ``B`` and ``C``; None is ``hidden_size / num_heads``.
        conv_width: taps of the convolution.
        eps: of the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        expand: int = 2,
        state_size: int | None = None,
        conv_width: int = 4,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        head_size = share("hidden_size", hidden_size, num_heads)
        self.num_heads, inner, size = expand * num_heads, expand * hidden_size, state_size or head_size
        self.sizes, self.mixed_sizes = [inner, inner + 2 * size, self.num_heads], [inner, size, size]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.conv = ShortConv(inner + 2 * size, conv_width, bias=True)
        self.decay_log = nn.Parameter(torch.empty(self.num_heads))
        self.step_bias = nn.Parameter(torch.empty(self.num_heads))
        self.skip = nn.Parameter(torch.empty(self.num_heads))
        self.norm = nn.RMSNorm(inner, eps=eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name: ``A`` uniform in 1 to 16, Mamba's step sizes, ``D = 1``."""
        scale = torch.empty(self.num_heads).uniform_(1, 16)
        return {
            "decay_log": scale.log(),
            "step_bias": initial_step_bias(self.num_heads),
            "skip": torch.ones(self.num_heads),
        }

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``."""
        gate, mixed, step = self.in_proj(x).split(self.sizes, dim=-1)
        mixed, history = self.conv(mixed, state["conv"] if state else self.conv.init_state(x.shape[0]), context)
        inner, b, c = F.silu(mixed).split(self.mixed_sizes, dim=-1)
        inner = inner.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        b, c = (part.unsqueeze(1).expand(-1, self.num_heads, -1, -1) for part in (b, c))
        step = F.softplus(step.to(self.step_bias.dtype) + self.step_bias).mT  # float32 under autocast
        log_decay = -step * self.decay_log.exp()[:, None]
        writes = Writes(c, b, step.unsqueeze(-1) * inner, log_decay)
        y, memory = run_recurrence(writes, state and state["memory"], context)
        y = (y + self.skip[:, None, None] * inner).transpose(1, 2).flatten(2)
        y = self.norm((y * F.silu(gate)).to(self.norm.weight.dtype))
        return self.out_proj(y), TensorState({"memory": memory, "conv": history})
