"""How long a sleep takes: ``python -m benchmarks.nights --data DIR [--memory FILE --night N]``.

The facts of the diary's first day are told to an untouched memory, and those of night ``N`` to one that
``everlearn eval diary`` kept (``OUT.work/everlearn-SEED/day-(N - 1)/memory.everlearn``); each is slept on once, with
dreams of its own. What is read once for a base model, its voice and the practice, is read before the clock starts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from everlearn.evals.diary_data import load_diary
from everlearn.evals.results import provenance, write_json
from everlearn.learner.learner import Learner
from everlearn.models.hub import DEFAULT_MODEL, load_model


def sleep(base: Any, tokenizer: Any, said: list[str], kept: Path | None) -> float:
    """Return the seconds of one sleep on ``said``, of an untouched memory or of a copy of ``kept``."""
    with tempfile.TemporaryDirectory() as folder:
        memory = Path(folder) / "memory"
        if kept is not None:
            Learner.import_(kept, memory=memory)
        with Learner.from_pretrained(base, tokenizer=tokenizer, memory=memory) as learner:
            learner._weights.anchor  # noqa: B018, reads the voice and the practice
            for text in said:
                learner.observe(text)
            began = time.perf_counter()
            learner.sleep()
            return time.perf_counter() - began


def main() -> None:
    """Sleep and write the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--night", type=int, default=9)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, default=Path("docs/results/nights.json"))
    given = parser.parse_args()
    base, tokenizer = load_model(given.model)
    diary, rows = load_diary(given.data, given.split), []
    for night, kept in [(1, None), *([(given.night, given.memory)] if given.memory else [])]:
        said = [fact.said for fact in diary.facts if fact.day == night]
        seconds = sleep(base, tokenizer, said, kept)
        rows.append({"night": night, "facts": len(said), "seconds": seconds, "seconds_per_fact": seconds / len(said)})
        print(rows[-1], flush=True)
    write_json(given.json, {"threads": torch.get_num_threads(), "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
