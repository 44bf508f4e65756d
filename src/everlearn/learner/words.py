"""How common the words of a base model are, and where they lie: what a gist is read with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.learner.chat import chat_prompt
from everlearn.learner.metric import whitener
from everlearn.learner.sampling import encode
from everlearn.memories.gist import MARK, Gist

RARE = 0.01  # share of texts that have a word which counts half
RIDGE = 1.0  # of the words' covariance, as in :func:`~everlearn.learner.metric.whitener`


def learn_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return the buffers of a :class:`~everlearn.memories.gist.Gist`, from ordinary ``texts``.

    From none, or of a model whose embeddings are of another size than its layers, those of a gist that says nothing.

    A word of the share s of the texts weighs ``RARE / (RARE + s)``, as prompts of a conversation, so that what the chat
    template puts around each says nothing.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
    size = cast(int, model.config.hidden_size)
    if not texts or embeddings.shape[1] != size:
        return Gist(size).state_dict()
    counts = torch.zeros(len(embeddings))
    for text in texts:
        counts[encode(tokenizer, chat_prompt(tokenizer, text)).unique()] += 1
    weights = RARE / (RARE + (counts + 0.5) / len(texts))
    weights[torch.tensor([number for number in tokenizer.all_special_ids if number < len(weights)])] = MARK
    words = embeddings[torch.cat([encode(tokenizer, text) for text in texts])].float()
    return {"weights": weights, "center": words.mean(0), "whitener": whitener(torch.cov(words.T), RIDGE)}


def read_gists(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gist: Gist, texts: Sequence[str]) -> Tensor:
    """Return the gists of ``texts``, [n, e]."""
    embed, none = cast(nn.Embedding, model.get_input_embeddings()), gist.center.new_zeros(0, len(gist.center))
    return torch.stack([gist(encode(tokenizer, text), embed) for text in texts]) if texts else none.float()
