"""Optimisers that remember: memories of gradients with more capacity than momentum (*Nested Learning*, section 4).

All are ``torch.optim.Optimizer`` subclasses: ``DGD(module, lr=...)``, the others ``Cls(params, lr=...)``.
"""

from __future__ import annotations

from everlearn.optim.dgd import DGD
from everlearn.optim.groups import param_groups
from everlearn.optim.momentum import DMGD, DeltaMomentum
from everlearn.optim.multi_frequency import MultiFrequency
from everlearn.optim.muon import M3, Muon
from everlearn.optim.registry import OPTIMIZERS, by_name, create, for_memory

__all__ = [
    "DGD",
    "DMGD",
    "M3",
    "OPTIMIZERS",
    "DeltaMomentum",
    "MultiFrequency",
    "Muon",
    "by_name",
    "create",
    "for_memory",
    "param_groups",
]
