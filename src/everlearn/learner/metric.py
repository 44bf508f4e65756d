"""In which coordinates questions are alike: whitened by what varies within them, then learned from practice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 60  # of the learned part
RATE = 1e-3
DECAY = 0.1  # of its distance from doing nothing
SHARPNESS = 10.0  # of the choice between groups, in units of cosine


def whitener(scatter: Tensor, ridge: float) -> Tensor:
    """Return P [d, d], symmetric, in whose coordinates ``scatter`` [d, d] and a share of its mean diagonal is one."""
    diagonal = ridge * scatter.diagonal().mean() + 1e-6
    values, vectors = torch.linalg.eigh((scatter + diagonal * torch.eye(len(scatter))).double())
    return ((vectors * values.rsqrt()) @ vectors.T).to(scatter.dtype)


def learn_metric(x: Tensor, groups: Tensor) -> Tensor:
    """Return M [d, d] such that in ``x M`` what belongs together is nearer than what does not.

    Each row, left out of its group, is to be nearest by cosine to the mean of the rest among those of all groups: the
    leave-one-out objective of neighbourhood components analysis (Goldberger et al. 2004) with means for neighbours.

    Args:
        x: [n, d], centred and whitened.
        groups: to which group each row belongs, [n]; a group of one is only a rival.
    """
    _, groups = groups.unique(return_inverse=True)
    sizes = groups.bincount()
    asked = sizes[groups] > 1
    extra = x.new_zeros(x.shape[1], x.shape[1]).requires_grad_()
    if not asked.any() or len(sizes) < 2:
        return torch.eye(x.shape[1], dtype=x.dtype)
    optimizer = torch.optim.Adam([extra], lr=RATE)
    own = torch.arange(len(x)), groups
    with torch.enable_grad():
        for _ in range(STEPS):
            y = x + x @ extra
            sums = y.new_zeros(len(sizes), y.shape[1]).index_add(0, groups, y)
            likeness = F.normalize(y, dim=-1) @ F.normalize(sums, dim=-1).T
            rest = F.cosine_similarity(y, sums[groups] - y, dim=-1)  # the mean of the others has this direction
            likeness = likeness.index_put(own, rest)
            loss = F.cross_entropy(SHARPNESS * likeness[asked], groups[asked]) + DECAY * extra.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.eye(x.shape[1], dtype=x.dtype) + extra.detach()
