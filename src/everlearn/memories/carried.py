"""What a memory carries from token to token of a sequence: it travels in the model's own cache."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class Carried(DynamicLayer):
    """A layer of the cache behind those of the model: one whole number for each token of each sequence.

    So it is reordered, repeated, selected and cropped with all the rest, whatever is done with the cache.

    Args:
        by: which memory's it is.
    """

    is_compileable = True  # else the mask of a static cache is not made, and what is not filled yet is attended to

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def last(self) -> Tensor | None:
        """Return the number at the last token of each sequence, [batch]; None if there was none."""
        return self.keys[:, 0, -1, 0] if self.is_initialized and self.keys is not None and self.keys.numel() else None

    def append(self, numbers: Tensor) -> None:
        """Add those of the tokens that were just read, [batch, time]."""
        column = numbers[:, None, :, None]
        self.update(column, column)


class _Pass(threading.local):
    """The cache of the pass that this thread runs, None without one, and how many layers the model has in it."""

    cache: weakref.ref[Cache] | None = None
    layers: int = 0


_pass = _Pass()


def carry_through(block: nn.Module, layers: int) -> None:
    """Let the memories in ``block``, one of the ``layers`` decoder blocks of a model, carry what they have to.

    Args:
        block: a decoder block; the cache is found among its arguments.
        layers: how many blocks the model has.
    """
    block.register_forward_pre_hook(partial(_note, layers), with_kwargs=True)


def carried(memory: nn.Module) -> Carried | None:
    """Return what ``memory`` carries along the sequences that this thread's pass reads; None without a cache."""
    cache = _pass.cache() if _pass.cache is not None else None
    if cache is None:
        return None
    own = next((layer for layer in cache.layers if isinstance(layer, Carried) and layer.by == id(memory)), None)
    if own is None:
        own = Carried(id(memory))
        while len(cache.layers) < _pass.layers and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())  # else a block above would take ours for its own
        cache.layers.append(own)
    return own


def model_layers(cache: Cache) -> list[Any]:
    """Return the layers of ``cache`` that are the model's own."""
    return [layer for layer in cache.layers if not isinstance(layer, Carried)]


def _note(layers: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = (value for value in (*kwargs.values(), *args) if isinstance(value, Cache))
    cache = next(found, None)
    _pass.cache, _pass.layers = None if cache is None else weakref.ref(cache), layers
