"""The pairs of ``benchmarks.changes`` are what they claim to be, and are judged as a night would."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.changes as changes

PAIRS = [json.loads(line) for line in Path(changes.__file__).with_name("changes.jsonl").read_text("utf-8").splitlines()]


def test_every_pair_has_its_answers_word_by_word():
    assert len(PAIRS) == sum(changes.KINDS.values()) == 300
    assert len({pair["before"] for pair in PAIRS}) == 300
    assert [bool(pair["now"]) for pair in PAIRS] == [True] * 120 + [False] * 180
    for pair in PAIRS:
        assert pair["answer"] in pair["before"]
        assert pair["now"] in pair["after"]
        assert len(pair["questions"]) == 2
        assert not any(pair["answer"] in question for question in pair["questions"])


class Sure:
    """Finds one answer in every passage, which has replaced what was asked for, or nothing has."""

    def __init__(self, changed: bool) -> None:
        self.changed = changed

    def about(self, passages, questions):
        return [10.0 for _ in passages]

    def follows(self, passages, later):
        return [10.0 if self.changed else -10.0 for _ in passages]

    def answers(self, passages, questions):
        return ["Maxi" for _ in passages]

    def rather(self, passages, questions, ones, others):
        return [1.0 for _ in passages]


def test_a_pair_is_put_to_the_rule_of_a_night():
    pair = {
        "before": "Our puppy is Rex.", "answer": "Rex", "questions": ["Who barks?", "Who is it?"],
        "after": "The puppy is Maxi now.", "now": "Maxi",
    }  # fmt: skip
    assert changes.judged(Sure(True), pair) == ["Maxi", "Maxi"]
    assert changes.judged(Sure(False), pair) == []
    assert changes.judged(Sure(True), {**pair, "after": "A boat is called Maxi."}) == [], "not a word in common"
