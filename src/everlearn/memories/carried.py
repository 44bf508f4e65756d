"""What a memory carries from token to token of a sequence: it travels in the model's own cache."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DummyLayer

NOBODY = -1  # the number of a token of which nothing is known


class Carried(DummyLayer):
    """A layer of the cache behind those of the model: one whole number for each token of each sequence.

    So it is reordered, repeated, selected and cropped with all the rest, and is no attention for whoever looks at it.

    Attributes:
        words: whether the numbers are the tokens themselves, for all memories; else they are what one memory says.
        numbers: [batch, tokens]; None before the first.
    """

    def __init__(self, words: bool = False) -> None:
        super().__init__()
        self.words = words
        self.numbers: Tensor | None = None

    def last(self, tokens: int) -> Tensor | None:
        """Return the last number of each sequence, [batch]; None unless the ``tokens`` of the cache are all here."""
        return self.numbers[:, -1] if self.numbers is not None and self.numbers.shape[1] == tokens > 0 else None

    def followed_by(self, numbers: Tensor, tokens: int) -> Tensor:
        """Return ``numbers`` [batch, time] behind those here, ``tokens`` in all; those missed before are NOBODY's."""
        before = tokens - numbers.shape[1]
        kept = numbers.new_full((len(numbers), before), NOBODY)
        if self.numbers is not None and len(self.numbers) == len(numbers):
            known = self.numbers[:, :before]
            kept[:, : known.shape[1]] = known
        return torch.cat([kept, numbers], 1)

    def append(self, numbers: Tensor, tokens: int) -> None:
        """Add ``numbers`` [batch, time], then ``tokens`` in all; those missed before are NOBODY's."""
        self.numbers = self.followed_by(numbers, tokens)

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


Embed = Callable[[Tensor], Tensor]


class Turn:
    """A memory's turn in a pass.

    Attributes:
        before: the number at the token before, [batch]; None where a sequence begins, or nothing is known.
        real: which of the tokens are no padding, [batch, any number, the last ones count]; None: all.
        words: the tokens up to the end of this pass, [batch, tokens], NOBODY where one is not known; None: no pass.
        embed: makes tokens [n] the model's input embeddings [n, e].
        numbers: what the memory says of the tokens of this pass, [batch, time]; None until it does.
    """

    def __init__(
        self,
        before: Tensor | None = None,
        real: Tensor | None = None,
        words: Tensor | None = None,
        embed: Embed | None = None,
    ) -> None:
        self.before, self.real, self.words, self.embed = before, real, words, embed
        self.numbers: Tensor | None = None


class _Pass:
    """One run of a model: the cache that it was given, what was carried in it, and the turns of its memories so far."""

    def __init__(self, cache: Cache | None, real: Tensor | None, ids: Tensor | None, embed: Embed) -> None:
        self.cache, self.real, self.ids, self.embed = cache, real, ids, embed
        tokens = 0 if cache is None else int(cache.get_seq_length())
        self.before = [] if cache is None else [one.last(tokens) for one in _carried(cache)]
        known = _words(cache) or Carried()
        self.words = None if ids is None else known.followed_by(ids, tokens + ids.shape[1])
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
    before = run.before[place] if place < len(run.before) else None
    run.turns.append(Turn(before, run.real, run.words, run.embed))
    return run.turns[-1]


def embedded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the input embeddings [n, e] of the tokens ``ids`` [n], as ``model`` reads them, on its device."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    return embedding(ids.to(embedding.weight.device))


@contextmanager
def outside(ids: Tensor, embed: Embed) -> Iterator[None]:
    """Run a part of a model on texts ``ids`` [batch, time] as a pass of its own, of which nothing is carried on."""
    before, _here.run = _here.run, _Pass(None, None, ids, embed)
    try:
        yield
    finally:
        _here.run = before


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache((*args, *kwargs.values()))
    embed = functools.partial(embedded, cast(PreTrainedModel, model))
    real, ids = _real(kwargs.get("attention_mask"), cache), _ids(args, kwargs)
    if real is not None and ids is not None:
        ids = ids.masked_fill(~real[:, -ids.shape[1] :], NOBODY)
    _here.run = _Pass(cache, real, ids, embed)


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tokens of a pass, [batch, time]: NOBODY where it was given embeddings in their place."""
    ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
        return ids
    return None if embeds is None else torch.full(embeds.shape[:2], NOBODY, device=embeds.device)


def _real(mask: Any, cache: Cache | None) -> Tensor | None:
    """Return which tokens are no padding, [batch, any number, the last ones count]; None: all.

    Of a mask [batch, 1, time, keys], or one for each kind of layer, what the last token attends to tells.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:
        seen, time = int(cache.get_seq_length()) if cache is not None else 0, mask.shape[2]
        if mask.shape[3] < seen + time:  # a window that moves: what it has left is not known to be padding
            return None
        mask = mask[:, 0, -1, seen : seen + time]
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
    if run.ids is not None:
        words = _words(cache)
        if words is None:
            words = Carried(words=True)
            cache.layers.append(words)
        words.append(run.ids, int(cache.get_seq_length()))


def _cache(values: Iterable[Any]) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


def _carried(cache: Cache) -> list[Carried]:
    return [layer for layer in cache.layers if isinstance(layer, Carried) and not layer.words]


def _words(cache: Cache | None) -> Carried | None:
    layers = [] if cache is None else cache.layers
    return next((layer for layer in layers if isinstance(layer, Carried) and layer.words), None)
