"""Whitening: the same function, other steps."""

from __future__ import annotations

import pytest
import torch

from everlearn.learner.whitening import Whitened, whitener
from everlearn.memories.gated import Gate, GatedMemory

D = 12


@pytest.fixture
def moment():
    x = torch.randn(200, D) * torch.logspace(1, -2, D)
    return x.T @ x / len(x)


def memory(learned: bool) -> GatedMemory:
    made = GatedMemory(D, 4, Gate(D), opens=True)
    made.gate.set_(torch.zeros(D), torch.tensor(1.0))
    if learned:
        torch.nn.init.normal_(made.W1)
    return made


def test_whitener_damps_what_is_ordinary_and_keeps_the_mean_square(moment):
    P = whitener(moment)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close((P @ moment @ P).trace(), moment.trace(), rtol=1e-4, atol=1e-4)
    values, vectors = torch.linalg.eigh(moment)
    gains = (vectors.T @ P @ vectors).diagonal()
    assert (gains.diff() < 0).all(), "the larger the variance, the smaller the gain"
    ridge = 0.1 * values.mean()
    torch.testing.assert_close(gains / gains[0], ((values[0] + ridge) / (values + ridge)).sqrt(), rtol=1e-3, atol=1e-3)


def test_a_learned_memory_stays_the_same_function(moment):
    own = memory(learned=True)
    x = torch.randn(5, D)
    before = own(x)
    Whitened([own], moment[None])
    torch.testing.assert_close(own(x), before, rtol=1e-3, atol=1e-3)


def test_an_untouched_memory_starts_with_damped_keys(moment):
    own = memory(learned=False)
    keys = own.W2.detach().clone()
    Whitened([own], moment[None])
    torch.testing.assert_close(own.W2.detach(), keys @ whitener(moment))


def test_a_step_is_that_of_the_whitened_coordinates(moment):
    """The gradient of V is what autograd gives for W2 = V P."""
    own, x = memory(learned=True), torch.randn(5, D)
    whitened = Whitened([own], moment[None])
    V = whitened.params[2]
    own(x).square().sum().backward()
    whitened.collect()
    leaf = V.detach().clone().requires_grad_()
    read = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = x + torch.nn.functional.silu(read @ (leaf @ whitener(moment)).T + own.b) @ own.W1.T
    y.square().sum().backward()
    torch.testing.assert_close(V.grad, leaf.grad, rtol=1e-3, atol=1e-3)
    torch.optim.SGD(whitened.params, lr=0.1).step()
    whitened.write()
    torch.testing.assert_close(own.W2.detach(), V @ whitener(moment))
