"""Muon and M3: momentum through Newton-Schulz, at one and at two time scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everlearn.errors import InvalidArgument
from everlearn.ops.newton_schulz import MUON_STEPS
from everlearn.ops.updates import M3_FORMS, M3_SCALES, M3State, MomentumState, m3_step, muon_step
from everlearn.optim.base import ADAMW_LR, MatrixOptimizer, Params, check_range


class Muon(MatrixOptimizer):
    """Muon (Jordan et al. 2024): the Newton-Schulz output of linear momentum.

    Args:
        params: parameters, named parameters or groups.
        lr: rate; each step has a spectral norm of about ``lr * sqrt(max(1, out / in))``.
        momentum: retention of the memory.
        nesterov: look ahead by one step.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: their precision, that of the weights by default; ``torch.bfloat16`` is faster where hardware has it.
        weight_decay: decoupled.
        adamw_lr: rate of vectors, embeddings and heads.

    Raises:
        InvalidArgument: a number out of range.
    """

    State = MomentumState

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = MUON_STEPS,
        ns_dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        adamw_lr: float = ADAMW_LR,
    ) -> None:
        check_range("momentum", momentum, 0.0, 1.0)
        check_range("ns_steps", ns_steps, 0)
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        options["ns_dtype"] = ns_dtype
        super().__init__(params, {**options, "weight_decay": weight_decay}, adamw_lr)

    def direction(self, gradient: Tensor, state: Any, group: dict[str, Any], step: int) -> tuple[Tensor, Any]:
        """Return the orthogonalised momentum."""
        beta, steps, dtype = group["momentum"], group["ns_steps"], group["ns_dtype"]
        return muon_step(gradient, state, beta=beta, nesterov=group["nesterov"], steps=steps, dtype=dtype)


class M3(MatrixOptimizer):
    """Multi-scale momentum Muon (Algorithm 1): a fast memory of gradients each step, a slow one every ``frequency``.

    See :func:`everlearn.ops.updates.m3_step`. State: five tensors the size of the matrix.

    Args:
        params: parameters, named parameters or groups.
        lr: rate.
        betas: factors of the fast memory, the second moment and the slow memory.
        alpha: weight of the slow memory; 0 leaves the fast branch.
        frequency: steps between updates of the slow memory.
        eps: added to the denominator.
        form: ``"decayed"`` exponential averages, or ``"printed"`` undecayed sums as in Algorithm 1.
        scale: denominator ``"relative"`` to its mean over the matrix, or ``"absolute"`` as in Algorithm 1.
        ns_dtype: precision of Newton-Schulz, as for :class:`Muon`.
        weight_decay: decoupled.
        adamw_lr: rate of vectors, embeddings and heads.

    Raises:
        InvalidArgument: a number out of range, or an unknown form or scale.
    """

    State = M3State

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        *,
        betas: tuple[float, float, float] = (0.95, 0.999, 0.9),
        alpha: float = 0.5,
        frequency: int = 10,
        eps: float = 1e-8,
        form: str = "decayed",
        scale: str = "relative",
        ns_dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        adamw_lr: float = ADAMW_LR,
    ) -> None:
        if len(betas) != 3:
            raise InvalidArgument(f"betas: got {betas!r}, expected three numbers")
        for beta in betas:
            check_range("betas", beta, 0.0, 1.0)
        check_range("alpha", alpha, 0.0)
        check_range("frequency", frequency, 1)
        if form not in M3_FORMS or scale not in M3_SCALES:
            raise InvalidArgument(f"form, scale: got {form!r}, {scale!r}, expected one of {M3_FORMS}, of {M3_SCALES}")
        options = {"betas": tuple(betas), "alpha": alpha, "frequency": frequency, "eps": eps}
        options |= {"form": form, "scale": scale, "ns_dtype": ns_dtype}
        super().__init__(params, {"lr": lr, **options, "weight_decay": weight_decay}, adamw_lr)

    def direction(self, gradient: Tensor, state: Any, group: dict[str, Any], step: int) -> tuple[Tensor, Any]:
        """Return both orthogonalised memories over the second moment."""
        options = {name: group[name] for name in ("betas", "alpha", "frequency", "eps", "form", "scale")}
        return m3_step(gradient, state, step=step, dtype=group["ns_dtype"], **options)
