"""What a dreamer's model writes, by a script."""

from __future__ import annotations

import torch

from everlearn.learner import prompts
from everlearn.learner.asked import Fit
from everlearn.learner.dreams import SelfStudyDreamer


class Script:
    """What the model writes after each prompt, and how its questions are judged."""

    def __init__(self, dreamer: SelfStudyDreamer, monkeypatch) -> None:
        self.open = ["What is my cat called? Nils."]  # questions with answers, in turn
        self.guesses = ["Nils"]  # answers alone, in turn
        self.lines = ["What is my cat called?"]  # questions to which the answer is known, in turn
        self.likely: dict[str, float] = {}  # how likely an answer is without the passage
        self.ways = ["Your cat is Nils."]
        self.world = self.stranger = ""
        self.scores: dict[str, float] = {}
        self.heads: list[str] = []  # all that practice was continued after
        self.usual: dict[str, Fit] = {}  # what people usually ask that has an answer
        monkeypatch.setattr(dreamer._bank, "candidates", lambda contexts: [[] for _ in contexts])
        monkeypatch.setattr(dreamer._bank, "fitting", lambda context, answer, candidates: self.usual.get(answer))

        def says(name, made):
            monkeypatch.setattr(getattr(dreamer, name), "sample", lambda tails, **options: made(tails))

        says("_asking", lambda tails: [self._turn(self.open, i).removeprefix("What ") for i in range(len(tails))])
        says("_saying", lambda tails: [self.ways[i % len(self.ways)] for i in range(len(tails))])
        says("_missing", lambda tails: [self.world] * len(tails))
        says("_swapping", lambda tails: [self.stranger] * len(tails))
        monkeypatch.setattr(dreamer, "_list", lambda shown: self)
        starts = lambda near: [line.partition(" ")[0] for line in self.lines]  # noqa: E731
        monkeypatch.setattr("everlearn.learner.dreams._beginnings", starts)
        monkeypatch.setattr(prompts, "ASKING", ("What",))
        judged = lambda text, answer, questions: [self.scores.get(q, 1.0) for q in questions]  # noqa: E731
        monkeypatch.setattr(dreamer._judge, "scores", judged)
        # of two answers the first has all questions
        monkeypatch.setattr(dreamer._judge, "rather", lambda passages, questions, ones, others: [1.0] * len(ones))

    @staticmethod
    def _turn(lines: list[str], index: int) -> str:
        return lines[index % len(lines)]

    def sample(self, tails, **options):
        self.heads += tails
        if tails and tails[0].endswith("->"):
            return [self._turn(self.guesses, i) for i in range(len(tails))]
        return [self._turn(self.lines, i).partition(" ")[2] for i in range(len(tails))]

    def log_likelihood(self, tails, targets):
        return [torch.tensor([self.likely.get(target.strip(" :"), -9.0)]) for target in targets]
