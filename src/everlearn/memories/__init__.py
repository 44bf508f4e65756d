"""Associative memories: modules that learn while they are used."""

from everlearn.memories.continuum import Continuum
from everlearn.memories.residual import ResidualMemory, whitening_matrix

__all__ = ["Continuum", "ResidualMemory", "whitening_matrix"]
