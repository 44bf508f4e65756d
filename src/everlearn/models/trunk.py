"""A stacked model cut in two below its lowest memory: the frozen trunk, run once a text, and what lies above it.

The trunk is the same for every memory and never changes, so its activations can be kept and every pass of training
starts from them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from everlearn.models.stacking import continua, stack_of


@dataclass(frozen=True)
class Activations:
    """What the trunk made of a batch: ``hidden`` enters the block of the lowest memory, ``read`` that memory itself.

    Both are [batch, time, hidden_size]; right padding is whatever came out.
    """

    hidden: Tensor
    read: Tensor


@dataclass(frozen=True)
class Past:
    """Keys and values of the upper blocks on a beginning that many texts share, and how many blocks lie below them."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    below: int

    def expand(self, batch: int) -> DynamicCache:
        """Return a cache for ``batch`` texts; the blocks below, which do not run, get one that only has its length."""
        cache = DynamicCache()
        blank = self.layers[0][0][:, :1, :, :1].detach() * 0
        for index in range(self.below):
            cache.update(blank, blank, index)
        for index, (keys, values) in enumerate(self.layers, start=self.below):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache


class SplitModel:
    """Runs a stacked model in two halves; shares every tensor with it, so what is learned here is learned there.

    Args:
        model: made by ``stack_levels``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layer, path = next(iter(stack_of(model).paths.items()))
        blocks_path = path[: path.index(f".{layer}.")]
        self.model = model
        self._memory = continua(model)[layer]
        self._blocks = cast(nn.ModuleList, model.get_submodule(blocks_path))
        self.layer = layer
        memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self._upper = copy.deepcopy(model, memo)
        self._given = _Given()
        blocks = cast(nn.ModuleList, self._upper.get_submodule(blocks_path))
        for index in range(layer):
            blocks[index] = _Skip(self._given)
        blocks[layer].register_forward_pre_hook(self._substitute, with_kwargs=True)
        self._head = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
        setattr(self._head, model.base_model_prefix, _Body(self._given))

    @torch.no_grad()
    def trunk(self, input_ids: Tensor) -> Activations:
        """Run ``input_ids`` [batch, time], right padded, up to the lowest memory."""
        seen: dict[str, Tensor] = {}

        def block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]

        def memory(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen["read"] = args[0]
            raise _Reached

        hooks = [
            self._blocks[self.layer].register_forward_pre_hook(block, with_kwargs=True),
            self._memory.register_forward_pre_hook(memory),
        ]
        if self.layer:
            hooks.append(self._blocks[self.layer - 1].register_forward_hook(self._given.learn_format))
        try:
            self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return Activations(seen["hidden"], seen["read"])

    def upper(self, hidden: Tensor, past: Past | None = None) -> Tensor:
        """Run what the trunk made, [batch, time, hidden_size], through the rest; return the last hidden states.

        With ``past``, ``hidden`` is what follows a beginning that all rows share.
        """
        cache = past.expand(len(hidden)) if past is not None else None
        return self._run(hidden, cache)

    @torch.no_grad()
    def past(self, hidden: Tensor) -> Past:
        """Keep the keys and values of a shared beginning, [1, time, hidden_size], for :meth:`upper`.

        They hold as long as no memory speaks in it: where the gate is closed, whatever is learned later.
        """
        cache = DynamicCache()
        self._run(hidden, cache)
        return Past(tuple((vars(own)["keys"], vars(own)["values"]) for own in cache.layers[self.layer :]), self.layer)

    def _run(self, hidden: Tensor, cache: DynamicCache | None) -> Tensor:
        with self._given.holding(hidden):
            body = getattr(self._upper, self._upper.base_model_prefix)
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return body(input_ids=ids, past_key_values=cache, use_cache=cache is not None)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits [n, vocab] for last hidden states [n, hidden_size], only where they are needed."""
        with self._given.holding(hidden[None]):
            ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            return self._head(input_ids=ids, use_cache=False).logits[0]

    def _substitute(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._given.hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._given.hidden}


class _Reached(Exception):
    """The trunk's end."""


class _Given:
    """The hidden states that stand in for what was not run, and the form in which this model's blocks return them."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.extra: int | None = None

    @contextmanager
    def holding(self, hidden: Tensor) -> Iterator[None]:
        self.hidden = hidden
        try:
            yield
        finally:
            self.hidden = None

    def learn_format(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.extra = len(output) - 1 if isinstance(output, tuple) else None


class _Skip(nn.Module):
    """Stands where a block of the trunk was."""

    def __init__(self, given: _Given) -> None:
        super().__init__()
        self.given = given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.given.hidden
        return hidden if self.given.extra is None else (hidden, *[None] * self.given.extra)


class _Body(nn.Module):
    """Stands where everything below the output head was."""

    def __init__(self, given: _Given) -> None:
        super().__init__()
        self.given = given

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=cast(torch.FloatTensor, self.given.hidden))
