"""An LSTM as a sequence mixer: the recurrence whose state transition is not linear, for tasks that need one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everlearn.blocks.context import Context
from everlearn.blocks.state import TensorState

__all__ = ["Lstm"]


class Lstm(nn.Module):
    """One ``nn.LSTM`` layer, ``[B, T, hidden_size] -> [B, T, hidden_size]``, forget gates starting open (bias 1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.cell = nn.LSTM(hidden_size, hidden_size, batch_first=True)

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name: torch's uniform draw, a forget bias of 1."""
        size = self.cell.hidden_size
        values = {}
        for name, parameter in self.cell.named_parameters():
            values[f"cell.{name}"] = (2 * torch.rand(parameter.shape) - 1) * size**-0.5
        values["cell.bias_ih_l0"] = torch.zeros(4 * size)
        values["cell.bias_hh_l0"] = torch.cat((torch.zeros(size), torch.ones(size), torch.zeros(2 * size)))
        return values

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x``; token by token where some are masked or begin a document."""
        zero = x.new_zeros(1, x.shape[0], x.shape[2])
        # cells run over [layers = 1, B, hidden_size]
        now = (zero, zero) if state is None else (state["hidden"].unsqueeze(0), state["cell"].unsqueeze(0))
        if context.mask is None and context.starts is None:
            y, (hidden, cell) = self.cell(x, now)
            return y, TensorState({"hidden": hidden.squeeze(0), "cell": cell.squeeze(0)})
        outs = []
        for t in range(x.shape[1]):
            if context.starts is not None:
                now = tuple(torch.where(context.starts[:, t, None], 0.0, z) for z in now)
            out, after = self.cell(x[:, t : t + 1], now)
            if context.mask is not None:
                after = tuple(torch.where(context.mask[:, t, None], new, old) for new, old in zip(after, now))
            now = after
            outs.append(out)
        hidden, cell = now
        return torch.cat(outs, dim=1), TensorState({"hidden": hidden.squeeze(0), "cell": cell.squeeze(0)})
