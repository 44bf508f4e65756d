"""Causal softmax attention over a window of the last tokens; its cost and its state do not grow with the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.blocks.attention import rotate
from everlearn.blocks.context import Context, Ranks
from everlearn.blocks.recurrent import share
from everlearn.blocks.state import TensorState
from everlearn.errors import InvalidArgument

__all__ = ["WindowAttention"]


class WindowAttention(nn.Module):
    """Multi-head attention of each token to itself and the ``window - 1`` tokens of its document before it.

    Computed in blocks: a block of queries meets the keys of its own block and ``window - 1`` before it. The state keeps
    ``window - 1`` keys and values and their distance from the next token (0 where there is no key to be seen).

    Args:
        hidden_size, num_heads: as everywhere.
        window: tokens seen.
        rope_theta: base of the rotary wavelengths.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, window: int = 256, rope_theta: float = 10000.0) -> None:
        super().__init__()
        share("hidden_size", hidden_size, num_heads, even=True)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise InvalidArgument(f"window: got {window!r}, expected a whole number of at least 1")
        self.num_heads, self.window, self.rope_theta = num_heads, window, rope_theta
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def init_state(self, k: Tensor) -> TensorState:
        """The state before the first token, for rows and sizes of keys ``k`` ``[B, heads, T, d]``."""
        empty = k.new_zeros(*k.shape[:2], self.window - 1, k.shape[-1])
        back = torch.zeros(k.shape[0], self.window - 1, dtype=torch.long, device=k.device)
        return TensorState({"keys": empty, "values": empty, "back": back})

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Attend over the state and ``x`` ``[B, T, hidden_size]``."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, context.positions, self.rope_theta), rotate(k, context.positions, self.rope_theta)
        state, ranks = self.init_state(k) if state is None else state, context.ranks
        if ranks is not None:
            q, k, v = (_pick(part, ranks.token) for part in (q, k, v))
        k, v = (torch.cat((state[name].to(new.dtype), new), dim=-2) for name, new in (("keys", k), ("values", v)))
        document = self._documents(state["back"], x.shape[1], ranks)
        y = self._attend(q, k, v, document)
        if ranks is not None:
            y = _pick(y, ranks.rank)
        return self.out_proj(y.transpose(1, 2).flatten(2)), self._keep(k, v, document, ranks)

    def _documents(self, back: Tensor, length: int, ranks: Ranks | None) -> Tensor:
        """Number of the document of every key ``[B, S]``, that of the state being 0; -1 where there is none to see."""
        before = torch.where(back > 0, 0, -1)
        if ranks is None:
            return torch.cat((before, before.new_zeros(before.shape[0], length)), dim=1)
        document = (ranks.age == 0).long().cumsum(1)
        kept = torch.arange(length, device=back.device) < ranks.count[:, None]
        return torch.cat((before, torch.where(kept, document, -1)), dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        """Reads ``[B, heads, T, d]`` of queries, which belong to the last ``T`` of ``S`` keys, values and documents."""
        batch, heads, length, size = q.shape
        ahead = self.window - 1
        block = min(length, self.window)
        count = -(-length // block)
        missing = count * block - length
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        document = F.pad(document, (0, missing), value=-1)
        theirs = document.unfold(1, ahead + block, block).unsqueeze(-2)  # [B, blocks, 1, keys of a block]
        index = torch.arange(ahead + block, device=q.device)
        distance = index[ahead:, None] - index  # from a query of a block to a key
        seen = (distance >= 0) & (distance < self.window)
        seen = seen & (theirs >= 0) & (theirs == document[:, ahead:].view(batch, count, block, 1))
        seen = seen | (distance == 0)  # a masked query sees itself, so that its softmax is finite
        keys, values = (x.unfold(2, ahead + block, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
        queries = q.view(batch, heads, count, block, size).transpose(1, 2).flatten(0, 1)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen.flatten(0, 1).unsqueeze(1))
        return y.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :length]

    def _keep(self, k: Tensor, v: Tensor, document: Tensor, ranks: Ranks | None) -> TensorState:
        """The state after these keys: the last ``window - 1`` that are not masked."""
        ahead, batch = self.window - 1, document.shape[0]
        count = document.new_full((batch,), document.shape[1] - ahead) if ranks is None else ranks.count
        index = count[:, None] + torch.arange(ahead, device=document.device)
        current = document.gather(1, (count + ahead - 1)[:, None])
        own = document.gather(1, index) == current.clamp(min=0)
        back = torch.where(own, torch.arange(ahead, 0, -1, device=document.device), 0)
        return TensorState({"keys": _pick(k, index), "values": _pick(v, index), "back": back})


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, :, index[b, i]]`` ``[B, heads, I, d]``."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
