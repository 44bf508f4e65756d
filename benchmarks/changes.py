"""Which later messages replace what an earlier one said: ``python -m benchmarks.changes``.

``changes.jsonl`` has 300 pairs, written for this project without sight of the diary: 120 whose second message replaces
the answer that the first gave to two questions, and 180 near ones that do not (the same of somebody else, something
else of the same person, an alternative that was declined). Each pair is put to the rule of a night alone, with nothing
dreamt of the second message, so an answer must be found in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from everlearn.evals.diary_data import contains
from everlearn.evals.results import provenance, write_json
from everlearn.learner import superseding
from everlearn.learner.dreams import Dream, SelfStudyDreamer, alone
from everlearn.learner.night import Kept
from everlearn.models.hub import DEFAULT_MODEL, load_model

# how many of a kind there are, in the file's order
KINDS = {
    "restated": 20, "an event": 20, "the old one named": 20, "corrected": 20, "a word in common": 20, "figures": 20,
    "the same person": 26, "somebody else": 26, "repeated": 26, "a candidate beside it": 26, "another matter": 26,
    "declined or past": 25, "another topic": 25,
}  # fmt: skip


def judged(dreamer: SelfStudyDreamer, pair: dict[str, Any]) -> list[str]:
    """Return the answers with which the second message of a pair takes over questions, none where it does not."""
    said = pair["before"]
    old = [
        Kept(i, 1, Dream(question, alone(pair["answer"]), pair["answer"]), said)
        for i, question in enumerate(pair["questions"])
    ]
    given = superseding.superseded(dreamer, {2: (pair["after"], [])}, old)[2]
    return [dream.answer for dream in given.dreams] if given.ids else []


def main() -> None:
    """Judge every pair and write how many of each kind were taken for a replacement, and how many rightly answered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--every", type=int, default=1, help="judge every n-th pair of a kind")
    parser.add_argument("--json", type=Path, default=Path("docs/results/changes.json"))
    given = parser.parse_args()
    if given.every < 1:
        parser.error(f"--every: got {given.every}, expected at least 1")
    lines = (Path(__file__).parent / "changes.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    dreamer, rows = SelfStudyDreamer(*load_model(given.model)), []
    for kind in KINDS:
        some = [json.loads(line) for line, other in zip(lines, kinds, strict=True) if other == kind][:: given.every]
        found = [judged(dreamer, pair) for pair in some]
        right = [any(contains(a, [pair["now"]]) for a in answers) for pair, answers in zip(some, found) if pair["now"]]
        rows.append({"kind": kind, "pairs": len(some), "replaced": sum(map(bool, found)), "rightly": sum(right)})
        print(rows[-1], flush=True)
    write_json(given.json, {"rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
