"""Practice: things people might tell an assistant, with good questions about them, written for this project.

They show a small model by example what it is to ask about something it was told. Shown are those most like what was
told, as the model itself reads it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import StoreError
from everlearn.learner.sampling import BATCH, encode, pad_right, pad_token
from everlearn.models.hub import cache_dir
from everlearn.models.memory_file import atomic_write, fingerprint

READ_AT = 2 / 3  # of the layers: where a passage is read, to find what is like it


@dataclass(frozen=True)
class Record:
    """Something told.

    Attributes:
        said: the message.
        answer: what is new in it, in its words.
        questions: whose answer that is: asked plainly, in other words, as a request, and from a situation.
        world: a question about the world that shares the message's words.
        other: the plain question, asked about somebody else.
        role: the same, about somebody of whom only is said what they are to the user.
        advice: a request that touches the message without asking for what is new in it.
        assistant: the plain question, asked about the assistant's own life.
    """

    said: str
    answer: str
    questions: tuple[str, str, str, str]
    world: str
    other: str
    role: str
    advice: str
    assistant: str

    def elsewhere(self) -> tuple[str, str, str, str]:
        """Return the questions about the world and others that are not to be answered with the message."""
        return self.world, self.other, self.role, self.advice


@functools.lru_cache(maxsize=1)
def load_practice() -> tuple[Record, ...]:
    """Return the practice that comes with the package."""
    lines = resources.files("everlearn.learner").joinpath("practice.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Record(**{**kept, "questions": tuple(kept["questions"])}) for kept in map(json.loads, lines))


class Practice:
    """Finds the records that are most like a passage.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.records = load_practice()

    def nearest(self, passages: Sequence[str], count: int) -> list[list[Record]]:
        """Return the ``count`` records most like each passage, the likest last, where a reader attends most."""
        if not passages:
            return []
        best = self.likeness(self.placed(passages)).topk(count).indices
        return [[self.records[i] for i in row.flip(0).tolist()] for row in best]

    def likeness(self, placed: Tensor) -> Tensor:
        """Return how like what is ``placed``, [n, d], is to each record, [n, records]."""
        return placed @ self._places.T

    def placed(self, texts: Sequence[str]) -> Tensor:
        """Return where the ``texts`` lie among what is told, [n, d], to unit length."""
        return standardised(self._read(texts), self._known)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Return the mean hidden state of each text, [n, d], as kept in the user's cache folder."""
        rows = [encode(self.tokenizer, text).tolist() for text in texts]
        return kept(self.model, [READ_AT, *rows], lambda: self._read(texts))

    @functools.cached_property
    def _known(self) -> Tensor:
        return self.read([record.said for record in self.records])

    @functools.cached_property
    def _places(self) -> Tensor:
        return standardised(self._known, self._known)

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> Tensor:
        """Return the mean hidden state of each text, [n, d], without its first token, which holds no meaning."""
        rows = [encode(self.tokenizer, text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        means: list[Tensor] = [torch.empty(0)] * len(rows)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            ids = pad_right([rows[i] for i in part], pad_token(self.tokenizer))
            out = self.model(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            states = out.hidden_states[round(READ_AT * (len(out.hidden_states) - 1))]
            for i, row in zip(part, states):
                means[i] = row[min(1, len(rows[i]) - 1) : len(rows[i])].mean(0)
        return torch.stack(means)


def standardised(read: Tensor, among: Tensor) -> Tensor:
    """Standardise what was ``read``, [n, d], by what it is ``among``, [m, d], to unit length."""
    return F.normalize((read - among.mean(0)) / (among.std(0, correction=0) + 1e-6), dim=-1)


def kept(model: PreTrainedModel, what: Sequence[object], make: Callable[[], Tensor]) -> Tensor:
    """Return what ``make`` reads with the model of ``what``, as kept in the user's cache folder."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).hexdigest()[:12]
    path = cache_dir() / "practice" / f"{fingerprint(model)}-{digest}.safetensors"
    with suppress(SafetensorError, OSError, KeyError):  # none, or a damaged one that is made anew
        return load_file(path)["read"]
    read = make()
    with suppress(OSError, StoreError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({"read": read}))
    return read
