"""everlearn: language models that keep learning.

``import everlearn`` is light: torch and transformers are imported when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "Level": "everlearn.levels",
    "Clock": "everlearn.levels",
    "stack_levels": "everlearn.models.stacking",
    "Learner": "everlearn.learner",
    "HopeConfig": "everlearn.models.hope",
    "HopeForCausalLM": "everlearn.models.hope",
}

__all__ = ["Clock", "HopeConfig", "HopeForCausalLM", "Learner", "Level", "__version__", "stack_levels"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'everlearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
