"""Formal languages against hand-worked strings, and what must hold for every drawn one."""

from __future__ import annotations

import random
import statistics

import pytest

from everlearn.errors import InvalidArgument
from everlearn.evals.formal_languages import LANGUAGES, window

HAND = [
    ("parity", "0110", "1011"),
    ("parity", "101", "001"),
    ("aa", "0000", "0101"),
    ("abab", "01010101", "00010001"),
    ("counter-2", "000111", "000112"),
    ("counter-3", "001122", "001223"),
    ("dyck-1", "001011", "111110"),
    ("shuffle-2", "0231", "1310"),  # ( [ ] ) as 0 2 3 1: after it ( open; both; ( only; none
    ("shuffle-2", "2301", "2010"),
    ("reset-dyck-1", "0020101", "1101010"),
]


@pytest.mark.parametrize(("name", "letters", "labels"), HAND)
def test_labels_by_hand(name, letters, labels):
    assert LANGUAGES[name].label(tuple(map(int, letters))) == tuple(map(int, labels))


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("bin", [0, 1, 2])
def test_strings_are_distinct_members_of_their_window(name, bin):
    language = LANGUAGES[name]
    lo, hi = window(language, bin)
    kinds = int(name[-1]) if name.startswith("counter") else 1
    samples = language.test(random.Random(3), 40, lo, hi)
    assert len({letters for letters, _ in samples}) == len(samples)
    for letters, labels in samples:
        assert lo * kinds <= len(letters) <= hi * kinds
        assert len(letters) == len(labels)
        assert set(letters) <= set(range(language.letters))
        assert set(labels) <= set(range(language.labels))
        assert member(name, letters)
        assert labels[-1] == {"counter-2": 2, "counter-3": 3}.get(name, labels[-1])
        if name in ("parity", "aa", "abab"):
            assert labels[-1] == 1
        if "dyck" in name or "shuffle" in name:
            assert labels[-1] == 0


def member(name, letters):
    """Whether a string is of the language, decided without its labels."""
    text = "".join(map(str, letters))
    if name == "parity":
        return text.count("1") % 2 == 0
    if name in ("aa", "abab"):
        block = {"aa": "00", "abab": "0101"}[name]
        return text.replace(block, "") == ""
    if name.startswith("counter"):
        kinds = int(name[-1])
        count = len(text) // kinds
        return text == "".join(str(letter) * count for letter in range(kinds))
    if name == "reset-dyck-1":
        before, reset, text = text.partition("2")
        return reset == "2" and before != "" and "2" not in text and balanced(text)
    return balanced(text)


def balanced(text):
    """Whether brackets 01 and 23 close in the order they were opened."""
    while "01" in text or "23" in text:
        text = text.replace("01", "").replace("23", "")
    return text == ""


def test_windows_follow_each_other_without_meeting():
    assert [window(LANGUAGES["parity"], b) for b in range(3)] == [(2, 50), (51, 100), (101, 150)]
    assert [window(LANGUAGES["dyck-1"], b) for b in range(3)] == [(2, 50), (52, 100), (102, 150)]


def test_languages_of_few_strings_repeat_them_in_training_only():
    for name, distinct in (("aa", 25), ("abab", 12), ("counter-2", 49), ("counter-3", 49)):
        language = LANGUAGES[name]
        train = language.train(random.Random(0), 1000, 2, 50)
        assert len(train) == 1000
        assert len({letters for letters, _ in train}) == distinct
        assert len(language.test(random.Random(0), 1000, 2, 50)) == distinct
    train = LANGUAGES["shuffle-2"].train(random.Random(0), 1000, 2, 50)
    assert len({letters for letters, _ in train}) == 1000


def test_parity_draws_bits_evenly_and_lengths_geometrically():
    samples = LANGUAGES["parity"].samples(random.Random(0), 3000, 2, 50, distinct=False)
    bits = [bit for letters, _ in samples for bit in letters]
    assert 0.48 < statistics.fmean(bits) < 0.56  # a one is appended to half of the strings
    lengths = [len(letters) for letters, _ in samples]
    assert statistics.median(lengths) < 25 < max(lengths)


def test_the_grammar_branches_as_often_as_it_should():
    """Of all strings, those of length 0 come with 1/4 + 1/4 P0^2, P0 = 0.268 (the smaller root)."""
    language, rng = LANGUAGES["dyck-1"], random.Random(0)
    drawn = [language.draw(rng, 0, 10_000) for _ in range(4000)]
    share = sum(letters == () for letters in drawn) / len(drawn)
    assert abs(share - 0.268) < 0.03


def test_the_same_seed_draws_the_same_strings():
    draws = [LANGUAGES["reset-dyck-1"].train(random.Random(5), 50, 2, 50) for _ in range(2)]
    assert draws[0] == draws[1]


def test_an_empty_window_is_an_error():
    with pytest.raises(InvalidArgument, match="lo, hi"):
        LANGUAGES["abab"].test(random.Random(0), 5, 5, 7)
