"""The shell that all rules for matrices share: parameter groups, state, batching, and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from everlearn.errors import InvalidArgument

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

MATRIX, ADAMW = "matrix", "adamw"
ADAMW_LR = 1e-3
ADAMW_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}
BATCH_ELEMENTS = 2**18
"""Matrices of one shape are stacked and stepped together, up to this many elements."""


class MatrixOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` that steps matrices by one rule and all other parameters by fused AdamW.

    A group says which it is by ``rule: "matrix" | "adamw"``, as :func:`everlearn.optim.param_groups` does; a group that
    does not is split: parameters with two or more dimensions are matrices. Further dimensions are flattened into the
    second, as those of a convolution's weight should be; in a group with ``stacked: True`` they are instead the leading
    ones of a stack of matrices ``[*batch, out, in]``, each stepped on its own. A vector sent to the matrix rule is one
    row.

    Subclasses give ``State``, ``start`` and ``direction``, thin calls of the steps in :mod:`everlearn.ops.updates`.

    Args:
        params: parameters, named parameters or groups.
        defaults: ``lr``, ``weight_decay`` (decoupled) and the rule's own options.
        adamw_lr: rate of AdamW groups that name none.
    """

    def __init__(self, params: Params, defaults: dict[str, Any], adamw_lr: float = ADAMW_LR) -> None:
        for name, value in (("lr", defaults["lr"]), ("weight_decay", defaults["weight_decay"]), ("adamw_lr", adamw_lr)):
            check_range(name, value, 0.0)
        super().__init__(cast(Any, params), {**defaults, "adamw_lr": adamw_lr})

    State: type[Any]
    """The named tuple of tensors that the rule keeps for a matrix."""

    def start(self, matrix: Tensor, group: dict[str, Any]) -> Any:
        """Return the empty ``State`` for a matrix or stack: zeros unless the rule says otherwise."""
        return self.State(*(torch.zeros_like(matrix) for _ in self.State._fields))

    def direction(self, gradient: Tensor, state: Any, group: dict[str, Any], step: int) -> tuple[Tensor, Any]:
        """Return direction and next state for ``[n, *batch, out, in]`` gradients; ``step`` came before this one."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one without a ``rule`` is split by the number of dimensions of its parameters."""
        rule = param_group.get("rule")
        if rule not in (None, MATRIX, ADAMW):
            raise InvalidArgument(f"rule: got {rule!r}, expected {MATRIX!r} or {ADAMW!r}")
        if rule == MATRIX:
            super().add_param_group(param_group)
        elif rule == ADAMW:
            super().add_param_group({"lr": self.defaults["adamw_lr"], **ADAMW_DEFAULTS, **param_group})
        else:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            vectors = [item for item in params if (item[1] if isinstance(item, tuple) else item).ndim < 2]
            matrices = [item for item in params if (item[1] if isinstance(item, tuple) else item).ndim >= 2]
            if matrices or not vectors:
                self.add_param_group({**param_group, "params": matrices, "rule": MATRIX})
            if vectors:
                self.add_param_group({**param_group, "params": vectors, "rule": ADAMW})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns the loss of ``closure`` where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == MATRIX:
                self._step_matrices(params, group)
            else:
                self._step_adamw(params, group)
        return loss

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for batch, step in self._batches(params, group):
            states = [self.state[p] for p in batch]
            stacked = group.get("stacked", False)
            gradient = _stack([as_matrix(cast(Tensor, p.grad), stacked) for p in batch])
            fields = self.State._fields
            state = self.State(*(_stack([s[field] for s in states]) for field in fields))
            direction, after = self.direction(gradient, state, group, step)
            for field, values in zip(fields, after):
                torch._foreach_copy_([s[field] for s in states], list(values.unbind()))
            for s in states:
                s["step"] = step + 1
            if group["weight_decay"]:
                torch._foreach_mul_(batch, 1 - group["lr"] * group["weight_decay"])
            moves = [d.reshape(p.shape) for p, d in zip(batch, direction.unbind())]
            torch._foreach_add_(batch, moves, alpha=-group["lr"])

    def _batches(self, params: list[Tensor], group: dict[str, Any]) -> Iterator[tuple[list[Tensor], int]]:
        """Yield parameters that can be stacked (one shape, dtype, device and number of steps), and their steps."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        stacked = group.get("stacked", False)
        for p in params:
            state = self.state[p]
            if not state:
                empty = self.start(as_matrix(p, stacked), group)
                state.update({"step": 0, **{name: t.clone() for name, t in zip(self.State._fields, empty)}})
            buckets.setdefault((as_matrix(p, stacked).shape, p.dtype, p.device, state["step"]), []).append(p)
        for (*_, step), bucket in buckets.items():
            size = max(1, BATCH_ELEMENTS // max(1, bucket[0].numel()))
            for first in range(0, len(bucket), size):
                yield bucket[first : first + size], step

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def as_matrix(tensor: Tensor, stacked: bool = False) -> Tensor:
    """View ``tensor`` as ``[out, in]``: a vector is one row, further dimensions are flattened into the second.

    With ``stacked`` a tensor of more dimensions is a stack of matrices already and returned as it is.
    """
    if stacked and tensor.ndim > 2:
        return tensor
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise InvalidArgument unless ``low <= value < high`` (or ``high`` is infinite)."""
    if not low <= value < high:
        raise InvalidArgument(f"{name}: got {value!r}, expected a number in [{low}, {high})")


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
