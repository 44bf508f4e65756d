"""Words and sentences, in whatever language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

SHORT = 15  # words; a longer message is dreamt of sentence by sentence
LONG = 40  # words; a longer sentence is cut in two
FEWEST = 3  # words of a sentence that is dreamt of by itself, or of a part of one


def split_passage(text: str) -> list[str]:
    """Return what of ``text`` is dreamt of at a time: all on one line or, if that is long, its sentences."""
    line = " ".join(text.split())
    return [line] if len(line.split()) <= SHORT else split_sentences(line)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of ``text``, long ones in parts of ``LONG`` words; very short ones go with one beside.

    What is told stays apart from what is asked ("I'm vegan. What shall I cook?")."""
    found: list[list[str]] = []
    for part in (part for sentence in sentences(" ".join(text.split())) for part in _halved(sentence.split())):
        asks = {some[-1].endswith(("?", "？")) for some in (*found[-1:], part)}
        if found and min(len(found[-1]), len(part)) < FEWEST and len(asks) == 1:
            found[-1] += part
        else:
            found.append(part)
    return [" ".join(part) for part in found] or [text]


def _halved(part: list[str]) -> list[list[str]]:
    """Return the words of a sentence in parts of at most ``LONG``, cut in two behind the mark nearest to the middle."""
    if len(part) <= LONG:
        return [part]
    inner = range(FEWEST, len(part) - FEWEST + 1)
    at = min([at for at in inner if ended(part[at - 1])] or inner, key=lambda at: abs(at - len(part) / 2))
    return _halved(part[:at]) + _halved(part[at:])


def in_context(parts: Sequence[str]) -> list[tuple[str, str]]:
    """Return each of the ``parts`` of a text alone and behind the one before it, which may name what it is about."""
    return [(part, " ".join(parts[max(k - 1, 0) : k + 1])) for k, part in enumerate(parts)]


def sentences(text: str) -> list[str]:
    """Return the sentences of ``text``, as far as their marks tell; "Dr." and its like do not end one."""
    found: list[str] = []
    for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text):
        if found and re.search(r"\b[A-Z][^\W\d_A-Zaeiouy]{1,2}\.$", found[-1]):
            found[-1] += f" {part}"
        elif part:
            found.append(part)
    return found


def words(text: str) -> list[str]:
    """Return the words of ``text``, in lower case and without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c)))


def has(word: str, text: str) -> bool:
    """Whether ``text`` has ``word`` in it, endings aside."""
    return any(same(word, other) for other in words(text))


def given_away(answer: str, question: str) -> bool:
    """Whether ``question`` has a word of ``answer`` in it, endings aside; short words are no secret."""
    return any(len(word) > 3 and has(word, question) for word in words(answer))


def same(a: str, b: str) -> bool:
    """Whether two words are the same but for their endings."""
    return a == b or (min(len(a), len(b)) >= 4 and (a.startswith(b) or b.startswith(a)))


def ended(line: str) -> bool:
    """Whether ``line`` was not cut short: it ends in a mark of punctuation, of whatever language."""
    return unicodedata.category(line[-1:] or " ").startswith("P")


def before_asking(sentence: str) -> str:
    """Return what a ``sentence`` tells before it asks ("I'm from Ghent, any tips?"); nothing if it does not."""
    if not sentence.endswith(("?", "？")):
        return ""
    told = re.match(r"(.*?)[,;:–—，；：、]\s*[^,;:–—，；：、]*$", sentence)
    return told.group(1).rstrip() if told and len(told.group(1).split()) >= FEWEST else ""


def as_told(answer: str, text: str) -> str:
    """Return ``answer`` as ``text`` writes it; empty if it is not there word by word."""
    tokens = list(re.finditer(r"\w+", text))
    said, sought = [word.group() for word in tokens], re.findall(r"\w+", answer)
    for start in range(len(said) - len(sought) + 1 if sought else 0):
        if [word.casefold() for word in said[start : start + len(sought)]] == [word.casefold() for word in sought]:
            return text[tokens[start].start() : tokens[start + len(sought) - 1].end()]
    return ""


def part_of(one: str, other: str) -> bool:
    """Whether one of two answers has all words of the other."""
    a, b = set(words(one)), set(words(other))
    return a <= b or b <= a


def distinct(questions: Sequence[str]) -> list[str]:
    """Keep the first of all questions that have the same words."""
    first: dict[tuple[str, ...], str] = {}
    for question in questions:
        first.setdefault(tuple(words(question)), question)
    return list(first.values())


def unambiguous(kept: Sequence[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """Drop the questions that were asked of several passages with different answers ("What is her name?")."""
    answers: dict[tuple[str, ...], set[str]] = {}
    for found in kept:
        for question, answer in found:
            answers.setdefault(tuple(words(question)), set()).add(" ".join(words(answer)))
    return [[(q, a) for q, a in found if len(answers[tuple(words(q))]) == 1] for found in kept]
