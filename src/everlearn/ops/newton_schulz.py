"""Newton-Schulz: the nearest semi-orthogonal matrix by matrix products alone (Muon; *Nested Learning*, section 4).

One iteration maps each singular value ``s`` of ``X`` to ``a s + b s^3 + c s^5`` and leaves the singular vectors alone:

    X <- a X + (b A + c A^2) X,    A = X X^T
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everlearn.errors import InvalidArgument

if TYPE_CHECKING:
    from jaxtyping import Float

Coefficients = tuple[float, float, float]

MUON: Coefficients = (3.4445, -4.7750, 2.0315)
"""Steep at zero: five steps bring singular values near 1, within about 0.3, and never settle (Jordan et al. 2024)."""

CONVERGENT: Coefficients = (15 / 8, -10 / 8, 3 / 8)
"""The quintic with vanishing first and second derivatives at 1: converges to 1 cubically, but starts more slowly."""

MUON_STEPS = 5

GRAM_FORM_RATIO = 2
"""From this many times more columns than rows, few iterations run on the smaller Gram matrix instead."""


def newton_schulz(
    matrix: Float[Tensor, "*batch m n"],
    *,
    steps: int = MUON_STEPS,
    coefficients: Coefficients = MUON,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch m n"]:
    """Push the singular values of ``matrix`` towards 1: the direction of Muon.

    Args:
        matrix: any number of matrices, square or not; they are scaled by their Frobenius norms first.
        steps: iterations. With ``MUON`` five suffice; with ``CONVERGENT`` the error falls below 1e-6 in about
            ``3 + log(1 / smallest) / log(15 / 8)`` for the smallest singular value relative to the Frobenius norm.
        coefficients: ``(a, b, c)``.
        eps: norms below this are raised to it, so that zero maps to zero.
        dtype: precision of the iteration; by default that of ``matrix``.

    Returns:
        Matrices of the shape and dtype of ``matrix``; zero singular values stay zero.

    Raises:
        InvalidArgument: fewer than two dimensions, or negative steps.
    """
    _check(matrix, steps)
    a, b, c = coefficients
    x = matrix if dtype is None else matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    precise = x.dtype in (torch.float32, torch.float64)
    wide = shape[-1] >= GRAM_FORM_RATIO * shape[-2]
    if precise and wide and 0 < steps <= MUON_STEPS:
        x = _gram_form(x, steps, coefficients)
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return (x.mT if tall else x).to(matrix.dtype)


def _gram_form(x: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    """The same iteration on ``A = X X^T`` alone, for ``[n, rows, columns]`` with many more columns than rows.

    ``P = a I + b A + c A^2`` commutes with A, so ``A <- P A P`` and the product of all P, applied to X once, is the
    result: two products with the long side in all instead of two a step. In float32 the error grows to about 1e-4.
    """
    a, b, c = coefficients
    gram, product = x @ x.mT, None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor = factor + a * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    return x if product is None else product @ x


def newton_schulz_naive(
    matrix: Float[Tensor, "*batch m n"],
    *,
    steps: int = MUON_STEPS,
    coefficients: Coefficients = MUON,
    eps: float = 1e-7,
) -> Float[Tensor, "*batch m n"]:
    """The twin of :func:`newton_schulz`: the same polynomial applied to the singular values of an SVD."""
    _check(matrix, steps)
    a, b, c = coefficients
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s.unsqueeze(-2)) @ vh


def polar(matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Return ``U V^T`` of the SVD ``U S V^T``: the limit of :func:`newton_schulz` with ``CONVERGENT`` at full rank."""
    _check(matrix, 0)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _check(matrix: Tensor, steps: int) -> None:
    if matrix.ndim < 2:
        raise InvalidArgument(f"matrix: got the shape {tuple(matrix.shape)}, expected at least two dimensions")
    if steps < 0:
        raise InvalidArgument(f"steps: got {steps}, expected 0 or more")
