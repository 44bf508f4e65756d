"""Levels with their own optimisers and clocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everlearn.errors import InvalidArgument
from everlearn.levels import Level
from everlearn.optim import M3, MultiFrequency, Muon, param_groups


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def feed(optimizer: MultiFrequency, params: list[nn.Parameter], steps: int, tokens: int) -> list[list[torch.Tensor]]:
    """Give gradient ``step + 1`` to every parameter and return what the parameters were after each step."""
    history = []
    for step in range(steps):
        for p in params:
            p.grad = torch.full_like(p, step + 1.0)
        optimizer.step(tokens=tokens)
        history.append([p.detach().clone() for p in params])
    return history


def test_each_level_steps_on_its_own_clock_with_its_accumulated_gradient():
    fast, slow = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = MultiFrequency([{"params": [fast], "every": 4}, {"params": [slow], "every": 12}], optimizer=sgd)
    history = feed(optimizer, [fast, slow], steps=6, tokens=4)
    torch.testing.assert_close(torch.stack([h[0][0] for h in history]), -0.1 * torch.tensor([1.0, 3, 6, 10, 15, 21]))
    torch.testing.assert_close(torch.stack([h[1][0] for h in history]), -0.1 * torch.tensor([0.0, 0, 6, 6, 6, 21]))


def test_mean_reduction_divides_by_the_steps():
    p = nn.Parameter(torch.zeros(2))
    optimizer = MultiFrequency([{"params": [p], "every": 12}], optimizer=sgd, reduction="mean")
    feed(optimizer, [p], steps=3, tokens=4)
    torch.testing.assert_close(p.detach(), torch.full((2,), -0.2))


def test_a_step_that_meets_several_boundaries_updates_once():
    p = nn.Parameter(torch.zeros(2))
    optimizer = MultiFrequency([{"params": [p], "every": 2}], optimizer=sgd)
    feed(optimizer, [p], steps=1, tokens=7)
    torch.testing.assert_close(p.detach(), torch.full((2,), -0.1))
    assert optimizer.clock.tokens == 7


def test_boundaries_do_not_depend_on_how_tokens_are_cut():
    ends = []
    for tokens in (1, 2, 4):
        p = nn.Parameter(torch.zeros(1))
        optimizer = MultiFrequency([{"params": [p], "every": 8}], optimizer=sgd)
        history = [h[0].item() for h in feed(optimizer, [p], steps=24 // tokens, tokens=tokens)]
        ends.append([tokens * (i + 1) for i, (a, b) in enumerate(zip([0.0, *history], history)) if a != b])
    assert ends == [[8, 16, 24]] * 3


def test_a_level_without_a_period_only_accumulates():
    p = nn.Parameter(torch.zeros(2))
    optimizer = MultiFrequency([{"params": [p], "level": Level("slow", None, optimizer=sgd)}])
    feed(optimizer, [p], steps=5, tokens=100)
    assert torch.equal(p.detach(), torch.zeros(2))
    torch.testing.assert_close(optimizer.state[p]["gradient"], torch.full((2,), 15.0))


def test_every_step_equals_the_plain_optimiser():
    start, gradients = torch.randn(3, 4), torch.randn(6, 3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    levels, plain = MultiFrequency([ours], lr=0.01), torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        levels.step()
        plain.step()
    assert torch.equal(ours, theirs)


def test_slow_level_equals_gradient_accumulation():
    start, gradients = torch.randn(3, 4), torch.randn(6, 3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    level = Level("slow", 3, optimizer=lambda p: M3(p, lr=0.01))
    levels, plain = MultiFrequency([{"params": [ours], "level": level}]), M3([theirs], lr=0.01)
    for step, g in enumerate(gradients):
        ours.grad = g.clone()
        levels.step()
        theirs.grad = g.clone() if theirs.grad is None else theirs.grad + g
        if step % 3 == 2:
            plain.step()
            plain.zero_grad()
    assert torch.equal(ours, theirs)


def test_rates_come_from_the_group_then_the_argument_then_the_level():
    p, q, r = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = MultiFrequency(
        [{"params": [p], "every": 2, "lr": 0.7}, {"params": [q], "level": Level("q", 4, optimizer=sgd)}], lr=0.3
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.3]
    optimizer = MultiFrequency([{"params": [r], "level": Level("r", 4, optimizer=sgd)}])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert (optimizer.param_groups[0]["level"], optimizer.param_groups[0]["every"]) == ("r", 4)


def test_groups_of_a_model_keep_their_rules():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    groups = [{**group, "every": 2} for group in param_groups(model)]
    optimizer = MultiFrequency(groups, optimizer=lambda p: Muon(p, lr=0.5, adamw_lr=0.25))
    assert [group["rule"] for group in optimizer.param_groups] == ["matrix", "adamw", "adamw"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.25]
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_state_of_other_levels_is_refused():
    p = nn.Parameter(torch.zeros(1))
    state = MultiFrequency([{"params": [p], "every": 2}]).state_dict()
    with pytest.raises(InvalidArgument, match="state"):
        MultiFrequency([{"params": [p], "every": 4}]).load_state_dict(state)
    with pytest.raises(InvalidArgument, match="state_dict"):
        MultiFrequency([{"params": [p], "every": 2}]).load_state_dict(torch.optim.SGD([p], lr=0.1).state_dict())


def test_errors_name_the_argument():
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(InvalidArgument, match="reduction"):
        MultiFrequency([p], reduction="max")
    with pytest.raises(InvalidArgument, match="tokens_per_step"):
        MultiFrequency([p], tokens_per_step=0)
    with pytest.raises(InvalidArgument, match="lr"):
        MultiFrequency([p], lr=-0.1)
    with pytest.raises(InvalidArgument, match="level"):
        MultiFrequency([{"params": [p], "level": "slow"}])
    with pytest.raises(InvalidArgument, match="every"):
        MultiFrequency([{"params": [p], "every": 0}])
    with pytest.raises(InvalidArgument, match="params"):
        MultiFrequency([{"params": [p], "every": 1}, {"params": [p], "every": 2}])
    with pytest.raises(InvalidArgument, match="param_group"):
        MultiFrequency([p]).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
