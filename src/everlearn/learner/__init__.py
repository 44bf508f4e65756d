"""The memory runtime: a learner that hears, sleeps and remembers in its weights.

``everlearn.learner.store`` needs no torch; the rest is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Kind": "everlearn.learner.asked",
    "Learner": "everlearn.learner.learner",
    "Reminder": "everlearn.learner.reports",
    "Schedule": "everlearn.learner.consolidation",
    "SelfStudyDreamer": "everlearn.learner.dreams",
    "SelfStudyObjective": "everlearn.learner.consolidation",
    "SurpriseSelector": "everlearn.learner.selection",
    "MemoryStore": "everlearn.learner.store",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'everlearn.learner' has no attribute {name!r}")
