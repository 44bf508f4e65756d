"""Optimisers by name: for configurations, and for the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from everlearn.errors import InvalidArgument
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
