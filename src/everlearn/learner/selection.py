"""Selection: what of the day is worth a dream. The model must be able not to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner.anchor import Anchor, read_at_end, tells_something
from everlearn.learner.prompts import STATEMENTS
from everlearn.learner.sampling import Prompt
from everlearn.learner.texts import SHORT, split_sentences
from everlearn.models.trunk import SplitModel

SHARE = 0.6  # of the loss of the sentence that tells the most, which another must have to be dreamt of too


@dataclass(frozen=True)
class Judgement:
    """Of one message: whether to keep it, how surprising it is (nats), and the log odds that it tells something.

    ``worth`` is what of it is worth a dream, if that is not all.
    """

    keep: bool
    surprise: float
    telling: float
    worth: str | None = None


class Selector(Protocol):
    """Judges the messages of a day under the current memory."""

    def judge(self, messages: Sequence[str]) -> list[Judgement]: ...


class SurpriseSelector:
    """Keeps what is surprising under the current memory and tells something of its speaker, sentence by sentence.

    Surprise is the loss of the two most surprising tokens of the message together; telling is a linear probe on the
    trunk, between what the base model says when it speaks of itself and when it merely chats or asks.

    Args:
        model: the stacked model, with the current memory.
        tokenizer: its tokenizer.
        split: the same model cut at its trunk.
        anchor: the base's own voice.
        surprise: least nats of the two most surprising tokens.
        telling: least log odds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        split: SplitModel,
        anchor: Anchor,
        *,
        surprise: float = 6.0,
        telling: float = 0.0,
    ) -> None:
        self.tokenizer, self.split, self.anchor = tokenizer, split, anchor
        self.surprise, self.telling = surprise, telling
        self._after = Prompt(model, tokenizer, STATEMENTS)

    def judge(self, messages: Sequence[str]) -> list[Judgement]:
        """Return a judgement of each message: kept if one of its sentences is, as "My dog is Pip. Any tips?" is.

        Of a message that is not short those are worth a dream that tell the most: whose whole loss is at least
        ``SHARE`` of the greatest.
        """
        if not messages:
            return []
        parts = [split_sentences(message) for message in messages]
        lines = [piece for found in parts for piece in found]
        losses = self._after.log_likelihood(["\n"] * len(lines), lines)
        surprises = [float(-loss.topk(min(2, len(loss)), largest=False).values.sum()) for loss in losses]
        telling = tells_something(self.anchor, read_at_end(self.split, self.tokenizer, lines)).tolist()
        pieces = iter(zip(lines, (float(-loss.sum()) for loss in losses), surprises, telling, strict=True))
        return [self._whole(message, [next(pieces) for _ in found]) for message, found in zip(messages, parts)]

    def _whole(self, message: str, pieces: Sequence[tuple[str, float, float, float]]) -> Judgement:
        """Judge a message by its sentences: each with its whole loss, its surprise and its log odds of telling."""
        judged = [Judgement(s >= self.surprise and t >= self.telling, s, t) for _, _, s, t in pieces]
        best = max(judged, key=lambda one: (one.keep, one.telling))
        kept = [index for index, one in enumerate(judged) if one.keep]
        most = max((pieces[index][1] for index in kept), default=0.0)
        told = [index for index in kept if pieces[index][1] >= SHARE * most]
        if not told or len(told) == len(pieces) or len(message.split()) <= SHORT:
            return best
        return replace(best, worth=" ".join(pieces[index][0] for index in told))
