"""Selection: what of the day is worth a dream. The model must be able not to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner.anchor import Anchor, read_at_end, tells_something
from everlearn.learner.prompts import STATEMENTS
from everlearn.learner.sampling import Prompt
from everlearn.learner.texts import SHORT, before_asking, split_sentences
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


class _Piece(NamedTuple):
    """A sentence, or a part of one, its loss (nats) and how it is judged by itself."""

    text: str
    loss: float
    judged: Judgement


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

        Or if what one tells before it asks is, as in "I'm from Ghent, any tips?"; that is then what is worth a dream.
        Of a message that is not short those are worth a dream that tell the most: whose whole loss is at least
        ``SHARE`` of the greatest.
        """
        if not messages:
            return []
        parts = [split_sentences(message) for message in messages]
        told = [[before_asking(piece) for piece in found] for found in parts]
        lines = [line for found, before in zip(parts, told) for line in (*found, *before) if line]
        pieces = dict(zip(lines, self._pieces(lines), strict=True))
        return [
            _whole(found, [_rather(pieces[a], pieces.get(b)) for a, b in zip(found, before, strict=True)])
            for found, before in zip(parts, told, strict=True)
        ]

    def _pieces(self, lines: Sequence[str]) -> list[_Piece]:
        """Judge sentences, or parts of such, each by itself."""
        losses = self._after.log_likelihood(["\n"] * len(lines), lines)
        telling = tells_something(self.anchor, read_at_end(self.split, self.tokenizer, lines)).tolist()
        surprises = [float(-loss.topk(min(2, len(loss)), largest=False).values.sum()) for loss in losses]
        rows = zip(lines, losses, surprises, telling, strict=True)
        return [
            _Piece(line, float(-loss.sum()), Judgement(s >= self.surprise and t >= self.telling, s, t))
            for line, loss, s, t in rows
        ]


def _rather(sentence: _Piece, before: _Piece | None) -> _Piece:
    """Return what a ``sentence`` tells ``before`` it asks, where that is to be kept and the whole is not."""
    return before if before and before.judged.keep and not sentence.judged.keep else sentence


def _whole(sentences: Sequence[str], pieces: Sequence[_Piece]) -> Judgement:
    """Judge a message by its ``sentences``, or by the ``pieces`` of them that count."""
    best = max((piece.judged for piece in pieces), key=lambda one: (one.keep, one.telling))
    kept = [piece for piece in pieces if piece.judged.keep]
    most = max((piece.loss for piece in kept), default=0.0)
    told = [piece.text for piece in kept if piece.loss >= SHARE * most]
    short = len(" ".join(sentences).split()) <= SHORT
    if not told or told == list(sentences) or (short and set(told) <= set(sentences)):
        return best
    return replace(best, worth=" ".join(told))
