"""Window attention against attention with a band mask, with any block, past and masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everlearn.blocks.attention import Attention
from everlearn.blocks.context import Context
from everlearn.blocks.window_attention import WindowAttention
from everlearn.errors import InvalidArgument


def banded(layer, x, window):
    """Full attention in which each token sees ``window`` keys."""
    full = Attention(layer.in_proj.in_features, layer.num_heads).double()
    full.load_state_dict(layer.state_dict())
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    seen = (distance >= 0) & (distance < window)
    return full(x, None, Context(torch.arange(x.shape[1])[None], visible=seen[None, None]))[0]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 11, 12, 40])
def test_is_attention_with_a_band(window):
    layer, x = WindowAttention(8, 2, window=window).double(), torch.randn(2, 11, 8, dtype=torch.float64)
    y, state = layer(x, None, Context(torch.arange(11)[None]))
    torch.testing.assert_close(y, banded(layer, x, window))
    assert state["keys"].shape == (2, 2, window - 1, 4)
    assert state["back"].tolist() == [[i if i <= 11 else 0 for i in range(window - 1, 0, -1)]] * 2


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [2, 8, 1]])
def test_goes_on_from_a_state(cuts):
    layer, x = WindowAttention(8, 2, window=4).double(), torch.randn(2, 11, 8, dtype=torch.float64)
    state, outs, seen = None, [], 0
    for part in x.split(cuts, dim=1):
        y, state = layer(part, state, Context(torch.arange(seen, seen + part.shape[1])[None]))
        outs.append(y)
        seen += part.shape[1]
    torch.testing.assert_close(torch.cat(outs, dim=1), banded(layer, x, 4))


def test_window_of_one_is_a_feed_forward_network():
    layer, x = WindowAttention(8, 2, window=1), torch.randn(2, 5, 8)
    v = layer.in_proj(x).chunk(3, dim=-1)[2]
    torch.testing.assert_close(layer(x, None, Context(torch.arange(5)[None]))[0], F.linear(v, layer.out_proj.weight))


@pytest.mark.parametrize("window", [0, True, 2.5])
def test_bad_windows_are_named(window):
    with pytest.raises(InvalidArgument, match="window: got"):
        WindowAttention(8, 2, window=window)
