"""Tokenizers and sentences of the book corpus, shared by the suites that need text."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from everlearn.evals.sources import Sources
from everlearn.train.data import train_tokenizer

__all__ = ["books_tokens", "encode", "sentences", "tokenizer"]

TOKENIZER_CHARACTERS = 4_000_000


@functools.lru_cache(maxsize=4)
def tokenizer(
    sources: Sources, vocab_size: int, extra: tuple[str, ...] = (), *, digits: bool = False
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the training books' beginnings and of ``extra`` texts.

    ``digits``: every digit is a token of its own, and a space before it belongs to it.
    """
    books = sources.books()["train"]
    share = TOKENIZER_CHARACTERS // len(books)
    return train_tokenizer([*(text[:share] for text in books), *extra], vocab_size, digits=digits)


def encode(made: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return a text's tokens, nothing added."""
    return made(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


@functools.lru_cache(maxsize=8)
def books_tokens(sources: Sources, part: str, made: PreTrainedTokenizerFast) -> Tensor:
    """Return all books of a part as one stream of tokens, each book ended by the end-of-text token."""
    ids = [torch.tensor([*encode(made, text), made.eos_token_id]) for text in sources.books()[part]]
    return torch.cat(ids)


def sentences(texts: Sequence[str], least: int = 0) -> list[str]:
    """Return the sentences of texts in order, whitespace joined; those under ``least`` words are left out.

    A sentence ends after ``. ! ?``, closing quotes included, before white space and a capital, quote or digit.
    """
    found = []
    for text in texts:
        joined = " ".join(text.split())
        found += re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+(?=[\"'“‘(]?[A-Z0-9])", joined)
    return [sentence for sentence in found if len(sentence.split()) >= least]
