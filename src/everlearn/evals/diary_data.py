"""The diary: facts that a user tells over days, what is asked of them when, and whether a reply holds the answer."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlearn.errors import InvalidArgument

KINDS = ("direct", "paraphrase", "indirect")

_PLAIN = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "’": "'", "‘": "'", "‑": "-", "–": "-"}
)


@dataclass(frozen=True)
class Fact:
    """One thing told: when and how, its questions (direct, paraphrase, indirect ones), its accepted answers.

    Attributes:
        updates: id of the older fact that it contradicts.
        forget: whether the user later asks to have it forgotten.
    """

    id: str
    day: int
    said: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    updates: str | None = None
    forget: bool = False

    def asked(self) -> list[tuple[str, str]]:
        """Return (kind, question) pairs; a fourth question and any further count as indirect."""
        return [(KINDS[min(index, len(KINDS) - 1)], question) for index, question in enumerate(self.questions)]

    def answer(self) -> str:
        """Return the answer as it was said, capitals and all, or the first accepted one if it was said otherwise."""
        for answer in self.answers:
            found = re.search(re.escape(answer), self.said, re.IGNORECASE)
            if found:
                return found.group()
        return self.answers[0]


@dataclass(frozen=True)
class Diary:
    """Facts, neutral prompts that must not be touched by them, and small talk.

    Attributes:
        facts: in the order of the file.
        neutral: prompts.
        smalltalk: messages with nothing worth remembering.
        digest: of the three files, 16 hexadecimal digits.
    """

    facts: tuple[Fact, ...]
    neutral: tuple[str, ...]
    smalltalk: tuple[str, ...]
    digest: str

    @property
    def days(self) -> int:
        """Number of the last day on which something is told."""
        return max(fact.day for fact in self.facts)

    def told(self, night: int) -> list[Fact]:
        """Return the facts told before ``night``; night n follows day n."""
        return [fact for fact in self.facts if fact.day <= night]

    def on(self, day: int) -> list[Fact]:
        """Return the facts told on ``day``."""
        return [fact for fact in self.facts if fact.day == day]

    def messages(self, day: int, seed: int, smalltalk: int) -> list[str]:
        """Return what is said on ``day``: its facts among ``smalltalk`` messages of small talk, in a seeded order."""
        draw = random.Random(f"{seed}-{day}")
        chatter = draw.sample(self.smalltalk, min(smalltalk, len(self.smalltalk)))
        said = [*(fact.said for fact in self.on(day)), *chatter]
        draw.shuffle(said)
        return said

    def to_forget(self, day: int) -> list[Fact]:
        """Return what the user asks on ``day``, before sleeping, to have forgotten: the secrets of the day before."""
        return [fact for fact in self.on(day - 1) if fact.forget]

    def forgotten(self, night: int) -> list[Fact]:
        """Return the facts that were to be forgotten before ``night``."""
        return [fact for fact in self.told(night - 1) if fact.forget]

    def live(self, night: int) -> list[Fact]:
        """Return the facts asked after ``night``: told, not superseded by then, not forgotten."""
        told = self.told(night)
        gone = {fact.updates for fact in told} | {fact.id for fact in self.forgotten(night)}
        return [fact for fact in told if fact.id not in gone]

    def untold(self, night: int) -> list[Fact]:
        """Return the facts of later days about which nothing at all was told before: no memory can touch them."""
        return [fact for fact in self.facts if fact.day > night and fact.updates is None]

    def older(self, fact: Fact) -> list[Fact]:
        """Return the facts that ``fact`` replaced, one after the other."""
        by_id = {other.id: other for other in self.facts}
        chain = []
        while fact.updates is not None:
            fact = by_id[fact.updates]
            chain.append(fact)
        return chain


def load_diary(data: Path, split: str) -> Diary:
    """Read ``{split}.jsonl``, ``{split}_neutral.jsonl`` and ``{split}_smalltalk.txt`` in ``data`` or ``data/diary``.

    Raises:
        InvalidArgument: no such folder, split or file, or a line that is not what it should be (says which).
    """
    data = Path(data)
    if not data.is_dir():
        raise InvalidArgument(f"data: {data} is not a folder")
    folder = data / "diary" if (data / "diary").is_dir() else data
    if not (folder / f"{split}.jsonl").is_file():
        known = sorted(p.name.removesuffix("_neutral.jsonl") for p in folder.glob("*_neutral.jsonl"))
        raise InvalidArgument(f"split: {folder} has no {split}.jsonl; splits there: {', '.join(known) or 'none'}")
    paths = [folder / f"{split}{ending}" for ending in (".jsonl", "_neutral.jsonl", "_smalltalk.txt")]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"data: {path} cannot be read: {error}") from error
    facts = tuple(_fact(line, where) for line, where in _lines(texts[0], paths[0]))
    neutral = tuple(_text(line, "prompt", where) for line, where in _lines(texts[1], paths[1]))
    smalltalk = tuple(line.strip() for line in texts[2].splitlines() if line.strip())
    _check(facts, paths[0])
    if not neutral:
        raise InvalidArgument(f"data: {paths[1]} has no prompts")
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    return Diary(facts, neutral, smalltalk, digest)


def fold(text: str) -> str:
    """Return ``text`` in lower case, without accents, with plain quotes and hyphens and single spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold().translate(_PLAIN))
    return " ".join("".join(c for c in plain if not unicodedata.combining(c)).split())


def contains(reply: str, answers: Iterable[str]) -> bool:
    """Return whether any accepted answer occurs in ``reply``, both folded, from a word's beginning.

    Accepted answers may be stems ("gooseberr", "bookbind"), so letters may follow one of four letters or more
    ("cashews", "taxidermist"); a shorter one takes only a plural. A number must stand alone: "august 2" is not in
    "August 22", nor "47" in "1,470", "47,000" or "47.5", but "19" is in "19th" and "67,400" in "67,400.00".
    """
    folded = fold(reply)
    return any(_pattern(answer).search(folded) for answer in answers)


@functools.lru_cache(maxsize=4096)
def _pattern(answer: str) -> re.Pattern[str]:
    plain = fold(answer)
    start = r"(?<![^\W_])" + (r"(?<!\d[.,:])" if plain[0].isdigit() else "")
    last = re.findall(r"[^\W\d_]+$", plain)
    if plain[-1].isdigit():
        end = r"(?!\d)(?!,\d{3}(?!\d))(?!\.(?!0+(?!\d))\d)"
    elif last and len(last[0]) < 4:
        end = r"(?:e?s)?(?![^\W_])"
    else:
        end = ""
    return re.compile(start + re.escape(plain) + end)


def _lines(text: str, path: Path) -> list[tuple[dict[str, Any], str]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"data: {where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidArgument(f"data: {where} is not a JSON object")
        rows.append((row, where))
    return rows


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidArgument(f"data: {where}: {name} is {value!r}, expected some words")
    return value


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = row.get(name)
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and fold(v) for v in values):
        raise InvalidArgument(f"data: {where}: {name} is {values!r}, expected a list of words")
    return tuple(values)


def _fact(row: dict[str, Any], where: str) -> Fact:
    day = row.get("day")
    if not isinstance(day, int) or day < 1:
        raise InvalidArgument(f"data: {where}: day is {day!r}, expected 1 or more")
    said, key = _text(row, "said", where), _text(row, "id", where)
    questions, answers = _texts(row, "questions", where), _texts(row, "answer", where)
    return Fact(key, day, said, questions, answers, row.get("updates"), bool(row.get("forget", False)))


def _check(facts: Sequence[Fact], path: Path) -> None:
    days = {fact.id: fact.day for fact in facts}
    if not facts or len(days) < len(facts):
        raise InvalidArgument(f"data: {path} has {len(facts)} facts with {len(days)} different ids")
    for fact in facts:
        if fact.updates is not None and days.get(fact.updates, fact.day + 1) > fact.day:
            raise InvalidArgument(f"data: {path}: {fact.id} updates {fact.updates!r}, which is no earlier fact")
        if fact.updates == fact.id:
            raise InvalidArgument(f"data: {path}: {fact.id} updates itself")
