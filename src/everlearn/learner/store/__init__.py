"""The crash-safe folder in which one user's memory lives; needs no torch."""

from .memory import MemoryStore
from .records import Dream, Heard, Night, Observation

__all__ = ["Dream", "Heard", "MemoryStore", "Night", "Observation"]
