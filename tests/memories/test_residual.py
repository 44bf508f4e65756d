"""The residual memory is the identity until it learns; whitening damps what is ordinary."""

from __future__ import annotations

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.memories import ResidualMemory, whitening_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_identity_at_the_start(dtype):
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert torch.equal(ResidualMemory(8, 16)(x), x)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_equation(activation):
    memory = ResidualMemory(8, 16, activation=activation).double()
    torch.nn.init.normal_(memory.W1)
    whitening, x = torch.randn(8, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    memory.set_whitening(whitening)
    s = getattr(torch.nn.functional, activation)
    expected = torch.stack([row + memory.W1 @ s(memory.W2 @ whitening @ row) for row in x])
    torch.testing.assert_close(memory(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(memory(x), x)


def test_first_gradient_moves_w1_only():
    memory = ResidualMemory(8, 16)
    memory(torch.randn(4, 8)).square().sum().backward()
    assert memory.W1.grad.abs().sum() > 0
    assert memory.W2.grad.abs().sum() == 0


def test_whitening_is_not_part_of_the_state():
    memory = ResidualMemory(4, 2)
    memory.set_whitening(torch.eye(4))
    assert set(memory.state_dict()) == {"W1", "W2"}
    memory.set_whitening(None)
    assert memory.whitening is None


def test_whitening_matrix():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    values = torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    C = basis @ torch.diag(values) @ basis.T
    P = whitening_matrix(C, damping=0.1)
    l = 0.1 * values.mean()
    gains = torch.diagonal(basis.T @ P @ basis)
    torch.testing.assert_close(gains / gains[-1], (l / (values + l)).sqrt(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.trace(P @ C @ P), torch.trace(C))
    torch.testing.assert_close(P, P.T)
    assert whitening_matrix(C.float()).dtype == torch.float32


def test_whitening_matrix_of_an_even_covariance_changes_nothing():
    torch.testing.assert_close(whitening_matrix(3 * torch.eye(5)), torch.eye(5))


def test_errors():
    for make in (
        lambda: ResidualMemory(0, 4),
        lambda: ResidualMemory(4, 0),
        lambda: ResidualMemory(4, 4, activation="tanhh"),
        lambda: ResidualMemory(4, 4).set_whitening(torch.eye(3)),
        lambda: whitening_matrix(torch.ones(3)),
        lambda: whitening_matrix(torch.zeros(3, 3)),
        lambda: whitening_matrix(torch.full((2, 2), torch.nan)),
        lambda: whitening_matrix(torch.eye(3), damping=0.0),
    ):
        with pytest.raises(InvalidArgument, match="expected"):
            make()
