"""Recall against leaks: ``python -m benchmarks.trade_off --data DIR --memory FOLDER --night N``.

One memory that ``everlearn eval diary`` kept (``OUT.work/everlearn-SEED/day-N``) is examined with the gate shut a
little further, and with a higher likeness from which a question is one that a slot answers: what it costs to leak less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from everlearn.evals.diary_data import load_diary
from everlearn.evals.diary_exam import Exam
from everlearn.evals.diary_measures import Reference
from everlearn.evals.diary_methods import Everlearn, Setting
from everlearn.evals.results import provenance, write_json
from everlearn.learner.anchor import ASKING_SLOPE
from everlearn.memories import slots
from everlearn.models.hub import DEFAULT_MODEL, load_model

SHUT = (0.5, 1.0, 2.0, 4.0)  # in log odds
LIKENESS = (0.25, 0.35, 0.45)


def examine(data: Path, split: str, memory: Path, night: int, model: str) -> list[dict[str, Any]]:
    """Return recall, leaks and agreement as the memory is, then at every point."""
    base, tokenizer = load_model(model)
    diary = load_diary(data, split)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(base, tokenizer, model, Path(folder), Path(folder), memory, diary, 0)
        method = Everlearn(setting)
        exam = Exam(diary, Reference(base, tokenizer, Path(folder) / "base.json"), None, 0)
        gate = method.learner._weights.gate
        bias, likeness = gate.bias.clone(), slots.ASKED
        for shut, least in [(0.0, likeness), *((s, likeness) for s in SHUT), *((0.0, at) for at in LIKENESS)]:
            gate.set_(gate.weight, bias - ASKING_SLOPE * shut)
            slots.ASKED = least
            figures, _ = exam.recall_and_locality(method, night)
            rows.append({"shut": shut, "likeness": least, **figures})
            print(rows[-1], flush=True)
        slots.ASKED = likeness
        method.close()
    return rows


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
