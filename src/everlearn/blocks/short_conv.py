"""The short causal convolution in front of most recurrent mixers, over the tokens of each document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everlearn.blocks.context import Context
from everlearn.ops.causal_conv import causal_conv

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """Depthwise convolution over time, ``[B, T, channels] -> [B, T, channels]``; masked tokens are passed over.

    Args:
        channels: features, each with taps of its own.
        width: taps.
        bias: whether a bias is added.
    """

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name: uniform taps as of ``nn.Conv1d``, no bias."""
        values = {"weight": (2 * torch.rand(self.weight.shape) - 1) * self.weight.shape[0] ** -0.5}
        return values if self.bias is None else {**values, "bias": torch.zeros(self.bias.shape)}

    def init_state(self, batch_size: int) -> Tensor:
        """The inputs before the first token ``[B, width - 1, channels]``: zeros."""
        return self.weight.new_zeros(batch_size, self.weight.shape[0] - 1, self.weight.shape[1])

    def forward(self, x: Tensor, history: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Convolve ``x`` behind ``history`` ``[B, width - 1, channels]``; returns the outputs and the next history."""
        taps, history = self.weight.shape[0], history.to(x.dtype)
        ranks = context.ranks
        if ranks is None:
            padded = torch.cat((history, x), dim=1)
            y = causal_conv(padded, self.weight)
            history = padded[:, padded.shape[1] - taps + 1 :]
        else:
            padded = torch.cat((history, _pick(x, ranks.token)), dim=1)
            y = _pick(causal_conv(padded, self.weight, ranks.age), ranks.rank)
            behind = torch.arange(taps - 1, device=x.device)
            own = behind.flip(0) <= ranks.last_age[:, None]  # what lies before the last document is not its own
            history = torch.where(own.unsqueeze(-1), _pick(padded, ranks.count[:, None] + behind), 0.0)
        return (y if self.bias is None else y + self.bias), history


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]`` ``[B, I, D]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
