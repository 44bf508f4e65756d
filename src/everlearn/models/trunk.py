"""A stacked model cut in two below its lowest memory: the frozen trunk, run once a text, and what lies above it.

The trunk is the same for every memory and never changes, so its activations can be kept and every pass of training
starts from them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from everlearn.memories.carried import embedded, outside
from everlearn.memories.continuum import Continuum
from everlearn.memories.gated import GatedMemory
from everlearn.models.stacking import continua, stack_of

_ALL = slice(None)
SHARED_ROWS = 4  # a batch of fewer is run as it is


@dataclass(frozen=True)
class Activations:
    """What the trunk made of a batch: ``hidden`` enters the first block that learns, ``read`` the lowest memory.

    Both are [batch, time, hidden_size]; right padding is whatever came out. ``ids`` are the tokens, [batch, time].
    """

    hidden: Tensor
    read: Tensor
    ids: Tensor

    def part(self, rows: slice | Tensor = _ALL, times: slice = _ALL) -> Activations:
        """Return those of some rows and times."""
        return Activations(self.hidden[rows, times], self.read[rows, times], self.ids[rows, times])

    def split(self, size: int) -> list[Activations]:
        """Return them in batches of ``size``, the last one smaller."""
        return [self.part(slice(start, start + size)) for start in range(0, len(self.hidden), size)]


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

    The cut is below the lowest memory that has something to learn. A memory below it that only opens the gate (width 0)
    is part of the trunk, and its gate is opened anew, from what it read, whenever the upper half runs.

    Args:
        model: made by ``stack_levels``.
        level: cut below the memories of this level alone. Those of other levels that lie below the cut speak in the
            trunk and not in the upper half, so they must be at their start.

    Attributes:
        learning: the upper half's own continua that have something to learn, on the same tensors, lowest layer first.
    """

    def __init__(self, model: PreTrainedModel, level: str | None = None) -> None:
        stacked = continua(model)
        lowest, path = next(iter(stack_of(model).paths.items()))
        learning = [layer for layer, own in stacked.items() if _learns(own, level)]
        blocks_path = path[: path.index(f".{lowest}.")]
        self.model = model
        self.layer = learning[0] if learning else lowest
        self._memory = stacked[lowest]
        self._blocks = cast(nn.ModuleList, model.get_submodule(blocks_path))
        memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self._upper = copy.deepcopy(model, memo)
        own = continua(self._upper)
        self._gates = [m.gate for m in own[lowest].memories if lowest < self.layer and isinstance(m, GatedMemory)]
        self.learning = [own[layer] for layer in learning]
        self._given = _Given()
        blocks = cast(nn.ModuleList, self._upper.get_submodule(blocks_path))
        for index in range(self.layer):
            blocks[index] = _Skip(self._given)
        blocks[self.layer].register_forward_pre_hook(self._substitute, with_kwargs=True)
        self._head = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
        setattr(self._head, model.base_model_prefix, _Body(self._given))

    @torch.no_grad()
    def trunk(self, input_ids: Tensor) -> Activations:
        """Run ``input_ids`` [batch, time], right padded, up to the first block that learns.

        A beginning that all rows share is run once.
        """
        batch, time = input_ids.shape
        same = int((input_ids == input_ids[:1]).all(0).long().cumprod(0).sum())
        start = min(same, time - 1) if batch >= SHARED_ROWS else 0
        if not start:
            return self._reach(input_ids)
        cache = DynamicCache()
        shared = self._reach(input_ids[:1, :start], cache)
        both = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = vars(layer)["keys"], vars(layer)["values"]
            both.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        rest = self._reach(input_ids[:, start:], both)
        pairs = (shared.hidden, rest.hidden), (shared.read, rest.read)
        hidden, read = (torch.cat([first.expand(batch, -1, -1), then], 1) for first, then in pairs)
        return Activations(hidden, read, input_ids)

    def _reach(self, input_ids: Tensor, cache: DynamicCache | None = None) -> Activations:
        """Run up to the first block that learns, behind ``cache``, which is filled up to there."""
        seen: dict[str, Tensor] = {}

        def reached() -> None:
            if len(seen) == 2:
                raise _Reached

        def block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]
            reached()

        def memory(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen["read"] = args[0]
            reached()

        hooks = [
            self._blocks[self.layer].register_forward_pre_hook(block, with_kwargs=True),
            self._memory.register_forward_pre_hook(memory),
        ]
        if self.layer:
            hooks.append(self._blocks[self.layer - 1].register_forward_hook(self._given.learn_format))
        try:
            self.model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return Activations(seen["hidden"], seen["read"], input_ids)

    def upper(self, acts: Activations, past: Past | None = None) -> Tensor:
        """Run what the trunk made through the rest; return the last hidden states, [batch, time, hidden_size].

        With ``past``, ``acts`` is what follows a beginning that all rows share, of whose words no memory knows then.
        """
        cache = past.expand(len(acts.hidden)) if past is not None else None
        return self._run(acts, cache)

    @torch.no_grad()
    def past(self, acts: Activations) -> Past:
        """Keep the keys and values of a shared beginning, a batch of 1, for :meth:`upper`.

        They hold as long as no memory speaks in it: where the gate is closed, whatever is learned later.
        """
        cache = DynamicCache()
        self._run(acts, cache)
        return Past(tuple((vars(own)["keys"], vars(own)["values"]) for own in cache.layers[self.layer :]), self.layer)

    @contextmanager
    def watching(self) -> Iterator[list[list[Tensor]]]:
        """Collect, while :meth:`upper` runs, what the memories of each learning layer read, one list a layer."""
        seen: list[list[Tensor]] = [[] for _ in self.learning]

        def watch(into: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, args: into.append(args[0])

        hooks = [own.register_forward_pre_hook(watch(into)) for own, into in zip(self.learning, seen, strict=True)]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, acts: Activations, cache: DynamicCache | None) -> Tensor:
        for gate in self._gates:
            gate.open(acts.read)
        with self._given.holding(acts.hidden), outside(acts.ids, functools.partial(embedded, self.model)):
            body = getattr(self._upper, self._upper.base_model_prefix)
            return body(input_ids=acts.ids, past_key_values=cache, use_cache=cache is not None)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits [n, vocab] for last hidden states [n, hidden_size], only where they are needed."""
        with self._given.holding(hidden[None]):
            ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            return self._head(input_ids=ids, use_cache=False).logits[0]

    def _substitute(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._given.hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._given.hidden}


def _learns(own: Continuum, level: str | None) -> bool:
    """Whether a memory of ``level``, or of any, does more here than open a gate."""
    named = zip(own.names, own.memories, strict=True)
    memories = [memory for name, memory in named if level in (None, name)]
    return any(not isinstance(memory, GatedMemory) or memory.b.numel() for memory in memories)


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
