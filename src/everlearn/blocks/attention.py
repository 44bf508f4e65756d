"""Causal softmax attention with rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.blocks.context import Context
from everlearn.errors import InvalidArgument

__all__ = ["Attention", "KeyValues", "rotate"]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of all tokens so far, ``[B, heads, S, head_size]`` each."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def select(self, rows: Tensor) -> KeyValues:
        """Those of some batch rows, by index."""
        return KeyValues(self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def state_dict(self) -> dict[str, Tensor]:
        """Both by name; :meth:`from_state_dict` is the way back."""
        return {"keys": self.keys, "values": self.values}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> KeyValues:
        """Rebuild from :meth:`state_dict`."""
        return cls(tensors["keys"], tensors["values"])


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary position embedding: pairs ``(x_i, x_{i + d/2})`` turned by ``position theta^(-2i/d)``.

    Args:
        x: ``[B, heads, T, d]``, ``d`` even.
        positions: ``[B or 1, T]``.
        theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)
    rates = theta ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = positions[:, None, :, None].to(exact) * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head causal attention, ``[B, T, hidden_size] -> [B, T, hidden_size]``; its state grows with the tokens.

    Args:
        hidden_size: size of input and output; a multiple of ``2 num_heads``.
        num_heads: heads.
        rope_theta: base of the wavelengths.
        output_gate: multiply what is read by ``sigmoid(W_g x)`` before the output projection (Qiu et al. 2025).

    Raises:
        InvalidArgument: a size that does not divide.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, rope_theta: float = 10000.0, output_gate: bool = False
    ) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise InvalidArgument(
                f"hidden_size: got {hidden_size}, expected a multiple of 2 num_heads = {2 * num_heads}"
            )
        self.num_heads, self.rope_theta = num_heads, rope_theta
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False) if output_gate else None

    def forward(self, x: Tensor, state: KeyValues | None, context: Context) -> tuple[Tensor, KeyValues]:
        """Attend over the state and ``x``; returns the outputs and the state with the keys and values of ``x``."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, context.positions, self.rope_theta), rotate(k, context.positions, self.rope_theta)
        if state is not None:
            k, v = torch.cat((state.keys, k), dim=-2), torch.cat((state.values, v), dim=-2)
        causal = context.visible is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.visible, is_causal=causal)
        read = out.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            read = read * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(read), KeyValues(k, v)
