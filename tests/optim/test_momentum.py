"""Delta and deep momentum as optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everlearn.errors import InvalidArgument
from everlearn.ops.updates import MomentumState, delta_momentum_step
from everlearn.optim import DMGD, DeltaMomentum


@pytest.mark.parametrize("keys", ["unit", "gradient"])
def test_delta_momentum_applies_the_pure_step(keys):
    start, gradients = torch.randn(3, 4), torch.randn(4, 3, 4)
    p = nn.Parameter(start.clone())
    optimizer = DeltaMomentum([p], lr=0.1, momentum=0.8, eta=0.5, keys=keys)
    state = MomentumState(torch.zeros(3, 4))
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        direction, state = delta_momentum_step(g, state, beta=0.8, eta=0.5, unit_keys=keys == "unit")
        start = start - 0.1 * direction
    torch.testing.assert_close(p.detach(), start, rtol=1e-5, atol=1e-6)


def test_dmgd_with_one_hidden_unit_is_sgd_with_momentum():
    start = torch.randn(3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    deep = DMGD([ours], lr=0.1, momentum=0.9, hidden_size=1)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for g in torch.randn(6, 3, 4):
        ours.grad, theirs.grad = g.clone(), g.clone()
        deep.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dmgd_keeps_hidden_size_memories():
    p = nn.Parameter(torch.randn(3, 4))
    optimizer = DMGD([p], hidden_size=5)
    p.grad = torch.randn(3, 4)
    optimizer.step()
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[p].items() if name != "step"}
    assert shapes == {"output": (5, 3, 4), "left": (5, 3), "right": (5, 4)}


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (DeltaMomentum, {"momentum": 1.0}, "momentum"),
        (DeltaMomentum, {"eta": -0.1}, "eta"),
        (DeltaMomentum, {"keys": "both"}, "keys"),
        (DMGD, {"momentum": -0.1}, "momentum"),
        (DMGD, {"eta": -0.1}, "eta"),
        (DMGD, {"hidden_size": 0}, "hidden_size"),
    ],
)
def test_errors_name_the_argument(kind, options, name):
    with pytest.raises(InvalidArgument, match=name):
        kind([nn.Parameter(torch.randn(2, 2))], **options)
