"""The shared shell: which parameters get the rule, AdamW for the others, and batching by shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everlearn.errors import InvalidArgument
from everlearn.ops.updates import MomentumState, muon_step
from everlearn.optim import DMGD, M3, DeltaMomentum, Muon
from everlearn.optim import base as shell


def test_a_group_without_a_rule_is_split_by_dimensions():
    matrix, vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    optimizer = Muon([vector, matrix], lr=0.1, adamw_lr=0.003, weight_decay=0.02)
    matrices, vectors = optimizer.param_groups
    assert matrices["params"] == [matrix]
    assert vectors["params"] == [vector]
    assert (matrices["rule"], matrices["lr"], vectors["rule"], vectors["lr"]) == ("matrix", 0.1, "adamw", 0.003)
    assert matrices["weight_decay"] == vectors["weight_decay"] == 0.02


def test_named_parameters_and_single_tensors_are_taken():
    model = nn.Linear(3, 2)
    optimizer = Muon(model.named_parameters(), lr=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    optimizer = Muon([{"params": model.weight}], lr=0.1)
    assert len(optimizer.param_groups) == 1


def test_an_explicit_rule_and_rate_win():
    vector, matrix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
    groups = [{"params": [vector], "rule": "matrix"}, {"params": [matrix], "rule": "adamw", "lr": 0.5}]
    optimizer = Muon(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    vector.grad, before = torch.randn(4), vector.detach().clone()
    optimizer.step()
    assert 0.05 < (before - vector).norm() < 0.13  # Muon of a single row (not column): a step of norm near the rate
    assert vector.shape == (4,)


def test_options_of_an_adamw_group_win_over_its_defaults():
    vector = nn.Parameter(torch.randn(4))
    (group,) = Muon([{"params": [vector], "rule": "adamw", "betas": (0.5, 0.6), "fused": False}]).param_groups
    assert (group["betas"], group["eps"], group["fused"]) == ((0.5, 0.6), 1e-8, False)
    (group,) = Muon([{"params": [vector], "rule": "adamw"}]).param_groups
    assert group["fused"] is True


def test_adamw_groups_step_as_torch_adamw():
    start, gradients = torch.randn(5), torch.randn(6, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Muon([ours], adamw_lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, fused=True)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_batched_steps_equal_the_pure_step_one_by_one(monkeypatch):
    monkeypatch.setattr(shell, "BATCH_ELEMENTS", 40)  # three matrices of 4 x 5 make batches of two and one
    starts, gradients = torch.randn(4, 4, 5), torch.randn(3, 4, 4, 5)
    params = [nn.Parameter(p.clone()) for p in starts] + [nn.Parameter(torch.randn(2, 3))]
    optimizer = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.2)
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    for i, p in enumerate(starts):
        state = MomentumState(torch.zeros(4, 5))
        for step in gradients:
            direction, state = muon_step(step[i], state, beta=0.9)
            p = p * (1 - 0.1 * 0.2) - 0.1 * direction
        torch.testing.assert_close(params[i].detach(), p, rtol=1e-4, atol=1e-5)


def test_convolutions_are_flattened():
    weight, gradient = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    conv, flat = nn.Parameter(weight.clone()), nn.Parameter(weight.reshape(4, 12).clone())
    conv.grad, flat.grad = gradient, gradient.reshape(4, 12)
    Muon([conv]).step()
    Muon([flat]).step()
    torch.testing.assert_close(conv.detach().reshape(4, 12), flat.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Muon, M3, DeltaMomentum, DMGD])
def test_a_stack_steps_as_its_matrices_would_alone(kind):
    start, gradients = torch.randn(2, 3, 4, 5), torch.randn(3, 2, 3, 4, 5)
    stack, singles = nn.Parameter(start.clone()), [nn.Parameter(m.clone()) for m in start.flatten(0, 1)]
    optimizers = kind([{"params": [stack], "rule": "matrix", "stacked": True}]), kind(singles)
    for step in gradients:
        stack.grad = step.clone()
        for p, g in zip(singles, step.flatten(0, 1)):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (stack - start).abs().max() > 1e-3
    torch.testing.assert_close(stack.flatten(0, 1), torch.stack(list(singles)), rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    p = nn.Parameter(torch.randn(2, 2))
    with pytest.raises(InvalidArgument, match="rule"):
        Muon([{"params": [p], "rule": "magic"}])
    with pytest.raises(InvalidArgument, match="lr"):
        Muon([p], lr=-1.0)
    with pytest.raises(InvalidArgument, match="weight_decay"):
        Muon([p], weight_decay=-1.0)
    with pytest.raises(InvalidArgument, match="adamw_lr"):
        Muon([p], adamw_lr=float("nan"))
