"""Text from a folder, a file or a Hugging Face dataset; a tokenizer for it; and packing into equal rows."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from everlearn.errors import InvalidArgument

__all__ = ["Corpus", "PackedRows", "load_corpus", "load_tokenizer", "pack", "train_tokenizer"]

END = "<|endoftext|>"
HELD_OUT_NAMES = ("valid*", "val.*", "test*")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out."""

    train: list[str]
    held_out: list[str]


def load_corpus(data: str | Path, held_out: float | Sequence[str] = 0.02, text_field: str = "text") -> Corpus:
    """Read documents.

    Args:
        data: a folder of ``.txt`` (one document a file) and ``.jsonl`` files (one a line), one such file, or the name
            of a Hugging Face dataset (its ``train`` split, and ``validation`` where there is one).
        held_out: file-name patterns to hold out; or the share of every text's end that is, where no file is called
            ``valid*`` or ``test*``.
        text_field: the field that holds a document in ``.jsonl`` files and datasets.

    Raises:
        InvalidArgument: nothing to read, or a share outside (0, 0.5].
    """
    share = held_out if isinstance(held_out, (int, float)) else None
    if share is not None and not 0 < share <= 0.5:
        raise InvalidArgument(f"held_out: got {share}, expected a share in (0, 0.5] or file-name patterns")
    path = Path(data)
    patterns = HELD_OUT_NAMES if isinstance(held_out, (int, float)) else tuple(held_out)
    if path.exists():
        train, kept = _read_files(path, patterns, text_field)
    else:
        train, kept = _read_dataset(str(data), text_field)
    if not kept and share is not None:
        cuts = [(text, int(len(text) * (1 - share))) for text in train]
        train, kept = [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    if not any(train) or not any(kept):
        raise InvalidArgument(
            f"data: got {len(train)} documents and {len(kept)} held out in {data}, expected some of both"
        )
    return Corpus([t for t in train if t], [t for t in kept if t])


def _read_files(path: Path, patterns: Sequence[str], text_field: str) -> tuple[list[str], list[str]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    train: list[str] = []
    kept: list[str] = []
    for file in files:
        held = path.is_dir() and any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)
        (kept if held else train).extend(_documents(file, text_field))
    return train, kept


def _documents(file: Path, text_field: str) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        row = json.loads(line)
        if not isinstance(row, dict) or text_field not in row:
            raise InvalidArgument(f"data: line {number} of {file} has no field {text_field!r}")
        yield str(row[text_field])


def _read_dataset(name: str, text_field: str) -> tuple[list[str], list[str]]:
    try:
        from datasets import load_dataset

        found = load_dataset(name)
    except Exception as error:
        raise InvalidArgument(
            f"data: {name!r} is no file or folder, and no dataset could be loaded: {error}"
        ) from error
    if "train" not in found or text_field not in found["train"].column_names:
        raise InvalidArgument(f"data: the dataset {name!r} has no split 'train' with a field {text_field!r}")
    kept = list(found["validation"][text_field]) if "validation" in found else []
    return list(found["train"][text_field]), kept


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``texts``; 257 is bytes and the end-of-text token alone.

    ``digits``: every digit is a token of its own, and a space before it belongs to it.
    """
    if vocab_size < 257:
        raise InvalidArgument(f"vocab_size: got {vocab_size}, expected at least 257 (bytes and the end-of-text token)")
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pieces])
    tokenizer.pre_tokenizer = pieces  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or by its Hugging Face name; it must know an end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.eos_token_id is None:
        raise InvalidArgument(f"tokenizer: {name} has no end-of-text token, expected one to part documents")
    return tokenizer


class PackedRows(Dataset):
    """Documents behind each other in rows of ``length`` tokens: ``input_ids``, ``labels`` and ``document_ids``."""

    def __init__(self, tokens: Tensor, documents: Tensor, length: int) -> None:
        rows = len(tokens) // length
        if rows < 1:
            raise InvalidArgument(f"length: got {length} for a text of {len(tokens)} tokens, expected at most as many")
        self.tokens = tokens[: rows * length].view(rows, length)
        self.documents = documents[: rows * length].view(rows, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "labels": row, "document_ids": self.documents[index]}


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> PackedRows:
    """Tokenize documents, end each with the end-of-text token, and cut them into rows; what is left over is dropped."""
    tokens, documents = [], []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens.append(torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.long))
        documents.append(torch.full((len(ids) + 1,), number, dtype=torch.long))
    return PackedRows(torch.cat(tokens), torch.cat(documents), length)
