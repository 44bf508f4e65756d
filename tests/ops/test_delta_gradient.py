"""A chunk of delta gradient descent against its definition, and the clipping of errors against Huber's loss."""

from __future__ import annotations

import pytest
import torch

from everlearn.ops.delta_gradient import clip_length, delta_gradient_write
from everlearn.ops.delta_rule import delta_rule
from everlearn.ops.delta_rule_chunk import decay_ratios


def inputs(between=(), seed=0):
    """Weight, inputs, gradients, rates and log-decays of a chunk of five tokens, two rows."""
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(2, *shape, generator=gen, dtype=torch.float64)  # noqa: E731
    return [rand(*between, 3, 4), rand(*between, 4, 5), rand(*between, 3, 5), rand(5).sigmoid(), -rand(5).abs()]


def write(weight, x, grad, rate, log_decay):
    return delta_gradient_write(weight, x, grad, weight @ x, rate, decay_ratios(log_decay))


def test_is_the_proximal_step_of_every_token():
    """``W' = argmin 1/2 |W x + g|^2 + 1/(2 eta) |W - W_t|^2`` by its normal equations, then decayed (Eq. 56)."""
    weight, x, grad, rate, log_decay = inputs()
    p, beta, after = write(weight, x, grad, rate, log_decay)
    expected = weight
    for t in range(5):
        key, eta = x[..., t : t + 1], rate[:, t, None, None]
        system = torch.eye(4, dtype=torch.float64) / eta + key @ key.mT
        stepped = torch.linalg.solve(system, expected / eta - grad[..., t : t + 1] @ key.mT, left=False)
        new = stepped + (log_decay[:, t, None, None].exp() - 1) * expected
        torch.testing.assert_close(
            new - log_decay[:, t, None, None].exp() * expected,
            (beta * 1)[:, None, t : t + 1] * p[..., t : t + 1] @ key.mT,
        )
        expected = new
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("between", [(), (2,)])
def test_is_the_delta_rule_with_every_gradient(between):
    weight, x, grad, rate, log_decay = given = [value.requires_grad_() for value in inputs(between)]
    p, beta, after = write(*given)
    axes = (slice(None), *(None,) * len(between))
    expand = lambda value: value[axes].expand(2, *between, 5)  # noqa: E731
    strength = expand(rate) / (1 + expand(rate) * x.square().sum(-2))
    _, expected = delta_rule(
        None, x.mT, -strength.unsqueeze(-1) * grad.mT, expand(log_decay), strength, weight, chunk_size=2
    )
    torch.testing.assert_close(beta, strength)
    found = torch.autograd.grad(after.sin().sum(), given, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), given))
    ends = weight * expand(log_decay).sum(-1).exp()[..., None, None]
    tails = (expand(log_decay).flip(-1).cumsum(-1).flip(-1) - expand(log_decay)).exp()
    torch.testing.assert_close(after, ends + (p * (beta * tails).unsqueeze(-2)) @ x.mT)


def test_gradcheck_of_every_output():
    given = [value.requires_grad_() for value in inputs((2,))]
    assert torch.autograd.gradcheck(write, given)
    assert torch.autograd.gradgradcheck(
        lambda *a: write(*a)[2], [value[:1].detach().requires_grad_() for value in given]
    )


@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
def test_clipping_is_the_gradient_of_hubers_loss(limit):
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    length = x.square().sum(-2).sqrt()
    loss = torch.where(length <= limit, 0.5 * length**2, limit * length - 0.5 * limit**2).sum()
    torch.testing.assert_close(clip_length(x, limit), torch.autograd.grad(loss, x)[0])
    assert torch.autograd.gradcheck(lambda x: clip_length(x, limit), (x,))
    assert torch.autograd.gradgradcheck(lambda x: clip_length(x, limit), (x,))
    zero = torch.zeros(1, 2, 1, requires_grad=True)
    assert torch.equal(torch.autograd.grad(clip_length(zero, limit).sum(), zero)[0], torch.ones(1, 2, 1))


def test_compiles_without_graph_breaks():
    given = [value.float().requires_grad_() for value in inputs()]

    def run(*a):
        p, beta, after = write(*a)
        return clip_length(p, 1.0).sum() + beta.sum() + after.sin().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), run(*given))
    torch.testing.assert_close(torch.autograd.grad(compiled(*given), given), torch.autograd.grad(run(*given), given))


def test_without_gradients_the_result_is_the_same():
    given = [value.requires_grad_() for value in inputs((2,))]
    expected = write(*given)
    with torch.no_grad():
        found = write(*given)
    assert not any(value.requires_grad for value in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
