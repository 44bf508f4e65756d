"""Training from scratch, on one process or many: ``train`` and ``generate``."""

from __future__ import annotations

from everlearn.train.generation import generate
from everlearn.train.training import TrainResult, train

__all__ = ["TrainResult", "generate", "train"]
