"""A decoder layer (*Nested Learning*, section 8.3): ``x + Mixer(norm(x))``, then ``x + FeedForward(norm(x))``.

HOPE's mixer is a self-modifying memory and its feed-forward network a continuum memory; with attention in the mixer's
place it is HOPE-Attention, and with a single level besides, a Transformer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from everlearn.blocks.context import Context
from everlearn.memories.self_modifying import SelfModifyingConfig, SelfModifyingMemory, SelfModifyingState

__all__ = ["DecoderLayer", "SelfModifyingMixer"]


class SelfModifyingMixer(SelfModifyingMemory):
    """A self-modifying memory that takes its masks and documents from the layers' common context."""

    def __init__(self, config: SelfModifyingConfig) -> None:
        super().__init__(config)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: SelfModifyingState | None, context: Context
    ) -> tuple[Tensor, SelfModifyingState]:
        """Run over ``x`` ``[B, T, hidden_size]``; see :class:`SelfModifyingMemory`."""
        self._check(x, state)
        state = self.init_state(x.shape[0]) if state is None else state
        sizes = (self.config.chunk_size, self.config.outer_chunk_size)
        if sizes not in context.plans:
            context.plans[sizes] = self.plan(x.shape[1], state.position, context.mask, context.starts)
        return super().forward(x, state, context.plans[sizes])


class DecoderLayer(GradientCheckpointingLayer):
    """Two pre-normed residual halves around ``mixer(x, state, context) -> (y, state)`` and ``feed_forward(x)``."""

    def __init__(self, hidden_size: int, mixer: nn.Module, feed_forward: nn.Module, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.mixer = mixer
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, state: Any, context: Context) -> tuple[Tensor, Any]:
        """Return the layer's output ``[B, T, hidden_size]`` and the mixer's new state."""
        mixed, state = self.mixer(self.mixer_norm(x), state, context)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), state
