"""The residual MLP memory, and the whitening of its input by an anchor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument

DEFAULT_WIDTH = 256
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class ResidualMemory(nn.Module):
    """``M(x) = x + W1 s(W2 P x)`` (*Nested Learning*, Eq. 89), exactly the identity until W1 first moves.

    ``W1 = 0`` and ``W2 ~ N(0, 1/hidden_size)`` at the start. ``P`` is the identity unless :meth:`set_whitening` is
    called; it belongs to the base model, not to what is remembered, so it is kept out of ``state_dict``. Computes in
    the dtype of its weights (float32 beside a half-precision model) and adds in the dtype of ``x``.

    Args:
        hidden_size: size d of what is read and written.
        width: hidden units r; W1 is [d, r], W2 is [r, d].
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.

    Raises:
        InvalidArgument: a size below 1 or an unknown activation.
    """

    def __init__(self, hidden_size: int, width: int = DEFAULT_WIDTH, *, activation: str = "silu") -> None:
        super().__init__()
        if hidden_size < 1 or width < 1:
            raise InvalidArgument(f"hidden_size, width: got {hidden_size}, {width}, expected at least 1")
        if activation not in ACTIVATIONS:
            raise InvalidArgument(f"activation: got {activation!r}, expected one of {sorted(ACTIVATIONS)}")
        self.activation = activation
        self.W1 = nn.Parameter(torch.zeros(hidden_size, width))
        self.W2 = nn.Parameter(torch.randn(width, hidden_size) * hidden_size**-0.5)
        self.whitening: Tensor | None
        self.register_buffer("whitening", None, persistent=False)

    def set_whitening(self, matrix: Tensor | None) -> None:
        """Read ``P x`` in place of ``x`` from now on; ``matrix`` is P, [hidden_size, hidden_size], or None for none."""
        size = self.W1.shape[0]
        if matrix is not None and matrix.shape != (size, size):
            raise InvalidArgument(f"matrix: got shape {tuple(matrix.shape)}, expected {(size, size)}")
        self.whitening = None if matrix is None else matrix.detach().to(self.W1)

    def extra_repr(self) -> str:
        """Return the sizes and the activation, as ``repr`` and a memory file's layout show them."""
        return f"hidden_size={self.W1.shape[0]}, width={self.W1.shape[1]}, activation={self.activation!r}"

    def delta(self, x: Tensor) -> Tensor:
        """Return ``W1 s(W2 P x)``, what the memory adds to ``x`` [..., hidden_size]; zero before the first update."""
        read = x.to(self.W2.dtype)
        if self.whitening is not None:
            read = F.linear(read, self.whitening)
        return F.linear(ACTIVATIONS[self.activation](F.linear(read, self.W2)), self.W1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + delta(x)``, [..., hidden_size]."""
        return x + self.delta(x)


def whitening_matrix(covariance: Tensor, damping: float = 0.1) -> Tensor:
    """Return ``P = a (l / (C + l))^(1/2)``, which damps the directions that are ordinary and lets pass what is new.

    ``l`` is ``damping`` times the mean eigenvalue of C, and ``a`` keeps the mean square norm of the anchor's inputs:
    ``tr(P C P) = tr(C)``.

    Args:
        covariance: C = E[x x^T] over the anchor's inputs, [d, d], symmetric and positive semi-definite.
        damping: above 0; smaller damps more.

    Returns:
        P, [d, d], symmetric, in the dtype of ``covariance`` (computed in float64).

    Raises:
        InvalidArgument: ``covariance`` is not square, not finite or zero, or ``damping`` is not positive.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise InvalidArgument(f"covariance: got shape {tuple(covariance.shape)}, expected a square matrix")
    if not damping > 0:
        raise InvalidArgument(f"damping: got {damping}, expected a number above 0")
    if not bool(torch.isfinite(covariance).all()) or not bool(covariance.diagonal().sum() > 0):
        raise InvalidArgument("covariance: got one that is zero or not finite, expected a covariance")
    C = covariance.double()
    values, basis = torch.linalg.eigh((C + C.mT) / 2)
    values = values.clamp(min=0)
    l = damping * values.mean()
    gain = (l / (values + l)).sqrt()
    gain = gain * (values.sum() / (gain.square() * values).sum()).sqrt()
    return ((basis * gain) @ basis.mT).to(covariance.dtype)
