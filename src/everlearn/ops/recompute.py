"""Checkpointing of pure functions: keep the inputs, run the function again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "recompute", "run"]

Call = Callable[..., tuple[Tensor, ...]]


def run(function: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, for where :func:`recompute` is not wanted."""
    return function(*tensors)


def recompute(function: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, keeping only ``tensors`` for the backward, which runs the function again."""
    return _Recompute.apply(function, *tensors)  # type: ignore[return-value]


class _Recompute(torch.autograd.Function):
    """Checkpointing that also works for second derivatives and under ``torch.func`` transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        device = tensors[0].device.type
        with torch.autocast(device, enabled=False):
            if torch.is_grad_enabled():  # to be differentiated again
                return None, *torch.func.vjp(ctx.function, *tensors)[1](grads)
            needed = ctx.needs_input_grad[1:]
            tensors = [x.detach().requires_grad_(need) for x, need in zip(tensors, needed)]
            with torch.enable_grad():
                outs = ctx.function(*tensors)
            wanted = [x for x in tensors if x.requires_grad]
            pairs = [(out, grad) for out, grad in zip(outs, grads) if out.requires_grad]
            found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
