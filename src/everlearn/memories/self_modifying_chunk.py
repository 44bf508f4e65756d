"""One chunk of a self-modifying memory as functions of tensors, and how to keep only its inputs for the backward.

Shapes: ``N`` batch rows times heads, ``n`` memories, ``d`` head size, ``C`` tokens of the chunk, tokens last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.memories.matrix import Chunk, Params
from everlearn.memories.self_modifying_config import SelfModifyingConfig
from everlearn.ops.delta_rule_chunk import decay_ratios

__all__ = ["Gates", "Inputs", "l2norm", "memorize", "project", "recompute"]


class Gates(NamedTuple):
    """How rates are read off: weights ``[N, d]`` and biases ``[N]`` for ``eta`` and ``alpha``."""

    eta_weight: Tensor
    eta_bias: Tensor
    alpha_weight: Tensor
    alpha_bias: Tensor


class Inputs(NamedTuple):
    """What the projections make of a chunk: ``q``, ``k``, ``v`` ``[N, d, C]``, ``rate``, ``log_decay`` ``[N, C]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_decay: Tensor


def l2norm(x: Tensor) -> Tensor:
    """``x / |x|`` along the features ``[..., d, C]``; zero stays zero."""
    return x * torch.rsqrt((x * x).sum(-2, keepdim=True) + 1e-6)


def project(config: SelfModifyingConfig, start: Params, features: Tensor, gates: Gates, valid: Tensor | None) -> Inputs:
    """Pass the chunk's features through the projections' memories as they stood at the chunk's start.

    Args:
        config: the layer's configuration.
        start: parameters of the projections ``[N, n, ...]``.
        features: static projections of the input ``[N, roles, d, C]``, in the order of ``config.roles``.
        gates: see :class:`Gates`.
        valid: which slots hold a token ``[N, C]``, or None for all; others neither write nor decay.
    """
    count = config.projections
    adapted = config.memory_structure().apply(start, features[:, :count]) if count else features[:, :0]
    parts = dict(zip(config.roles, (*adapted.unbind(1), *features[:, count:].unbind(1))))
    q, k, v = l2norm(parts["q"]), l2norm(parts["k"]), parts["v"]
    if config.normalize_values:
        v = l2norm(v)
    rate = config.eta_max * torch.sigmoid(_gate(parts["eta"], gates.eta_weight, gates.eta_bias))
    if config.decay:
        log_decay = F.logsigmoid(_gate(parts["alpha"], gates.alpha_weight, gates.alpha_bias))
    else:
        log_decay = torch.zeros_like(rate)
    if valid is not None:
        rate, log_decay = rate * valid, torch.where(valid, log_decay, 0.0)
    return Inputs(q, k, v, rate, log_decay)


def _gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (weight.unsqueeze(-1) * x).sum(-2) + bias.unsqueeze(-1)


def memorize(
    config: SelfModifyingConfig,
    start: Params,
    now: Params | None,
    inputs: Inputs,
    *,
    kick: Params | None = None,
    reading: bool = True,
) -> tuple[Params, Tensor | None]:
    """Write a chunk into memories and read the last of them.

    Args:
        config: the layer's configuration.
        start: parameters at the chunk boundary ``[N, n, ...]``, where gradients are taken.
        now: parameters before these tokens; None when they are ``start``.
        inputs: see :func:`project`.
        kick: what momentum adds to every state of this chunk.
        reading: whether the last memory is read.

    Returns:
        the parameters after these tokens (without the kick) and the read ``[N, d, C]``.
    """
    structure = config.memory_structure()
    ratios = decay_ratios(inputs.log_decay)
    chunk = Chunk(inputs.k, inputs.v, inputs.rate, ratios)
    after, keys, writes = structure.write(start, now, chunk, config.write_rule())
    if not reading:
        return after, None
    if config.read == "boundary":
        main = tuple(x[:, -1:] for x in start)
        return after, structure.apply(main, inputs.q.unsqueeze(1)).squeeze(1)
    return after, structure.read(start if now is None else now, inputs.q, keys, writes, ratios, kick)


def recompute(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, keeping only ``tensors`` for the backward, which runs the function again."""
    return _Recompute.apply(function, *tensors)  # type: ignore[return-value]


class _Recompute(torch.autograd.Function):
    """Checkpointing that also works for second derivatives and under ``torch.func`` transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
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
