"""The short convolution against PyTorch's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from everlearn.ops.causal_conv import causal_conv


def test_equals_conv1d():
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 3, 0))
    expected = F.conv1d(padded.mT, weight.T.unsqueeze(1), groups=3).mT
    torch.testing.assert_close(causal_conv(padded, weight), expected)


def test_age_hides_what_came_before():
    x, weight = torch.randn(1, 9, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    age = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    out = causal_conv(F.pad(x, (0, 0, 3, 0)), weight, age)
    parts = [causal_conv(F.pad(part, (0, 0, 3, 0)), weight) for part in (x[:, :4], x[:, 4:])]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))


def test_gradients_of_both_forms():
    x, weight = torch.randn(2, 6, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    given = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(causal_conv, given)
    assert torch.autograd.gradgradcheck(causal_conv, given)
    age = torch.tensor([[0, 1, 2, 2], [2, 0, 1, 2]])
    assert torch.autograd.gradcheck(lambda *a: causal_conv(*a, age), given)
    everything = torch.full((2, 4), 2)
    torch.testing.assert_close(causal_conv(*given), causal_conv(*given, everything))


def test_compiles_without_graph_breaks():
    given = [torch.randn(1, 6, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
    compiled = torch.compile(lambda *a: causal_conv(*a).sin().sum(), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*given), given)
    torch.testing.assert_close(found, torch.autograd.grad(causal_conv(*given).sin().sum(), given))
