"""The continuum memory's levels as fast weights of one sequence (nested-learning.md, section 5, "in-context").

The clock, the updates and the outer gradient are those of :func:`everlearn.memories.continuum.learn_in_context`; here
is how a decoder is put into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from everlearn.blocks.attention import KeyValues
from everlearn.blocks.state import TensorState
from everlearn.errors import InvalidArgument
from everlearn.memories.continuum import FastWeights, LevelParams, Update, gradient_descent, learn_in_context
from everlearn.memories.self_modifying import SelfModifyingState
from everlearn.models.backbone import BackboneForCausalLM
from everlearn.models.backbone_cache import StateCache

__all__ = ["hope_in_context", "level_starts"]

KINDS: tuple[type[Any], ...] = (SelfModifyingState, KeyValues, TensorState)


def level_starts(model: BackboneForCausalLM) -> dict[str, dict[str, Tensor]]:
    """The trained starts of all levels: level -> parameter name in the model -> the live parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {level: {names[id(p)]: p for p in held} for level, held in model.level_parameters().items()}


def hope_in_context(
    model: BackboneForCausalLM,
    input_ids: Tensor,
    rates: Mapping[str, float | Tensor] | Update,
    *,
    targets: Tensor | None = None,
    chunk_size: int | None = None,
    state: FastWeights | None = None,
) -> tuple[Tensor, FastWeights]:
    """Run a sequence while the continuum memory learns from it by its own next-token loss.

    Args:
        model: with ``cms_periods`` of at least two levels; a period is in tokens of this sequence, and ``cms_wiring``
            ``"nested"`` sends a level back to its start when its parent's period ends.
        input_ids: ``[B, T]``; the rows share one set of fast weights.
        rates: inner learning rate of each level (a tensor can be learned), or any other update.
        targets: next token of each input ``[B, T]``, -100 for none; by default ``input_ids`` shifted by one.
        chunk_size: see :func:`learn_in_context`.
        state: what an earlier call returned.

    Returns:
        logits ``[B, T, vocab_size]`` and the state to go on from. An outer loss on the logits reaches all parameters
        through every update.

    Raises:
        InvalidArgument: a model with a single level, or a missing rate.
    """
    starts, levels = level_starts(model), model.levels()
    if not starts:
        raise InvalidArgument(f"model: got cms_periods = {model.config.cms_periods}, expected at least two levels")
    update: Callable[..., Any] = rates if callable(rates) else gradient_descent(rates)
    if isinstance(rates, Mapping) and set(rates) != set(starts):
        raise InvalidArgument(f"rates: got {sorted(rates)}, expected one for each of {sorted(starts)}")
    if targets is None:
        targets = torch.cat((input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)), dim=1)

    def piece(params: LevelParams, tokens: Tensor, past: Any) -> tuple[Tensor, Any]:
        cache = _unpack(past, len(model.model.layers))
        fast = {name: value for held in params.values() for name, value in held.items()}
        out = functional_call(model, fast, (), {"input_ids": tokens, "past_key_values": cache})
        return out.logits, _pack(cache)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        return learn_in_context(
            piece, starts, input_ids, targets, levels, update,
            wiring=model.config.cms_wiring, chunk_size=chunk_size, state=state,
        )  # fmt: skip


def _pack(cache: StateCache) -> dict[str, Any]:
    """The cache as nested dicts of tensors, which function transforms can look into."""
    layers = {str(i): (KINDS.index(type(state)), state) for i, state in enumerate(cache.states())}
    kinds = {i: torch.tensor(kind) for i, (kind, _) in layers.items()}
    held = {i: dict(state.state_dict()) for i, (_, state) in layers.items()}
    return {"kinds": kinds, "layers": held, "seen": torch.tensor(cache.get_seq_length()), "real": cache.real}


def _unpack(packed: dict[str, Any] | None, num_layers: int) -> StateCache:
    cache = StateCache(num_layers)
    if packed is not None:
        states = [
            KINDS[int(packed["kinds"][str(i)])].from_state_dict(packed["layers"][str(i)]) for i in range(num_layers)
        ]
        cache.store(states, int(packed["seen"]))
        cache.real = packed["real"]
    return cache
