"""What a message refers to, and what that is good for: ``python -m benchmarks.references``.

``references.jsonl`` has 90 messages, written for this project without sight of a diary or of the code, each with an
earlier one: 30 tell something new of what that introduced, by its name; 30 replace what was told of it by its role,
and each of these has a near one that does not; 30 have the name in common and speak of something else.
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
from everlearn.learner.references import Earlier, references
from everlearn.learner.texts import sentences, words
from everlearn.models.hub import DEFAULT_MODEL, load_model

EARLIER, OLD, NEW = 1, 2, 3  # observations


def found(dreamer: SelfStudyDreamer, row: dict[str, Any], later: str) -> Earlier | None:
    """Return what ``later`` is found to refer to."""
    return references(dreamer.follows, {NEW: later}, {EARLIER: row["earlier"]}, {EARLIER: [row["earlier"]]}).get(NEW)


def replaced(dreamer: SelfStudyDreamer, row: dict[str, Any], later: str, beside: Earlier | None) -> list[str]:
    """Return the answers with which ``later`` takes over the old questions, none where it does not."""
    old = [
        Kept(i, OLD, Dream(question, alone(row["old_answer"]), row["old_answer"]), row["old"])
        for i, question in enumerate(row["old_questions"])
    ]
    given = superseding.superseded(dreamer, {NEW: (_told(row, later), [])}, old, {NEW: beside} if beside else {})[NEW]
    return [dream.answer for dream in given.dreams] if given.ids else []


def _told(row: dict[str, Any], later: str) -> str:
    """Return the sentence of ``later`` that has most of what ``earlier`` introduced, as the selector would."""
    introduced = set(words(row["earlier"]))
    return max(sentences(later), key=lambda part: max(len(word) * (word in introduced) for word in words(part)))


def main() -> None:
    """Count what is found to refer to the earlier message, and what is taken for a replacement with and without it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, default=Path("docs/results/references.json"))
    given = parser.parse_args()
    lines = (Path(__file__).parent / "references.jsonl").read_text(encoding="utf-8").splitlines()
    dreamer, rows = SelfStudyDreamer(*load_model(given.model)), []
    for row in map(json.loads, lines):
        beside = found(dreamer, row, row["later"])
        result = {"kind": row["kind"], "found": beside is not None}
        for name, later in (("later", row["later"]), ("near", row.get("near"))):
            if row["kind"] == "replaces" and later:
                for how, light in (("alone", None), ("beside", found(dreamer, row, later))):
                    answers = replaced(dreamer, row, later, light)
                    result[f"{name}_{how}"] = len(answers) > 0
                    result[f"{name}_{how}_rightly"] = any(contains(answer, row["answer"]) for answer in answers)
        rows.append(result)
        print(result, flush=True)
    kinds = ("refers", "replaces", "other")
    summary: dict[str, Any] = {kind: sum(r["found"] for r in rows if r["kind"] == kind) for kind in kinds}
    taken = next(row for row in rows if "near_beside" in row)
    summary |= {key: sum(row.get(key, False) for row in rows) for key in taken if key.startswith(("later_", "near_"))}
    write_json(given.json, {"summary": summary, "rows": rows, "provenance": provenance()})
    print(summary)


if __name__ == "__main__":
    main()
