"""Attention against its formula, rotation, and which keys are visible."""

from __future__ import annotations

import pytest
import torch

from everlearn.blocks.attention import Attention, rotate
from everlearn.blocks.context import Context, visible_keys
from everlearn.errors import InvalidArgument


@pytest.mark.parametrize("output_gate", [False, True])
def test_is_softmax_attention(output_gate):
    layer = Attention(8, 2, output_gate=output_gate).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    positions = torch.arange(5)[None]
    out, state = layer(x, None, Context(positions))
    q, k, v = layer.in_proj(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = rotate(q, positions) @ rotate(k, positions).mT / 2
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    read = (weights @ v).transpose(1, 2).reshape(2, 5, 8)
    gate = 1 / (1 + (-x @ layer.gate_proj.weight.T).exp()) if output_gate else 1
    torch.testing.assert_close(out, layer.out_proj(read * gate))
    assert state.nbytes == 2 * 2 * 5 * 8 * 8
    assert torch.equal(state.select(torch.tensor([1])).keys[0], state.keys[1])


def test_rotation_is_relative_and_keeps_length():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum()

    torch.testing.assert_close(score(3, 1), score(12, 10), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotate(q, torch.tensor([[5]])).norm(), q.norm(), rtol=1e-6, atol=1e-6)
    assert torch.equal(rotate(q, torch.tensor([[0]])), q)


def test_visible_keys():
    assert visible_keys(3, 0, None, None) is None
    assert visible_keys(1, 5, None, None) is None
    assert visible_keys(2, 1, None, None).int().tolist() == [[[[1, 1, 0], [1, 1, 1]]]]
    mask = torch.tensor([[0, 1, 1]])
    assert visible_keys(3, 0, mask, None).int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]
    first = torch.tensor([[0, 1, 1]])
    assert visible_keys(3, 0, None, first).int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]


def test_sizes_must_divide():
    with pytest.raises(InvalidArgument, match="hidden_size"):
        Attention(9, 3)
