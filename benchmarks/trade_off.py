"""Recall against leaks: ``python -m benchmarks.trade_off --data DIR --memory FOLDER --night N``.

One memory that ``everlearn eval diary`` kept (``OUT.work/everlearn-SEED/day-N``) is examined as it is, with the gate
shut a little further or less, and with another least likeness from which a slot begins a reply or goes on with one:
what it costs to leak less, and to invent less of what was never told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from everlearn.evals.diary_data import load_diary
from everlearn.evals.diary_exam import Exam
from everlearn.evals.diary_measures import Reference
from everlearn.evals.diary_methods import Everlearn, Setting
from everlearn.evals.results import provenance, write_json
from everlearn.learner.anchor import ASKING_SLOPE
from everlearn.learner.learner import Learner
from everlearn.memories.slots import ASKED, SPOKEN
from everlearn.models.hub import DEFAULT_MODEL, load_model

SHUT = (-1.0, -0.5, 0.5, 1.0)  # in log odds
BEGIN, GO_ON = (0.2, 0.25, 0.3, 0.35, 0.4), (0.5,)  # likeness


def examine(data: Path, split: str, memory: Path, night: int, model: str) -> list[dict[str, Any]]:
    """Return recall, leaks and agreement as the memory is, then at every point."""
    base, tokenizer = load_model(model)
    diary = load_diary(data, split)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(base, tokenizer, model, Path(folder), Path(folder), memory, diary, 0)
        method = Everlearn(setting)
        exam = Exam(diary, Reference(base, tokenizer, Path(folder) / "base.json"), None, 0)
        bias = method.learner._weights.gate.bias.clone()
        usual = {"shut": 0.0, "begin": ASKED, "go_on": SPOKEN}
        moved = [
            {},
            *({"shut": s} for s in SHUT),
            *({"begin": s} for s in BEGIN),
            *({"go_on": s} for s in GO_ON),
        ]
        for point in [{**usual, **change} for change in moved]:
            move(method.learner, bias, **point)
            figures, _ = exam.recall_and_locality(method, night)
            rows.append({**point, **figures})
            print(rows[-1], flush=True)
        method.close()
    return rows


def move(learner: Learner, bias: Tensor, *, shut: float, begin: float, go_on: float) -> None:
    """Shut the gate by ``shut`` log odds from ``bias``, and let slots begin and go on from those likenesses on."""
    gate = learner._weights.gate
    gate.set_(gate.weight, bias - ASKING_SLOPE * shut)
    for memory in learner._weights.slots:
        memory.asked, memory.spoken = begin, go_on


def main() -> None:
    """Examine and write the points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--memory", type=Path, required=True)
    parser.add_argument("--night", type=int, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, default=Path("docs/results/trade_off.json"))
    given = parser.parse_args()
    rows = examine(given.data, given.split, given.memory, given.night, given.model)
    write_json(given.json, {"night": given.night, "rows": rows, "provenance": provenance()})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
