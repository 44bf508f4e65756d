"""The from-scratch suites by name."""

from __future__ import annotations

from everlearn.evals.ablation import ABLATION
from everlearn.evals.babilong import BABILONG
from everlearn.evals.formal import FORMAL
from everlearn.evals.lm import LM
from everlearn.evals.mad import MAD
from everlearn.evals.niah import NIAH
from everlearn.evals.suite import Suite

__all__ = ["SUITES"]

# name on the command line -> the suite
SUITES: dict[str, Suite] = {suite.name: suite for suite in (FORMAL, MAD, NIAH, BABILONG, LM, ABLATION)}
