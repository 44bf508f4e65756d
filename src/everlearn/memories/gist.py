"""What a text is about, read off its words alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MARK = -1.0  # the weight of a token that ends one part of a conversation and begins the next
SAYS = 0.5  # summed weight of its words from which a text says something; below it its gist is shorter


class Gist(nn.Module):
    """Smooth inverse frequency embeddings (Arora, Liang and Ma 2017) of a text, of the model's own input embeddings.

    ``g = unit(sum_t p_t (E[w_t] - c) P) min(1, sum_t p_t / SAYS)``: p is small for a word that most texts have, c and P
    centre and whiten the embeddings E of the words of ordinary texts. Unlike what a layer reads at one token it knows
    no syntax, and so it errs elsewhere.

    A conversation's parts lie between tokens of weight ``MARK``, those that a chat template sets around a turn. What
    was asked is the part ``behind`` marks before the last: so it is while the reply is spoken, too.

    It says nothing until ``weights`` are written.

    Args:
        size: e, that of an input embedding.

    Attributes:
        weights: p of every token of the vocabulary, or MARK, [v]; [0] at the start.
        center: c [e].
        whitener: P [e, e].
        behind: how many marks follow what is asked before its reply begins, [].
    """

    NAMES = "weights", "center", "whitener", "behind"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights: Tensor
        self.center: Tensor
        self.whitener: Tensor
        self.behind: Tensor
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float16))
        self.register_buffer("center", torch.zeros(size, dtype=torch.float16))
        self.register_buffer("whitener", torch.zeros(size, size, dtype=torch.float16))
        self.register_buffer("behind", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Write the buffers named in ``NAMES``."""
        for name in self.NAMES:
            own = self.get_buffer(name)
            own.data = state[name].to(own).clone()

    def asked(self, ids: Tensor) -> Tensor:
        """Return the part of the tokens ``ids`` [t] of a conversation that is asked, [<= t]; none if it is no such."""
        marks = (self._weights(ids) == MARK).nonzero()[:, 0].tolist()
        behind = int(self.behind)
        if len(marks) < behind:
            return ids[:0]
        cuts = [-1, *marks, len(ids)]
        return ids[cuts[-2 - behind] + 1 : cuts[-1 - behind]]

    @torch.no_grad()
    def forward(self, texts: Sequence[Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gists [n, e] of ``texts``; zero for one that says nothing.

        Args:
            texts: tokens, [t] each; unknown ones are negative.
            embed: makes tokens [m] the model's input embeddings [m, e].
        """
        center, sums, says = self.center.float(), [], []
        for ids in texts:
            weights = self._weights(ids)
            words, weights = ids.to(weights.device)[weights > 0], weights[weights > 0]
            says.append(weights.sum())
            sums.append(weights @ (embed(words).to(center) - center) if len(words) else torch.zeros_like(center))
        if not sums:
            return center.new_zeros(0, len(center))
        share = (torch.stack(says) / SAYS).clamp(max=1.0)
        return share[:, None] * F.normalize(torch.stack(sums) @ self.whitener.float(), dim=-1)

    def _weights(self, ids: Tensor) -> Tensor:
        """Return the weights of the tokens ``ids`` [t], 0 for one that is not known."""
        known, ids = len(self.weights), ids.to(self.weights.device)
        if not known:
            return torch.zeros(ids.shape, device=ids.device)
        return self.weights[ids.clamp(0, known - 1)].float().where((ids >= 0) & (ids < known), 0.0)
