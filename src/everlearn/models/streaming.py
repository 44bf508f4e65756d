"""Streaming levels: a stacked model reads a stream of tokens and each level steps on its own clock.

Training and deployment are the same loop (*Nested Learning*, section 7).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import DynamicCache, PreTrainedModel

from everlearn.errors import InvalidArgument
from everlearn.levels import Clock, Level
from everlearn.memories.carried import Carried
from everlearn.models.stacking import memory_parameters, reset_level, stack_of


@dataclass(frozen=True)
class StreamStep:
    """An update: after ``tokens`` tokens the ``levels`` stepped; ``loss`` is the mean since the update before."""

    tokens: int
    levels: tuple[str, ...]
    loss: float


class Stream:
    """Feeds tokens to a stacked model and steps the due levels by their accumulated next-token loss gradient.

    Tokens wait until the clock's next boundary, or the next multiple of ``chunk_size``, and are then learned in one
    pass, so the updates do not depend on how the tokens were cut into calls, to the last bit. At a boundary, level l's
    optimiser steps on the gradient of the mean loss of the tokens since its last step. Levels with ``every=None`` get
    no gradient. Nothing below the lowest memory takes part in the backward pass.

    The past is remembered as the model's own KV cache, detached: a token attends to what was computed for up to
    ``context`` tokens before it, under the weights of that time, and no gradient goes into it. When the cache would
    grow beyond ``context``, it is dropped and a new one begins with the latest token.

    Args:
        model: made by :func:`~everlearn.models.stacking.stack_levels`; its mode (train or eval) is left as it is.
        context: the most tokens a pass sees, past and new; default: 1024, or what the model's positions allow if less.
        chunk_size: the most tokens learned in one pass; at most ``context``.

    Raises:
        InvalidArgument: no level has a period, ``context`` or ``chunk_size`` is out of range, or an optimiser wants to
            evaluate its loss again (LBFGS): a stream has passed by then.
    """

    def __init__(self, model: PreTrainedModel, *, context: int | None = None, chunk_size: int = 256) -> None:
        stack = stack_of(model)
        self.model = model
        self.clock = Clock(stack.levels)
        self.context = _check_context(model, context, chunk_size)
        self.chunk_size = min(chunk_size, self.context)
        self._nested = stack.wiring == "nested"
        self._levels = {level.name: level for level in stack.levels if level.every}
        self._params = {name: list(memory_parameters(model, name).values()) for name in self._levels}
        self._params = {name: params for name, params in self._params.items() if params}
        if not self._params:
            raise InvalidArgument("model: none of its levels has a period, so there is nothing a stream could update")
        self._optimizers = {name: self._optimizer(name) for name in self._params}
        self._sums = {name: [torch.zeros_like(p) for p in params] for name, params in self._params.items()}
        self._counts = dict.fromkeys(self._params, 0)
        self._pending: Tensor | None = None
        self._last: Tensor | None = None
        self._cache: DynamicCache | None = None
        self._loss, self._scored = 0.0, 0

    def feed(self, tokens: Tensor | Sequence[int]) -> list[StreamStep]:
        """Take the next tokens, [time] or [batch, time] with the same batch every time; return the updates made."""
        new = torch.as_tensor(tokens, dtype=torch.long, device=self.model.device)
        new = new[None] if new.ndim == 1 else new
        if new.ndim != 2 or (self._pending is not None and len(new) != len(self._pending)):
            batch = "any" if self._pending is None else len(self._pending)
            raise InvalidArgument(f"tokens: got shape {tuple(new.shape)}, expected [batch = {batch}, time]")
        waiting = new if self._pending is None else torch.cat([self._pending, new], dim=1)
        steps: list[StreamStep] = []
        while waiting.shape[1] >= (size := self._until_cut()):
            self._learn(waiting[:, :size])
            steps += self._tick(size)
            waiting = waiting[:, size:]
        self._pending = waiting
        return steps

    def end_context(self) -> None:
        """Learn from the tokens that wait and drop the past: what is fed next begins a new text, on the same clock."""
        if self._pending is not None and self._pending.shape[1]:
            self._learn(self._pending)
            self._tick(self._pending.shape[1])
        self._pending = self._last = self._cache = None

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs but the memory itself: tensors, numbers and the optimisers' states."""
        return {
            "clock": self.clock.state_dict(),
            "pending": self._pending,
            "last": self._last,
            "cache": _cache_state(self._cache),
            "sums": {name: [total.clone() for total in totals] for name, totals in self._sums.items()},
            "counts": dict(self._counts),
            "loss": (self._loss, self._scored),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on a model that holds the memory of that moment."""
        self.clock.load_state_dict(state["clock"])
        self._pending, self._last = state["pending"], state["last"]
        self._cache = _load_cache(self.model, state["cache"])
        self._sums = {name: [total.clone() for total in totals] for name, totals in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._loss, self._scored = state["loss"]
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    def _until_cut(self) -> int:
        return self.clock.pieces(self.chunk_size, self.chunk_size)[0]

    def _learn(self, piece: Tensor) -> None:
        """Predict the tokens of ``piece`` [batch, time] from those before and add the gradient to every level's sum."""
        seen = piece if self._last is None else torch.cat([self._last, piece], dim=1)
        self._last = piece[:, -1:]
        inputs, targets = seen[:, :-1], seen[:, 1:]
        if not inputs.shape[1]:
            return
        cache = self._cache
        if cache is None or cache.get_seq_length() + inputs.shape[1] > self.context:
            cache = self._cache = DynamicCache(config=self.model.config)
        params = [parameter for own in self._params.values() for parameter in own]
        with torch.enable_grad():
            logits = self.model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
            logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
            grads = iter(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))
        for name, totals in self._sums.items():
            for total in totals:
                total += next(grads)
            self._counts[name] += targets.numel()
        self._loss, self._scored = self._loss + loss.item(), self._scored + targets.numel()
        for own in map(vars, cache.layers):  # a layer that shares another's keys, or is recurrent, holds other things
            own.update({key: value.detach() for key, value in own.items() if isinstance(value, Tensor)})

    def _tick(self, count: int) -> list[StreamStep]:
        steps = []
        for boundary in self.clock.advance(count):
            names = tuple(level.name for level in boundary.due if level.name in self._params)
            for name in names:
                self._step(name)
            if self._nested:
                self._restart(self.clock.resets(boundary.due))
            steps.append(StreamStep(self.clock.tokens, names, self._loss / max(self._scored, 1)))
            self._loss, self._scored = 0.0, 0
        return steps

    def _step(self, name: str) -> None:
        if self._counts[name]:
            for parameter, total in zip(self._params[name], self._sums[name], strict=True):
                parameter.grad = total / self._counts[name]
            self._optimizers[name].step()
        self._clear(name)

    def _clear(self, name: str) -> None:
        for parameter, total in zip(self._params[name], self._sums[name], strict=True):
            parameter.grad = None
            total.zero_()
        self._counts[name] = 0

    def _restart(self, levels: Iterable[Level]) -> None:
        """Send ``levels`` back to their start, their optimisers and sums with them."""
        for name in (level.name for level in levels if level.name in self._params):
            reset_level(self.model, name)
            self._optimizers[name] = self._optimizer(name)
            self._clear(name)

    def _optimizer(self, name: str) -> Optimizer:
        optimizer = self._levels[name].optimizer(list(self._params[name]))
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise InvalidArgument(
                f"optimizer: got {type(optimizer).__name__} for level {name!r}, which evaluates its loss again in a"
                " step; expected one that steps on given gradients"
            )
        return optimizer


def _check_context(model: PreTrainedModel, context: int | None, chunk_size: int) -> int:
    if chunk_size < 1:
        raise InvalidArgument(f"chunk_size: got {chunk_size}, expected at least 1")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = max(min(1024, limit or 1024), 1)
    if context < 1 or (limit is not None and context > limit):
        raise InvalidArgument(f"context: got {context}, expected 1 to {limit}, the model's positions")
    return context


def _cache_state(cache: DynamicCache | None) -> list[dict[str, Any]] | None:
    """Return what each layer of the cache holds, as tensors and plain values."""
    return None if cache is None else [dict(vars(layer)) for layer in cache.layers]


def _load_cache(model: PreTrainedModel, state: list[dict[str, Any]] | None) -> DynamicCache | None:
    if state is None:
        return None
    cache = DynamicCache(config=model.config)
    cache.layers += [Carried() for _ in state[len(cache.layers) :]]
    for layer, own in zip(cache.layers, state, strict=True):
        vars(layer).update(own)
    return cache
