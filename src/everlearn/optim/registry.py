"""Optimisers by name: for configurations, and for the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from everlearn.errors import InvalidArgument
from everlearn.optim.base import MATRIX, MatrixOptimizer
from everlearn.optim.dgd import DGD
from everlearn.optim.groups import param_groups
from everlearn.optim.momentum import DMGD, DeltaMomentum
from everlearn.optim.multi_frequency import MultiFrequency
from everlearn.optim.muon import M3, Muon

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "dgd": DGD,
    "delta_momentum": DeltaMomentum,
    "dmgd": DMGD,
    "muon": Muon,
    "m3": M3,
    "multi_frequency": MultiFrequency,
}


def create(name: str, model: nn.Module, **options: Any) -> Optimizer:
    """Return the optimiser ``name`` over :func:`everlearn.optim.param_groups` of ``model``.

    Args:
        name: one of ``OPTIMIZERS``.
        model: the model to train.
        options: arguments of the optimiser, ``lr`` among them.

    Raises:
        InvalidArgument: an unknown name.
    """
    if name not in OPTIMIZERS:
        raise InvalidArgument(f"name: got {name!r}, expected one of {sorted(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    target: Any = model if kind is DGD else param_groups(model)
    return kind(target, **options)


def by_name(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return what the Trainer takes: ``Trainer(..., optimizer_cls_and_kwargs=by_name("m3", lr=0.02))``.

    The Trainer calls the first item without arguments and what that returns with the model and the options, so that
    embeddings and heads can be told from other matrices. Its own ``learning_rate`` and ``weight_decay`` do not reach
    the optimiser: give them here. Its learning-rate scheduler and its checkpoints do.

    Raises:
        InvalidArgument: an unknown name.
    """
    if name not in OPTIMIZERS:
        raise InvalidArgument(f"name: got {name!r}, expected one of {sorted(OPTIMIZERS)}")

    def factory() -> Callable[..., Optimizer]:
        return lambda model, **given: create(name, model, **given)

    return factory, options


def for_memory(name: str, *, scale: float = 1.0, **options: Any) -> Callable[[list[Tensor], float], Optimizer]:
    """Return what the memory runtime takes: ``Learner.from_pretrained(optimizer=for_memory("muon", scale=10.0))``.

    All parameters of the memory get the rule, its vectors as matrices of one row, since a sleep has one rate for all.

    Args:
        name: one of ``OPTIMIZERS`` that needs parameters alone: not ``"dgd"``, which needs the module.
        scale: rates are multiplied by this: a sleep's are meant for AdamW, and the norm of Muon's step is another.
        options: arguments of the optimiser.

    Raises:
        InvalidArgument: an unknown name, or ``"dgd"``.
    """
    if name not in OPTIMIZERS or name == "dgd":
        raise InvalidArgument(f"name: got {name!r}, expected one of {sorted(set(OPTIMIZERS) - {'dgd'})}")
    kind: Any = OPTIMIZERS[name]
    ruled = issubclass(kind, MatrixOptimizer)

    def make(params: list[Tensor], rate: float) -> Optimizer:
        return kind([{"params": params, "rule": MATRIX}] if ruled else params, lr=scale * rate, **options)

    return make
