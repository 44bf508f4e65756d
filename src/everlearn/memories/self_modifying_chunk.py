"""One chunk of a self-modifying memory as functions of tensors.

Shapes: ``N`` batch rows times heads, ``n`` memories, ``d`` head size, ``C`` tokens of the chunk, tokens last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.memories.matrix import Chunk, Params, Trace
from everlearn.memories.self_modifying_config import SelfModifyingConfig
from everlearn.ops.delta_rule_chunk import decay_ratios
from everlearn.ops.recompute import Call, recompute, run

__all__ = ["Gates", "Inputs", "flattened", "joint_chunk", "l2norm", "main_chunk", "memorize", "outer_chunk", "project"]


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
    again: Call = run,
) -> tuple[Params, Tensor | None]:
    """Write a chunk into memories and read the last of them.

    Args:
        config: the layer's configuration.
        start: parameters at the chunk boundary ``[N, n, ...]``, where gradients are taken.
        now: parameters before these tokens; None when they are ``start``.
        inputs: see :func:`project`.
        kick: what momentum adds to every state of this chunk.
        reading: whether the last memory is read.
        again: calls a function of tensors whose results the backward may compute again.

    Returns:
        the parameters after these tokens (without the kick) and the read ``[N, d, C]``.
    """
    structure = config.memory_structure()
    ratios = decay_ratios(inputs.log_decay)
    chunk = Chunk(inputs.k, inputs.v, inputs.rate, ratios)
    after, traces = structure.write(start, now, chunk, config.write_rule(), again)
    if not reading:
        return after, None
    if config.read == "boundary":
        main = tuple(x[:, -1:] for x in start)
        return after, structure.apply(main, inputs.q.unsqueeze(1)).squeeze(1)
    count = len(start)

    def read(q: Tensor, ratios: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        own, flat, extra = tensors[:count], tensors[count : 4 * count], tensors[4 * count :]
        written = [Trace(*flat[i : i + 3]) for i in range(0, 3 * count, 3)]
        return (structure.read(own, q, written, ratios, extra or None),)

    before, extra = (tuple(x[:, -1] for x in group) for group in (start if now is None else now, kick or ()))
    return after, again(read, inputs.q, ratios, *before, *(x for trace in traces for x in trace), *extra)[0]


def joint_chunk(
    config: SelfModifyingConfig, start: Params, now: Params, kick: Params, rest: Params
) -> tuple[Tensor, ...]:
    """All memories over one chunk: their parameters after it, the read ``[N, d, C]`` and the sum of the log decays."""
    again = _again(config)
    inputs = _projected(config, tuple(x[:, : config.projections] for x in start), rest, again)
    after, read = memorize(config, start, now or None, inputs, kick=kick or None, again=again)
    assert read is not None
    return *after, read, inputs.log_decay.sum(-1)


def outer_chunk(
    config: SelfModifyingConfig, start: Params, now: Params, kick: Params, rest: Params
) -> tuple[Tensor, ...]:
    """The projections' memories over one chunk: their parameters after it, and what they make of it."""
    again = _again(config)
    inputs = _projected(config, start, rest, again)
    return *memorize(config, start, now or None, inputs, reading=False, again=again)[0], *inputs


def main_chunk(
    config: SelfModifyingConfig, start: Params, now: Params, kick: Params, rest: Params
) -> tuple[Tensor, ...]:
    """The main memory over one chunk of its own, smaller size: its parameters after it and the read."""
    after, read = memorize(config, start, now or None, Inputs(*rest), kick=kick or None, again=_again(config))
    assert read is not None
    return *after, read


def _again(config: SelfModifyingConfig) -> Call:
    return recompute if config.recompute == "parts" and not config.compile and torch.is_grad_enabled() else run


def _projected(config: SelfModifyingConfig, start: Params, rest: Params, again: Call) -> Inputs:
    """:func:`project` with features, gates and perhaps the valid slots behind each other in ``rest``."""
    count = len(start)

    def parts(*tensors: Tensor) -> tuple[Tensor, ...]:
        features, *more = tensors[count:]
        return tuple(project(config, tensors[:count], features, Gates(*more[:4]), more[4] if more[4:] else None))

    return Inputs(*again(parts, *start, *rest))


@functools.lru_cache(maxsize=64)
def flattened(
    chunk: Callable[..., tuple[Tensor, ...]], config: SelfModifyingConfig, ends: tuple[int, ...], compiled: bool
) -> Call:
    """``chunk(config, start, now, kick, rest)`` as a function of all their tensors; ``ends``: where each of them ends.

    Layers with one configuration share it, and with it what ``torch.compile`` makes of it.
    """

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return chunk(config, *(tensors[a:b] for a, b in zip((0, *ends), ends)))

    return torch.compile(flat, dynamic=False) if compiled else flat
