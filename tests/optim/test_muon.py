"""Muon and M3 as optimisers; Muon beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everlearn.errors import InvalidArgument
from everlearn.ops.updates import M3State, m3_step
from everlearn.optim import M3, Muon

needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_torch_muon
@pytest.mark.parametrize("shape", [(8, 8), (6, 16), (16, 6)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_muon_up_to_its_precision(shape, nesterov):
    """torch iterates in bfloat16, ours in the dtype of the weight."""
    start = torch.randn(*shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1}
    optimizer, reference = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for g in torch.randn(5, *shape):
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        reference.step()
    moved, difference = (ours - start).norm(), (ours - theirs).norm()
    assert difference < 0.02 * moved
    torch.testing.assert_close(
        optimizer.state[ours]["momentum"], reference.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-6
    )


def test_m3_applies_the_pure_step():
    start, gradients = torch.randn(3, 5), torch.randn(9, 3, 5)
    p = nn.Parameter(start.clone())
    options = {"betas": (0.9, 0.99, 0.8), "alpha": 0.7, "frequency": 4, "eps": 1e-6, "form": "printed"}
    optimizer = M3([p], lr=0.05, scale="absolute", **options)
    state = M3State(*(torch.zeros(3, 5) for _ in M3State._fields))
    for step, g in enumerate(gradients):
        p.grad = g.clone()
        optimizer.step()
        direction, state = m3_step(g, state, step=step, scale="absolute", **options)
        start = start - 0.05 * direction
    torch.testing.assert_close(p.detach(), start, rtol=1e-4, atol=1e-5)


@needs_torch_muon
@pytest.mark.parametrize("shape", [(8, 8), (6, 16), (16, 6)])
def test_muon_in_bfloat16_is_nearer_to_torch_muon(shape):
    start = torch.randn(*shape)
    moved = {}
    for name in (None, torch.bfloat16, "torch"):
        p = nn.Parameter(start.clone())
        optimizer = (
            torch.optim.Muon([p], lr=0.1, weight_decay=0.0) if name == "torch" else Muon([p], lr=0.1, ns_dtype=name)
        )
        p.grad = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        moved[name] = p.detach() - start
    low = (moved[torch.bfloat16] - moved["torch"]).norm()
    assert low < 0.01 * moved["torch"].norm()
    assert (moved[None] - moved[torch.bfloat16]).norm() > 0


def test_m3_in_bfloat16_takes_nearly_the_same_steps():
    runs = []
    for dtype in (None, torch.bfloat16):
        p = nn.Parameter(torch.ones(6, 5))
        optimizer = M3([p], lr=0.1, frequency=2, ns_dtype=dtype)
        for g in torch.randn(5, 6, 5, generator=torch.Generator().manual_seed(0)):
            p.grad = g
            optimizer.step()
        runs.append(p.detach() - 1)
    assert 0 < (runs[0] - runs[1]).norm() < 0.03 * runs[0].norm()
    assert optimizer.state[p]["slow_direction"].dtype == torch.float32


def test_m3_without_slow_weight_ignores_the_slow_memory():
    runs = []
    for frequency in (1, 5):
        p = nn.Parameter(torch.ones(3, 5))
        optimizer = M3([p], alpha=0.0, frequency=frequency)
        for g in torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0)):
            p.grad = g
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (Muon, {"momentum": 1.0}, "momentum"),
        (Muon, {"ns_steps": -1}, "ns_steps"),
        (M3, {"betas": (0.9, 0.9)}, "betas"),
        (M3, {"betas": (0.9, 1.5, 0.9)}, "betas"),
        (M3, {"alpha": -1.0}, "alpha"),
        (M3, {"frequency": 0}, "frequency"),
        (M3, {"form": "other"}, "form"),
        (M3, {"scale": "other"}, "scale"),
    ],
)
def test_errors_name_the_argument(kind, options, name):
    with pytest.raises(InvalidArgument, match=name):
        kind([nn.Parameter(torch.randn(2, 2))], **options)
