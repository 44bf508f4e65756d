"""Texts as tensors: a prompt and the reply that is learned, behind the trunk's activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from everlearn.learner.chat import chat_prompt, turn_end
from everlearn.learner.sampling import encode, pad_right, pad_token
from everlearn.models.trunk import Activations, SplitModel

IGNORE = -100
BATCH = 32


@dataclass(frozen=True)
class Examples:
    """n conversations of one turn, right padded to T tokens.

    Attributes:
        ids: tokens, [n, T].
        targets: at each position the next token where it belongs to the reply, else -100, [n, T].
        asked: index of the last token of the prompt, from which the reply is predicted, [n].
        lengths: tokens without padding, [n].
    """

    ids: Tensor
    targets: Tensor
    asked: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Examples:
        """Return the examples ``index`` [m], cut to the longest of them."""
        longest = int(self.lengths[index].max())
        return Examples(
            self.ids[index, :longest], self.targets[index, :longest], self.asked[index], self.lengths[index]
        )

    def first(self, count: int) -> Examples:
        """Return the examples with only the first ``count`` tokens of each reply to predict, cut to the longest."""
        lengths = torch.minimum(self.lengths, self.asked + count)
        longest = int(lengths.max())
        predicted = torch.arange(longest) < self.asked[:, None] + count
        targets = self.targets[:, :longest].where(predicted, torch.tensor(IGNORE))
        return Examples(self.ids[:, :longest], targets, self.asked, lengths)


def encode_examples(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str | None]]) -> Examples:
    """Return (message, reply) pairs as examples; a reply of None leaves the prompt alone, with nothing to predict."""
    ids, targets, asked = [], [], []
    for message, reply in pairs:
        prompt = encode(tokenizer, chat_prompt(tokenizer, message))
        spoken = encode(tokenizer, _spoken(tokenizer, reply)) if reply is not None else prompt[:0]
        whole = torch.cat([prompt, spoken])
        target = torch.full_like(whole, IGNORE)
        target[len(prompt) - 1 : len(whole) - 1] = spoken
        ids.append(whole)
        targets.append(target)
        asked.append(len(prompt) - 1)
    lengths = torch.tensor([len(row) for row in ids])
    return Examples(pad_right(ids, pad_token(tokenizer)), pad_right(targets, IGNORE), torch.tensor(asked), lengths)


def run_trunk(split: SplitModel, examples: Examples) -> Activations:
    """Run all examples up to the lowest memory, once: those of like length together, so that little is padding."""
    order = examples.lengths.argsort(stable=True)
    parts = [split.trunk(examples.rows(rows).ids) for rows in order.split(BATCH)]
    longest, back = examples.ids.shape[1], order.argsort()

    def whole(tensors: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors])[back]

    return Activations(whole([part.hidden for part in parts]), whole([part.read for part in parts]), examples.ids)


def _spoken(tokenizer: PreTrainedTokenizerBase, reply: str) -> str:
    """Return a reply as it follows the prompt, with the end of its turn."""
    return ("" if tokenizer.chat_template else " ") + reply.strip() + turn_end(tokenizer)
