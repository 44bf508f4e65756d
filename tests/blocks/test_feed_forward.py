"""Gated networks and their chain."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everlearn.blocks.feed_forward import ContinuumFeedForward, ResidualSwiGLU, SwiGLU, continuum_of_swiglu
from everlearn.errors import InvalidArgument


def test_formula():
    layer, x = SwiGLU(6, 4), torch.randn(2, 3, 6)
    gate, up = layer.in_proj.weight.split(4)
    torch.testing.assert_close(layer(x), F.linear(F.silu(x @ gate.T) * (x @ up.T), layer.out_proj.weight))
    residual = ResidualSwiGLU(6, 4)
    residual.load_state_dict(layer.state_dict())
    torch.testing.assert_close(residual(x), x + layer(x))


@pytest.mark.parametrize("wiring", ["sequential", "nested", "independent"])
def test_continuum(wiring):
    chain, x = continuum_of_swiglu(6, 9, ("fast", "mid", "slow"), wiring), torch.randn(2, 6)
    assert [memory.out_proj.in_features for memory in chain.memories] == [3, 3, 3]
    first, second, third = chain.memories
    if wiring == "independent":
        expected = (first(x) + second(x) + third(x)) / 3
    else:
        expected = third(second(first(x))) - x
    torch.testing.assert_close(chain(x), expected)


def test_too_many_levels_are_named():
    with pytest.raises(InvalidArgument, match="intermediate_size"):
        continuum_of_swiglu(6, 1, ("fast", "slow"), "sequential")


def test_independent_levels_are_no_chain():
    with pytest.raises(InvalidArgument, match="wiring"):
        ContinuumFeedForward(("fast",), [ResidualSwiGLU(6, 4)], wiring="independent")
