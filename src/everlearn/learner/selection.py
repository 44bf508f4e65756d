"""Selection: what of the day is worth a dream. The model must be able not to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner.anchor import Anchor, read_at_end, tells_something
from everlearn.learner.dreams import split_passage
from everlearn.learner.prompts import STATEMENTS
from everlearn.learner.sampling import Prompt
from everlearn.models.trunk import SplitModel


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
    """Keeps what is surprising under the current memory and tells something of its speaker.

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
        """Return a judgement of each message; a long one is judged by its sentences, and kept if one of them is."""
        if not messages:
            return []
        pieces = [(index, piece) for index, message in enumerate(messages) for piece in split_passage(message)]
        lines = [piece for _, piece in pieces]
        losses = self._after.log_likelihood(["\n"] * len(lines), lines)
        surprises = [float(-loss.topk(min(2, len(loss)), largest=False).values.sum()) for loss in losses]
        telling = tells_something(self.anchor, read_at_end(self.split, self.tokenizer, lines)).tolist()
        judged: list[list[Judgement]] = [[] for _ in messages]
        for (index, _), surprise, odds in zip(pieces, surprises, telling, strict=True):
            judged[index].append(Judgement(surprise >= self.surprise and odds >= self.telling, surprise, odds))
        best = [max(found, key=lambda one: (one.keep, one.telling)) for found in judged]
        kept: list[list[str]] = [[] for _ in messages]
        for (index, piece), one in zip(pieces, (one for found in judged for one in found), strict=True):
            if one.keep:
                kept[index].append(piece)
        return [
            replace(one, worth=" ".join(told)) if one.keep and len(told) < len(found) else one
            for one, told, found in zip(best, kept, judged, strict=True)
        ]
