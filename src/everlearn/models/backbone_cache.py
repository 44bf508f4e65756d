"""The cache of our decoders in transformers' form: one mixer state a layer, of whatever kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from everlearn.errors import InvalidArgument

__all__ = ["StateCache"]


class _StateLayer(CacheLayerMixin):
    """One layer's state and the tokens it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the mixer makes its own first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for keys and values: raises InvalidArgument."""
        raise InvalidArgument("past_key_values: got keys and values, expected mixer states (see StateCache.store)")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys and offset a mask would have."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, masked ones included."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Back to before the first token."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the states of some rows."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the states of some rows."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = self.batch_size
            self.state = self.state.select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot forget its last tokens: raises InvalidArgument unless there is nothing to remove."""
        if tokens_to_remove:
            raise InvalidArgument(
                f"tokens_to_remove: got {tokens_to_remove}, expected 0: these states cannot be cropped"
            )

    @property
    def batch_size(self) -> int:
        """Rows of the state, -1 before the first token."""
        if self.state is None:
            return -1
        return next(iter(self.state.state_dict().values())).shape[0]


class StateCache(Cache):
    """Mixer states between calls, to be passed as ``past_key_values``.

    For self-modifying memories its size does not grow with the tokens; attention's part does.

    Attributes:
        first: for each row, the index of the first token of its current document, or None for 0.
        real: tokens of each row so far that were not masked ``[B]``, or None before the first.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_StateLayer() for _ in range(num_layers)])
        self.first: Tensor | None = None
        self.real: Tensor | None = None

    def states(self) -> list[Any]:
        """The state of every layer, None before the first token."""
        return [layer.state for layer in self._own()]

    def store(self, states: list[Any], tokens: int) -> None:
        """Take over the states after ``tokens`` further tokens."""
        for layer, state in zip(self._own(), states, strict=True):
            layer.state = state
            layer.seen += tokens

    def reset(self) -> None:
        """Back to before the first token."""
        super().reset()
        self.first = self.real = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows, by index."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._keep(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by index."""
        super().batch_select_indices(indices)
        self._keep(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = self.batch_size
        super().batch_repeat_interleave(repeats)
        if rows >= 0:
            self._keep(torch.arange(rows).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self.states() if state is not None)

    def _own(self) -> list[_StateLayer]:
        """Our layers; the memories of a stack have theirs behind them."""
        return [layer for layer in self.layers if isinstance(layer, _StateLayer)]

    def _keep(self, rows: Tensor) -> None:
        self.first = None if self.first is None else self.first.index_select(0, rows)
        self.real = None if self.real is None else self.real.index_select(0, rows)
