"""Texts and questions of the from-scratch suites: from a folder laid out like the data folder, or public datasets."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlearn.errors import InvalidArgument

__all__ = ["BABI_TASKS", "Babi", "Sources"]

BABI_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
PUBLIC_BOOKS = 40


@dataclass(frozen=True)
class Babi:
    """One bAbI question: all sentences of its story before it, in order, the question and the answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Sources:
    """Reads ``books/*.txt``, ``babi/qa*.txt``, ``wikitext2``, ``lambada`` and ``blimp`` of a folder.

    Args:
        data: the folder; None fetches public Hugging Face datasets by name.
    """

    data: Path | None

    @classmethod
    def at(cls, data: str | Path | None) -> Sources:
        """Return the sources of a folder, or the public ones.

        Raises:
            InvalidArgument: no such folder.
        """
        if data is not None and not Path(data).is_dir():
            raise InvalidArgument(f"data: got {data}, expected a folder laid out like the data folder")
        return cls(None if data is None else Path(data))

    def books(self) -> dict[str, list[str]]:
        """Return the books' texts as ``train``, ``validation`` and ``test``: a tenth held out for each of the two.

        Which are held out is decided by a hash of their names.
        """
        found = self._public_books() if self.data is None else _texts(self.folder("books"), "*.txt")
        if len(found) < 3:
            raise InvalidArgument(f"data: got {len(found)} books in {self.data}, expected at least 3 (books/*.txt)")
        order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        held = max(1, len(order) // 10)
        parts = {"test": order[:held], "validation": order[held : 2 * held], "train": order[2 * held :]}
        return {part: [found[name] for name in names] for part, names in parts.items()}

    def babi(self, task: str, part: str) -> list[Babi]:
        """Return the questions of a task (qa1, ...) and part (train or test)."""
        if self.data is None:
            return _public_babi(int(task.removeprefix("qa")), part)
        files = sorted(self.folder("babi").glob(f"{task}_*_{part}*.txt"))
        if not files:
            raise InvalidArgument(f"data: there is no {task}_*_{part}*.txt in {self.data}/babi")
        return parse_babi(files[0].read_text(encoding="utf-8"))

    def wikitext(self) -> str:
        """Return WikiText-2's test text."""
        if self.data is None:
            return "\n".join(_column("Salesforce/wikitext", "text", name="wikitext-2-v1", split="test"))
        return self.file("wikitext2", "test.txt").read_text(encoding="utf-8")

    def lambada(self) -> list[str]:
        """Return LAMBADA's test passages, the last word of each to be predicted."""
        if self.data is None:
            return _column("EleutherAI/lambada_openai", "text", name="en", split="test")
        return [row["text"] for row in _rows(self.file("lambada", "lambada_test.jsonl"))]

    def blimp(self) -> list[tuple[str, str, str]]:
        """Return BLiMP's pairs: paradigm, the good sentence, the bad one."""
        if self.data is None:
            return _public_blimp()
        files = sorted(self.folder("blimp").glob("*.jsonl"))
        if not files:
            raise InvalidArgument(f"data: there is no *.jsonl in {self.data}/blimp")
        return [(row["uid"], row["good"], row["bad"]) for file in files for row in _rows(file)]

    def folder(self, name: str) -> Path:
        """Return a subfolder.

        Raises:
            InvalidArgument: it is missing.
        """
        assert self.data is not None
        if not (self.data / name).is_dir():
            raise InvalidArgument(f"data: there is no folder {name!r} in {self.data}")
        return self.data / name

    def file(self, folder: str, name: str) -> Path:
        """Return a file of a subfolder.

        Raises:
            InvalidArgument: it is missing.
        """
        path = self.folder(folder) / name
        if not path.is_file():
            raise InvalidArgument(f"data: there is no {folder}/{name} in {self.data}")
        return path

    def digest(self, *folders: str) -> str:
        """Return what identifies the contents of subfolders, or "public" without a folder."""
        if self.data is None:
            return "public"
        found = hashlib.sha256()
        for path in (path for name in folders for path in sorted(self.folder(name).iterdir()) if path.is_file()):
            found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return found.hexdigest()[:16]

    def _public_books(self) -> dict[str, str]:
        rows = _public("emozilla/pg19", split="train", streaming=True)
        return {row["short_book_title"]: row["text"] for row in itertools.islice(rows, PUBLIC_BOOKS)}


def parse_babi(text: str) -> list[Babi]:
    """Return a bAbI file's questions: lines ``n sentence`` and ``n question TAB answer TAB ids``; 1 begins a story."""
    found: list[Babi] = []
    facts: list[str] = []
    for line in text.splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            facts = []
        question, *answer = rest.split("\t")
        if answer:
            found.append(Babi(tuple(facts), question.strip(), answer[0].strip()))
        elif rest:
            facts.append(rest.strip())
    return found


def _texts(folder: Path, pattern: str) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern))}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _public(dataset: str, **wanted: Any) -> Any:
    """Load a public dataset.

    Raises:
        InvalidArgument: it cannot be had.
    """
    try:
        from datasets import load_dataset

        return load_dataset(dataset, **wanted)
    except Exception as error:
        raise InvalidArgument(
            f"data: got no folder, and the dataset {dataset!r} could not be fetched: {error}"
        ) from error


def _column(dataset: str, field: str, **wanted: Any) -> list[str]:
    return [row[field] for row in _public(dataset, **wanted)]


@functools.cache
def _public_babi_rows(part: str) -> Sequence[dict[str, Any]]:
    return list(_public("Muennighoff/babi", split=part))


def _public_babi(task: int, part: str) -> list[Babi]:
    rows = [row for row in _public_babi_rows(part) if row["task"] == task]
    return [
        Babi(tuple(line for line in row["passage"].splitlines() if line), row["question"], row["answer"])
        for row in rows
    ]


def _public_blimp() -> list[tuple[str, str, str]]:
    from datasets import get_dataset_config_names

    return [
        (name, row["sentence_good"], row["sentence_bad"])
        for name in get_dataset_config_names("nyu-mll/blimp")
        for row in _public("nyu-mll/blimp", name=name, split="train")
    ]
