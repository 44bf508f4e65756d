"""The from-scratch suites by name."""

from __future__ import annotations

from everlearn.evals.formal import FORMAL
from everlearn.evals.suite import Suite

__all__ = ["SUITES"]

# name on the command line -> the suite
SUITES: dict[str, Suite] = {suite.name: suite for suite in (FORMAL,)}
