"""The examination after a night: every question that may be asked, neutral prompts, text and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlearn.evals.diary_data import KINDS, Diary, Fact, contains
from everlearn.evals.diary_measures import Reference, locality, log_likelihoods, speeds, text_loss
from everlearn.evals.diary_methods import Method

SPOKEN = "Tell me a story."  # what speed is measured on
CONTROLS = 30  # facts of later days whose likelihood gives the noise

Figures = dict[str, Any]


class Exam:
    """Measures a method after a night.

    Args:
        diary: what was told, and what is asked.
        reference: the base model's own replies and likelihoods.
        text: a text to measure perplexity on, None for no such measure.
        text_tokens: how much of it.
    """

    def __init__(self, diary: Diary, reference: Reference, text: str | None, text_tokens: int) -> None:
        self.diary, self.reference, self.text, self.text_tokens = diary, reference, text, text_tokens

    def measure(self, method: Method, night: int) -> tuple[Figures, list[Figures]]:
        """Return the measures after ``night``, None where there is nothing to measure yet, and all replies.

        ``recall_by_age`` maps the nights since a fact was told to the share of its questions, of all kinds, that were
        answered.
        """
        figures, record = self.recall_and_locality(method, night)
        forgotten, gone = self._forgotten(method, night)
        return {**figures, **forgotten, **self._text(method), **self._speed(method)}, [*record, *gone]

    def recall_and_locality(self, method: Method, night: int) -> tuple[Figures, list[Figures]]:
        """Return the measures of what was told and holds, of neutral prompts and what was not told, and all replies."""
        asked, record = self._ask(method, night)
        neutral, seen = self._neutral(method, night)
        invented, untold = self._untold(method, night)
        return {**asked, **neutral, **invented}, [*record, *seen, *untold]

    def _ask(self, method: Method, night: int) -> tuple[Figures, list[Figures]]:
        """Ask everything that is still true and measure recall, retention of day 1, and updates.

        An update is right when the direct question's reply holds the newest answer and none that it replaced; it is
        stale when the reply holds an old answer and not the newest.
        """
        rows = [(fact, kind, question) for fact in self.diary.live(night) for kind, question in fact.asked()]
        said = method.reply([question for _, _, question in rows])
        record = [
            {
                "fact": fact.id,
                "day": fact.day,
                "kind": kind,
                "question": q,
                "reply": r,
                "hit": contains(r, fact.answers),
            }
            for (fact, kind, q), r in zip(rows, said, strict=True)
        ]
        figures: Figures = {
            f"recall_{kind}": share(row["hit"] for row in record if row["kind"] == kind) for kind in KINDS
        }
        figures["retention_day1"] = share(r["hit"] for r in record if r["kind"] == "direct" and r["day"] == 1)
        newest = [
            (row["hit"], any(contains(row["reply"], old.answers) for old in self.diary.older(fact)))
            for (fact, kind, _), row in zip(rows, record, strict=True)
            if kind == "direct" and fact.updates is not None
        ]
        figures["updates"] = share(new and not old for new, old in newest)
        figures["updates_stale"] = share(old and not new for new, old in newest)
        ages = sorted({night - row["day"] for row in record})
        figures["recall_by_age"] = {
            str(age): share(row["hit"] for row in record if night - row["day"] == age) for age in ages
        }
        return figures, record

    def _forgotten(self, method: Method, night: int) -> tuple[Figures, list[Figures]]:
        """Look for what was to be forgotten in replies and in the likelihood of the answers.

        ``forgotten`` is the share of replies that hold a forgotten answer which the base does not give by itself;
        ``forgotten_likelihood`` the mean absolute difference from the base of the answer's log-likelihood, in nats per
        token; ``forgotten_noise`` the same for facts of later days, whose answers nothing can have touched.
        """
        facts = self.diary.forgotten(night)
        rows = [(fact, kind, question) for fact in facts for kind, question in fact.asked()]
        questions = [question for _, _, question in rows]
        said, base = method.reply(questions), self.reference.replies(questions)
        record = [
            {"fact": fact.id, "day": fact.day, "kind": kind, "question": q, "reply": r, "base": b, "forgotten": True,
             "hit": contains(r, fact.answers) and not contains(b, fact.answers)}
            for (fact, kind, q), r, b in zip(rows, said, base, strict=True)
        ]  # fmt: skip
        controls = self.diary.untold(night)[:CONTROLS] if facts else []
        figures = {
            "forgotten": share(row["hit"] for row in record),
            "forgotten_likelihood": self._moved(method, facts),
            "forgotten_noise": self._moved(method, controls),
        }
        return figures, record

    def _moved(self, method: Method, facts: Sequence[Fact]) -> float | None:
        questions = [question for fact in facts for question in fact.questions]
        answers = [fact.answer() for fact in facts for _ in fact.questions]
        if not questions:
            return None
        ours = log_likelihoods(method.model, method.tokenizer, method.prompts(questions), answers)
        theirs = self.reference.log_likelihoods(questions, answers)
        return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)

    def _neutral(self, method: Method, night: int) -> tuple[Figures, list[Figures]]:
        """Measure agreement with the base on its own replies to the neutral prompts, and what leaks into ours.

        A reply leaks when it holds an answer told by now, also one superseded or to be forgotten, that the base's own
        reply to the prompt does not hold.
        """
        prompts = list(self.diary.neutral)
        base, said = self.reference.replies(prompts), method.reply(prompts)
        told = self.diary.told(night)
        leaked = [
            [f.id for f in told if contains(ours, f.answers) and not contains(own, f.answers)]
            for ours, own in zip(said, base, strict=True)
        ]
        kept = locality(
            method.model,
            self.reference.base,
            method.tokenizer,
            method.prompts(prompts),
            self.reference.prompts(prompts),
            base,
        )
        record = [
            {"question": q, "reply": r, "base": b, "leak": facts}
            for q, r, b, facts in zip(prompts, said, base, leaked, strict=True)
        ]
        return {"locality_top1": kept.top1, "locality_kl": kept.kl, "leak": share(map(bool, leaked))}, record

    def _untold(self, method: Method, night: int) -> tuple[Figures, list[Figures]]:
        """Ask directly for what is told on later days only: ``invented`` is the share answered with something told.

        That is, with an answer told by now that the base's own reply does not hold.
        """
        told, questions = self.diary.told(night), [fact.questions[0] for fact in self.diary.untold(night)]
        said, base = method.reply(questions), self.reference.replies(questions)
        record = [
            {"question": q, "reply": r, "base": b, "untold": True,
             "invented": any(contains(r, f.answers) and not contains(b, f.answers) for f in told)}
            for q, r, b in zip(questions, said, base, strict=True)
        ]  # fmt: skip
        return {"invented": share(row["invented"] for row in record)}, record

    def _text(self, method: Method) -> Figures:
        if self.text is None:
            return {"perplexity_ratio": None}
        if method.model is self.reference.base:
            return {"perplexity_ratio": 1.0}
        ours = text_loss(method.model, method.tokenizer, self.text, self.text_tokens)
        theirs = self.reference.text_loss(self.text, self.text_tokens)
        return {"perplexity_ratio": math.exp(min(ours - theirs, 50.0))}

    def _speed(self, method: Method) -> Figures:
        plain = self.reference.prompts([SPOKEN])[0]
        ours, bare = speeds(
            method.tokenizer, [(method.model, method.prompts([SPOKEN])[0]), (self.reference.base, plain)]
        )
        return {"chat_tokens_per_second": ours, "chat_speed_ratio": ours / bare}


def share(values: Any) -> float | None:
    """Return the share of true values, None of none."""
    listed = [bool(value) for value in values]
    return sum(listed) / len(listed) if listed else None


def read_text(data: Path) -> str | None:
    """Return WikiText-2's test text from beside the diary's folder, or None if it is not there."""
    for folder in (data, data.parent):
        path = folder / "wikitext2" / "test.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None
