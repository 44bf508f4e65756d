"""An LSTM as a sequence mixer: the recurrence whose state transition is not linear, for tasks that need one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everlearn.blocks.context import Context
from everlearn.blocks.state import TensorState

__all__ = ["Lstm"]


class Lstm(nn.LSTM):
    """One layer of ``nn.LSTM``, ``[B, T, hidden_size] -> [B, T, hidden_size]``, its forget gates starting open."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, batch_first=True)

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name: torch's uniform draw for the weights, a forget bias of 1, no other biases."""
        size = self.hidden_size
        uniform = {name: (2 * torch.rand(p.shape) - 1) * size**-0.5 for name, p in self.named_parameters()}
        forget = torch.cat((torch.zeros(size), torch.ones(size), torch.zeros(2 * size)))
        return {**uniform, "bias_ih_l0": torch.zeros(4 * size), "bias_hh_l0": forget}

    def forward(  # type: ignore[override]
        self, x: Tensor, state: TensorState | None, context: Context
    ) -> tuple[Tensor, TensorState]:
        """Run over ``x``; token by token where some are masked or begin a document."""
        zero = x.new_zeros(1, x.shape[0], x.shape[2])  # [layers = 1, B, hidden_size]
        now = (zero, zero) if state is None else (state["hidden"].unsqueeze(0), state["cell"].unsqueeze(0))
        if context.mask is None and context.starts is None:
            y, now = self._run(x, now)
            return y, TensorState({"hidden": now[0].squeeze(0), "cell": now[1].squeeze(0)})
        outs = []
        for t in range(x.shape[1]):
            if context.starts is not None:
                now = _choose(context.starts[:, t], (zero, zero), now)
            out, after = self._run(x[:, t : t + 1], now)
            if context.mask is not None:
                after = _choose(context.mask[:, t], after, now)
            now = after
            outs.append(out)
        return torch.cat(outs, dim=1), TensorState({"hidden": now[0].squeeze(0), "cell": now[1].squeeze(0)})

    def _run(self, x: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over all of ``x``; on a processor not under autocast, for which oneDNN has no LSTM on many of them."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x, now)
        with torch.autocast("cpu", enabled=False):
            own = next(self.parameters()).dtype
            return super().forward(x.to(own), (now[0].to(own), now[1].to(own)))


def _choose(rows: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``a`` in the given batch rows ``[B]``, ``b`` in the rest."""
    return torch.where(rows[:, None], a[0], b[0]), torch.where(rows[:, None], a[1], b[1])
