"""``everlearn eval ablation``: what each part of HOPE buys, the rows of the paper, as language models on books.

"full" has every part; each other row lacks one. HOPE as configured by default is nearest to "-q": the equations
(Eq. 83) have a static query, the paper's ablation an adaptive one, and a momentum that the equations lack. "-gate" is a
row of ours: the paper says nothing of a gate on the output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from everlearn.evals import lm
from everlearn.evals.contestants import Size
from everlearn.evals.lm import Budget, run
from everlearn.evals.sources import Sources
from everlearn.evals.suite import Suite

__all__ = ["ABLATION", "ROWS"]

ALL = ("q", "k", "v", "eta", "alpha")
FULL = {"adaptive": list(ALL), "momentum": 0.5, "rule": "dgd", "decay": True}


def _without(name: str) -> dict[str, Any]:
    return {"memory": {"adaptive": [role for role in ALL if role != name]}}


# row -> the fields of HopeConfig that differ from "full"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("hope", {}),
    "-dgd": ("hope", {"memory": {"rule": "gd"}}),
    "-momentum": ("hope", {"memory": {"momentum": 0.0}}),
    "-decay": ("hope", {"memory": {"decay": False}}),
    "-cms": ("hope", {"cms_periods": [1]}),
    "-k": ("hope", _without("k")),
    "-v": ("hope", _without("v")),
    "-q": ("hope", _without("q")),
    "-gate": ("hope", {"memory": {"output_gate": False}}),
}

BUDGETS = {
    name: replace(plan, size=Size(**{**vars(plan.size), "memory": {**plan.size.memory, **FULL}}), tests=())
    for name, plan in lm.BUDGETS.items()
}
BUDGETS["small"] = replace(BUDGETS["small"], steps=400, grid=({"lr": 1e-2},))


def notes(plan: Budget) -> list[str]:
    """Say what differs from the published protocol."""
    return [
        *lm.notes(plan),
        "published: perplexity 12.24 full, 13.41 -dgd, 13.58 -momentum, 13.71 -decay, 13.04 -cms, 13.77 -k, 13.90 -v,"
        " 12.19 -q, one seed",
        "rows are not made equal in parameters: what a part adds is part of it",
        *(["the one rate is HOPE's best of the two of `eval lm`; no row is tuned"] if len(plan.grid) == 1 else []),
    ]


ABLATION = Suite(
    name="ablation",
    version=1,
    tasks=("lm",),
    budgets=BUDGETS,
    settings=lambda plan, task: ("",),
    run=run,
    notes=notes,
    variants=ROWS,
    only_variants=True,
    digest=lambda data: Sources.at(data).digest("books"),
)
