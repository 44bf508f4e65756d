"""Momentum as a memory with a better objective or more capacity: delta momentum and deep momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everlearn.errors import InvalidArgument
from everlearn.ops.updates import (
    DeepMomentumState,
    MomentumState,
    deep_momentum_start,
    deep_momentum_step,
    delta_momentum_step,
)
from everlearn.optim.base import ADAMW_LR, MatrixOptimizer, Params, check_range


class DeltaMomentum(MatrixOptimizer):
    """Delta momentum (Eq. 48-49): a momentum whose decay depends on the gradient.

    See :func:`everlearn.ops.updates.delta_momentum_step`. State: one tensor a matrix, as for SGD with momentum.

    Args:
        params: parameters, named parameters or groups.
        lr: rate of the weights.
        momentum: retention of the memory.
        eta: the memory's own rate; 0 learns nothing, infinity replaces what was known of the gradient's direction.
        keys: ``"unit"`` normalises gradients as keys, so that nothing depends on the loss's scale; ``"gradient"`` is
            the equation to the letter.
        weight_decay: decoupled.
        adamw_lr: rate of vectors, embeddings and heads.

    Raises:
        InvalidArgument: a number out of range, or unknown ``keys``.
    """

    State = MomentumState

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        eta: float = 1.0,
        keys: str = "unit",
        weight_decay: float = 0.0,
        adamw_lr: float = ADAMW_LR,
    ) -> None:
        check_range("momentum", momentum, 0.0, 1.0)
        check_range("eta", eta, 0.0)
        if keys not in ("unit", "gradient"):
            raise InvalidArgument(f"keys: got {keys!r}, expected 'unit' or 'gradient'")
        options = {"lr": lr, "momentum": momentum, "eta": eta, "keys": keys, "weight_decay": weight_decay}
        super().__init__(params, options, adamw_lr)

    def direction(self, gradient: Tensor, state: Any, group: dict[str, Any], step: int) -> tuple[Tensor, Any]:
        """Return the momentum after the write."""
        unit_keys = group["keys"] == "unit"
        return delta_momentum_step(gradient, state, beta=group["momentum"], eta=group["eta"], unit_keys=unit_keys)


class DMGD(MatrixOptimizer):
    """Deep momentum gradient descent (Eq. 50): momentum is a two-layer memory trained on gradients.

    See :func:`everlearn.ops.updates.deep_momentum_step`. State: ``hidden_size`` tensors the size of the matrix.

    Args:
        params: parameters, named parameters or groups.
        lr: rate of the weights.
        momentum: retention of the memory's output layer.
        eta: rate of the memory's first layer.
        hidden_size: hidden units; one is SGD with momentum.
        weight_decay: decoupled.
        adamw_lr: rate of vectors, embeddings and heads.

    Raises:
        InvalidArgument: a number out of range.
    """

    State = DeepMomentumState

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        *,
        momentum: float = 0.9,
        eta: float = 0.01,
        hidden_size: int = 4,
        weight_decay: float = 0.0,
        adamw_lr: float = ADAMW_LR,
    ) -> None:
        check_range("momentum", momentum, 0.0, 1.0)
        check_range("eta", eta, 0.0)
        check_range("hidden_size", hidden_size, 1)
        options = {"lr": lr, "momentum": momentum, "eta": eta, "hidden_size": hidden_size, "weight_decay": weight_decay}
        super().__init__(params, options, adamw_lr)

    def start(self, matrix: Tensor, group: dict[str, Any]) -> Any:
        """Return a memory with zero output and fixed random factors."""
        return deep_momentum_start(matrix, group["hidden_size"])

    def direction(self, gradient: Tensor, state: Any, group: dict[str, Any], step: int) -> tuple[Tensor, Any]:
        """Return the memory's answer to the gradient after the write."""
        return deep_momentum_step(gradient, state, beta=group["momentum"], eta=group["eta"])
