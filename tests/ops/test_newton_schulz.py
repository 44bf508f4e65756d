"""Newton-Schulz against its SVD twin, its limit and its errors."""

from __future__ import annotations

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.ops.newton_schulz import CONVERGENT, MUON, newton_schulz, newton_schulz_naive, polar

SHAPES = [(8, 8), (8, 12), (12, 30), (30, 12), (1, 7), (7, 1), (3, 6, 16), (2, 3, 9, 5)]


def conditioned(*shape: int, smallest: float = 0.02) -> torch.Tensor:
    """Random singular vectors, singular values spread geometrically from 1 down to ``smallest``."""
    u, _, vh = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    return (u * torch.logspace(0, torch.tensor(smallest).log10(), u.shape[-1], dtype=torch.float64)) @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [MUON, CONVERGENT])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_equals_the_polynomial_of_the_singular_values(shape, coefficients, dtype, tolerance):
    matrix = torch.randn(*shape, dtype=dtype)
    fast = newton_schulz(matrix, coefficients=coefficients)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, newton_schulz_naive(matrix, coefficients=coefficients), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(8, 8), (12, 30), (30, 12)])
def test_gradients_equal_those_of_the_twin(shape):
    matrix, weight = torch.randn(2, *shape, dtype=torch.float64)
    matrix.requires_grad_()
    (fast,) = torch.autograd.grad((newton_schulz(matrix) * weight).sum(), matrix)
    (naive,) = torch.autograd.grad((newton_schulz_naive(matrix) * weight).sum(), matrix)
    torch.testing.assert_close(fast, naive, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 16), (12, 30), (30, 12), (3, 10, 16)])
def test_muon_brings_singular_values_near_one_in_five_steps(shape):
    values = torch.linalg.svdvals(newton_schulz(conditioned(*shape)))
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize("shape", [(16, 16), (12, 30), (30, 12), (3, 10, 16)])
def test_convergent_form_reaches_the_polar_factor(shape):
    matrix = conditioned(*shape, smallest=1e-3)
    errors = [
        (newton_schulz(matrix, steps=n, coefficients=CONVERGENT) - polar(matrix)).abs().max() for n in (5, 12, 18)
    ]
    assert errors[0] > 1e-3  # not there yet
    assert errors[2] < 1e-12
    assert errors[0] > errors[1] > errors[2]


def test_convergence_is_cubic_near_one():
    near = torch.diag(torch.tensor([1.0, 0.99], dtype=torch.float64))
    # undo the Frobenius scaling: start from singular values 1 and 0.99 exactly
    a, b, c = CONVERGENT
    s = 0.99
    for _ in range(2):
        before, s = 1 - s, a * s + b * s**3 + c * s**5
        assert abs(1 - s) < 4 * before**3
    assert (newton_schulz(near, steps=12, coefficients=CONVERGENT) - torch.eye(2)).abs().max() < 1e-14


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (2, 16, 40)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-6])
def test_gram_form_of_oblong_matrices_is_accurate_in_float32(shape, smallest):
    matrix = conditioned(*shape, smallest=smallest)
    error = (newton_schulz(matrix.float()).double() - newton_schulz_naive(matrix)).abs().max()
    assert error < 5e-4


def test_muon_coefficients_do_not_settle():
    values = torch.linalg.svdvals(newton_schulz(conditioned(16, 16), steps=40))
    assert (values - 1).abs().max() > 0.05


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4])
def test_scale_of_the_input_does_not_matter(scale):
    matrix = torch.randn(6, 9, dtype=torch.float64)
    scaled = newton_schulz(matrix * scale, eps=1e-30)
    torch.testing.assert_close(scaled, newton_schulz(matrix), rtol=1e-9, atol=1e-12)


def test_zero_and_rank_deficient_inputs():
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))
    rank_one = torch.outer(torch.randn(6, dtype=torch.float64), torch.randn(9, dtype=torch.float64))
    values = torch.linalg.svdvals(newton_schulz(rank_one))
    assert values[0] > 0.6
    assert values[1] < 1e-12


def test_lower_precision_iterations_return_the_input_dtype():
    matrix = torch.randn(16, 24)
    low = newton_schulz(matrix, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    difference = (low - newton_schulz(matrix)).abs().max()
    assert 0 < difference < 0.1


def test_errors_name_the_argument():
    with pytest.raises(InvalidArgument, match="matrix"):
        newton_schulz(torch.randn(3))
    with pytest.raises(InvalidArgument, match="steps"):
        newton_schulz(torch.randn(3, 3), steps=-1)
    with pytest.raises(InvalidArgument, match="matrix"):
        polar(torch.randn(3))
