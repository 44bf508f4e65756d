"""What a memory carries from token to token of a sequence: it travels in the model's own cache."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DummyLayer

NOBODY = -1  # the number of a token of which nothing is known


class Carried(DummyLayer):
    """A layer of the cache behind those of the model: one whole number for each token of each sequence.

    So it is reordered, repeated, selected and cropped with all the rest, and is no attention for whoever looks at it.

    Attributes:
        numbers: [batch, tokens]; None before the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Tensor | None = None

    def last(self, tokens: int) -> Tensor | None:
        """Return the last number of each sequence, [batch]; None unless the ``tokens`` of the cache are all here."""
        return self.numbers[:, -1] if self.numbers is not None and self.numbers.shape[1] == tokens > 0 else None

    def append(self, numbers: Tensor, tokens: int) -> None:
        """Add ``numbers`` [batch, time], then ``tokens`` in all; those missed before are NOBODY's."""
        before = tokens - numbers.shape[1]
        kept = numbers.new_full((len(numbers), before), NOBODY)
        if self.numbers is not None and len(self.numbers) == len(numbers):
            known = self.numbers[:, :before]
            kept[:, : known.shape[1]] = known
        self.numbers = torch.cat([kept, numbers], 1)

    def reset(self) -> None:
        """Back to before the first token."""
        self.numbers = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number of them is negative."""
        if self.numbers is not None and tokens_to_remove:
            self.numbers = self.numbers[:, : -abs(tokens_to_remove)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows, by index."""
        if self.numbers is not None:
            self.numbers = self.numbers[beam_idx.to(self.numbers.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by index."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.numbers is not None:
            self.numbers = self.numbers.repeat_interleave(repeats, 0)


class Turn:
    """A memory's turn in a pass.

    Attributes:
        before: the number at the token before, [batch]; None where a sequence begins, or nothing is known.
        real: which of the tokens are no padding, [batch, any number, the last ones count]; None: all.
        numbers: what the memory says of the tokens of this pass, [batch, time]; None until it does.
    """

    def __init__(self, before: Tensor | None = None, real: Tensor | None = None) -> None:
        self.before, self.real = before, real
        self.numbers: Tensor | None = None


class _Pass:
    """One run of a model: the cache that it was given, what was carried in it, and the turns of its memories so far."""

    def __init__(self, cache: Cache | None, real: Tensor | None) -> None:
        self.cache, self.real = cache, real
        self.before = [] if cache is None else [one.last(int(cache.get_seq_length())) for one in _carried(cache)]
        self.turns: list[Turn] = []


class _Here(threading.local):
    """The pass that this thread runs, None outside of one."""

    run: _Pass | None = None


_here = _Here()


def carry_through(model: nn.Module) -> None:
    """Let the memories of ``model`` carry what they say of a token to the next, whenever it is called with a cache."""
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def take_turn() -> Turn:
    """Begin the turn of a memory; one that belongs to no pass is outside of a model, where nothing is carried.

    The memories of a model are told apart by their order in the pass, so each must take its turn in every one.
    """
    run = _here.run
    if run is None:
        return Turn()
    place = len(run.turns)
    run.turns.append(Turn(run.before[place] if place < len(run.before) else None, run.real))
    return run.turns[-1]


@contextmanager
def outside() -> Iterator[None]:
    """Run a part of a model as no pass of it, whatever one before has left behind."""
    before, _here.run = _here.run, None
    try:
        yield
    finally:
        _here.run = before


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache((*args, *kwargs.values()))
    _here.run = _Pass(cache, _real(kwargs.get("attention_mask"), cache))


def _real(mask: Any, cache: Cache | None) -> Tensor | None:
    """Return which tokens are no padding, [batch, any number, the last ones count]; None: all.

    Of a mask [batch, 1, time, keys], or one for each kind of layer, what the last token attends to tells.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:
        seen = int(cache.get_seq_length()) if cache is not None else 0
        mask = mask[:, 0, -1, seen : seen + mask.shape[2]]
        return mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()


def _end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    run, _here.run = _here.run, None
    if run is None or output is None or all(turn.numbers is None for turn in run.turns):
        return
    cache = run.cache
    if cache is None:
        cache = _cache(output.values() if isinstance(output, Mapping) else output)
    if cache is None:
        return
    while len(_carried(cache)) < len(run.turns):
        cache.layers.append(Carried())
    for layer, turn in zip(_carried(cache), run.turns, strict=True):
        if turn.numbers is not None:
            layer.append(turn.numbers, int(cache.get_seq_length()))


def _cache(values: Iterable[Any]) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


def _carried(cache: Cache) -> list[Carried]:
    return [layer for layer in cache.layers if isinstance(layer, Carried)]
