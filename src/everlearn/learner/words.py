"""How common the words of a base model are, and where they lie: what a gist is read with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner.chat import chat_prompt
from everlearn.learner.metric import whitener
from everlearn.learner.sampling import encode
from everlearn.memories.carried import embedded
from everlearn.memories.gist import MARK, Gist

RARE = 0.01  # share of texts that have a word which counts half
ASKED = "anything"  # to see what the chat template puts behind it
RIDGE = 1.0  # of the words' covariance, as in :func:`~everlearn.learner.metric.whitener`


def learn_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return the buffers of a :class:`~everlearn.memories.gist.Gist`, from ordinary ``texts``.

    From none, or of a model whose embeddings are of another size than its layers, those of a gist that says nothing.

    A word of the share s of the texts weighs ``RARE / (RARE + s)``, as prompts of a conversation, so that what the chat
    template puts around each says nothing. Special tokens end a part of a conversation, but for that of the unknown.
    """
    vocabulary, width = cast(nn.Embedding, model.get_input_embeddings()).weight.shape
    size = cast(int, model.config.get_text_config().hidden_size)
    if not texts or width != size:
        return Gist(size).state_dict()
    counts = torch.zeros(vocabulary)
    for text in texts:
        counts[encode(tokenizer, chat_prompt(tokenizer, text)).unique()] += 1
    weights = RARE / (RARE + (counts + 0.5) / len(texts))
    marks = _marks(tokenizer)
    weights[[number for number in marks if number < len(weights)]] = MARK
    words = embedded(model, torch.cat([encode(tokenizer, text) for text in texts])).detach().float().cpu()
    return {
        "weights": weights,
        "center": words.mean(0),
        "whitener": whitener(torch.cov(words.T), RIDGE),
        "behind": torch.tensor(_marks_behind(tokenizer, marks)),
    }


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens, also those that have no name, like those around a header."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return {number for number in special if number != tokenizer.unk_token_id or number == tokenizer.eos_token_id}


def _marks_behind(tokenizer: PreTrainedTokenizerBase, marks: set[int]) -> int:
    """Return how many of ``marks`` stand between what is asked and its reply."""
    closing = chat_prompt(tokenizer, ASKED).rpartition(ASKED)[2]
    return sum(number in marks for number in encode(tokenizer, closing).tolist())


def read_gists(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gist: Gist, texts: Sequence[str]) -> Tensor:
    """Return the gists of ``texts``, [n, e]."""
    return gist([encode(tokenizer, text) for text in texts], functools.partial(embedded, model))
