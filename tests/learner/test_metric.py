"""Coordinates in which questions are alike."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everlearn.learner.metric import DECAY, RATE, SHARPNESS, STEPS, learn_metric, whitener

D = 12


def test_whitened_scatter_is_one():
    torch.manual_seed(0)
    spread = torch.randn(D, D, dtype=torch.float64)
    scatter = spread @ spread.T
    P = whitener(scatter, 0.0)
    torch.testing.assert_close(P @ scatter @ P, torch.eye(D, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(P, P.T)
    P = whitener(scatter, 0.5)
    ridge = (0.5 * scatter.diagonal().mean() + 1e-6) * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(P @ (scatter + ridge) @ P, torch.eye(D, dtype=torch.float64))


def grouped(groups: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups that differ in the first coordinates and vary, more, along one direction that they share."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(groups, 1, D, generator=draw)
    centers[..., 6:] = 0
    noise = torch.randn(groups, size, 1, generator=draw) * torch.tensor([0.0] * 6 + [2.0] * 6)
    x = centers + noise + 0.1 * torch.randn(groups, size, D, generator=draw)
    return x.flatten(0, 1), torch.arange(groups).repeat_interleave(size)


def nearest(x: torch.Tensor, groups: torch.Tensor) -> float:
    """Return the share of rows that are nearest to the mean of the rest of their own group."""
    count, right = int(groups.max()) + 1, 0
    for row in range(len(x)):
        left = torch.arange(len(x)) != row
        means = torch.stack([x[left & (groups == group)].mean(0) for group in range(count)])
        right += int(F.cosine_similarity(x[row], means, dim=-1).argmax() == groups[row])
    return right / len(x)


def test_a_learned_metric_tells_new_groups_apart():
    x, groups = grouped(40, 4, 0)
    metric = learn_metric(x, groups + 7)
    new, theirs = grouped(40, 4, 1)
    assert nearest(new @ metric, theirs) > nearest(new, theirs) + 0.05
    assert nearest(x @ metric, groups) > nearest(x, groups) + 0.05


def test_it_is_what_adam_makes_of_the_definition():
    """Row by row, in float64: groups in another order, of different sizes, one of them of a single row."""
    x, groups = grouped(10, 4, 2)
    keep = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:30]
    keep = torch.cat([keep[groups[keep] != 5], torch.tensor([20])])
    x, groups = x[keep].double(), groups[keep]
    names = groups.unique().tolist()
    eye = torch.eye(D, dtype=torch.float64)
    M = eye.clone().requires_grad_()
    optimizer = torch.optim.Adam([M], lr=RATE)
    for _ in range(STEPS):
        losses = []
        for row in range(len(x)):
            left = torch.arange(len(x)) != row  # it is left out of its own group
            if (left & (groups == groups[row])).any():
                rest = [left & (groups == g) if g == groups[row] else groups == g for g in names]
                near = F.cosine_similarity((x[row] @ M)[None], torch.stack([x[one].mean(0) @ M for one in rest]))
                losses.append(-(SHARPNESS * near).log_softmax(0)[names.index(int(groups[row]))])
        optimizer.zero_grad()
        (torch.stack(losses).mean() + DECAY * (M - eye).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(learn_metric(x, groups), M.detach())


@pytest.mark.parametrize("groups", [[], [0], [0, 0, 0], [0, 1, 2]])
def test_where_there_is_nothing_to_learn_it_does_nothing(groups):
    assert torch.equal(learn_metric(torch.randn(len(groups), D), torch.tensor(groups, dtype=torch.long)), torch.eye(D))
