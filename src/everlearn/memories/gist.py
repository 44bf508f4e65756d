"""What a text is about, read off its words alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MARK = -1.0  # the weight of a token that ends one part of a conversation and begins the next
SAYS = 0.5  # summed weight of its words from which a part says something


class Gist(nn.Module):
    """Smooth inverse frequency embeddings (Arora, Liang and Ma 2017) of what was said last, with the model's own rows.

    ``g = unit(sum_t p_t (E[w_t] - c) P)``: p is small for a word that most texts have, c and P centre and whiten the
    embeddings E of the words of ordinary texts. Unlike what a layer reads at one token it knows no syntax, and so it
    errs elsewhere.

    A conversation's parts lie between tokens of weight ``MARK``, those that a chat template sets around a turn. The
    last part that says something counts: it is the question also where the words that begin a reply follow.

    It says nothing until ``weights`` are written.

    Args:
        size: e, that of an input embedding.

    Attributes:
        weights: p of every token of the vocabulary, or MARK, [v]; [0] at the start.
        center: c [e].
        whitener: P [e, e].
    """

    NAMES = "weights", "center", "whitener"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights: Tensor
        self.center: Tensor
        self.whitener: Tensor
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float16))
        self.register_buffer("center", torch.zeros(size, dtype=torch.float16))
        self.register_buffer("whitener", torch.zeros(size, size, dtype=torch.float16))

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Write the buffers named in ``NAMES``."""
        for name in self.NAMES:
            own = self.get_buffer(name)
            own.data = state[name].to(own)

    def said(self, ids: Tensor) -> Tensor:
        """Return the last part of the tokens ``ids`` [t] that says something, [<= t]; unknown ones are negative."""
        weights = self.weights[ids.clamp(0, len(self.weights) - 1)].float().where(ids >= 0, 0.0)
        end = len(ids)
        for mark in [*(weights == MARK).nonzero()[:, 0].flip(0).tolist(), -1]:
            if weights[mark + 1 : end].sum() >= SAYS:
                return ids[mark + 1 : end]
            end = mark
        return ids[:0]

    @torch.no_grad()
    def forward(self, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return g [e] of the tokens ``ids`` [t]; zero where they say nothing.

        Args:
            ids: a conversation so far.
            embed: makes tokens [n] the model's input embeddings [n, e].
        """
        words = self.said(ids) if len(self.weights) else ids[:0]
        words = words[words >= 0]
        if not len(words):
            return torch.zeros(len(self.center), device=ids.device)
        weights = self.weights[words.clamp(max=len(self.weights) - 1)].float()
        centred = embed(words).float() - self.center.float()
        return F.normalize(weights @ centred @ self.whitener.float(), dim=0)
