"""The diary's data: matching, what is said and asked when, files that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_diary import NEUTRAL, SMALLTALK, write_data

from everlearn.errors import InvalidArgument
from everlearn.evals.diary_data import contains, fold, load_diary


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.mark.parametrize(
    ("reply", "answer", "hit"),
    [
        ("Your name is Zora.", "zora", True),
        ("ZORA!", "zora", True),
        ("You come from Liège", "liege", True),
        ("You come from Liege", "liège", True),
        ("Tromsø, of course", "tromso", True),
        ("_Middlemarch_", "middlemarch", True),
        ("It’s Marchetti’s.", "marchetti's", True),
        ("black\n sesame", "black sesame", True),
        ("He is a taxidermist.", "taxiderm", True),
        ("You like gooseberries", "gooseberr", True),
        ("You know glassblowing", "glass", True),
        ("an eyeglass", "glass", False),
        ("the category", "cat", False),
        ("two cats", "cat", True),
        ("concatenate", "cat", False),
        ("August 22", "august 2", False),
        ("August 2nd", "august 2", True),
        ("August 2, 2024", "august 2", True),
        ("in the 1930s", "1930", True),
        ("It is 147.", "47", False),
        ("1,470", "47", False),
        ("1,47", "47", False),
        ("47,000 dollars", "47", False),
        ("47.5", "47", False),
        ("It is 47.", "47", True),
        ("It is 47, I think", "47", True),
        ("$67,400.00 a year", "67,400", True),
        ("minus 14.75", "4.75", False),
        ("", "zora", False),
    ],
)
def test_answers_match_folded_from_a_words_beginning(reply, answer, hit):
    assert contains(reply, ["nothing else", answer]) is hit


def test_fold():
    assert fold("  Straße  ÉTÉ – Łódź’s ") == "strasse ete - lodz's"


def test_days_mix_facts_and_smalltalk_by_seed(data):
    diary = load_diary(data, "mini")
    facts = {fact.said for fact in diary.on(1)}
    one = diary.messages(1, 0, 2)
    assert facts < set(one)
    assert len(one) == 5
    assert set(one) - facts <= set(SMALLTALK)
    assert diary.messages(1, 0, 2) == one
    orders = {tuple(diary.messages(1, seed, 4)) for seed in range(5)}
    assert len(orders) > 1
    assert sorted(diary.messages(1, 3, 99)) == sorted([*facts, *SMALLTALK])


def test_what_is_live_superseded_forgotten(data):
    diary = load_diary(data, "mini")
    live = [[fact.id for fact in diary.live(night)] for night in (1, 2, 3)]
    assert live == [["a", "b", "c"], ["a", "d", "e"], ["a", "e", "f", "g"]]
    assert [[f.id for f in diary.to_forget(day)] for day in (1, 2, 3)] == [[], ["c"], []]
    assert [[f.id for f in diary.forgotten(night)] for night in (1, 2, 3)] == [[], ["c"], ["c"]]
    assert [f.id for f in diary.untold(1)] == ["e", "f"]
    newest = diary.live(3)[-1]
    assert [f.id for f in diary.older(newest)] == ["d", "b"]
    assert diary.days == 3
    assert diary.neutral == tuple(NEUTRAL)


def test_questions_have_kinds_and_answers_their_spelling(data):
    fact = load_diary(data, "mini").facts[0]
    assert [kind for kind, _ in fact.asked()] == ["direct", "paraphrase", "indirect"]
    assert fact.answer() == "Zora"
    stem = load_diary(data, "mini").facts[4]
    assert stem.answer() == "gooseberr"


def test_the_folder_itself_or_the_one_above(data):
    assert load_diary(data / "diary", "mini") == load_diary(data, "mini")


def test_missing_folders_splits_and_files(data, tmp_path):
    with pytest.raises(InvalidArgument, match=r"data: .*nowhere is not a folder"):
        load_diary(tmp_path / "nowhere", "mini")
    with pytest.raises(InvalidArgument, match=r"split: .* has no big\.jsonl; splits there: mini"):
        load_diary(data, "big")
    (data / "diary" / "mini_smalltalk.txt").unlink()
    with pytest.raises(InvalidArgument, match=r"mini_smalltalk\.txt cannot be read"):
        load_diary(data, "mini")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"day": 0}, "day is 0"),
        ({"day": "1"}, "day is '1'"),
        ({"said": " "}, "said is ' '"),
        ({"questions": []}, r"questions is \[\]"),
        ({"answer": ["ok", ""]}, "answer is"),
        ({"updates": "zz"}, "updates 'zz', which is no earlier fact"),
        ({"updates": "e"}, "updates 'e', which is no earlier fact"),
        ({"updates": "x"}, "x updates itself"),
        ({"id": "a"}, "different ids"),
    ],
)
def test_lines_that_are_wrong_are_named(data, changes, words):
    good = {"id": "x", "day": 1, "said": "I sing.", "questions": ["What do I do?"], "answer": ["sing"], **changes}
    with (data / "diary" / "mini.jsonl").open("a") as file:
        file.write(json.dumps(good) + "\n")
    with pytest.raises(InvalidArgument, match=words):
        load_diary(data, "mini")


def test_a_line_that_is_no_json_is_named(data):
    with (data / "diary" / "mini_neutral.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(InvalidArgument, match=r"mini_neutral\.jsonl, line 4 is not JSON"):
        load_diary(data, "mini")


@pytest.mark.parametrize(
    ("split", "facts", "updates"), [("letters", 80, 8), ("plain", 60, 6), ("chats", 40, 4), ("notes", 40, 3)]
)
def test_our_own_diaries_hold_what_they_ask_for_and_give_nothing_away(split, facts, updates):
    diary = load_diary(Path(__file__).parents[2] / "benchmarks", split)
    assert (len(diary.facts), sum(fact.updates is not None for fact in diary.facts)) == (facts, updates)
    days = {fact.id: fact.day for fact in diary.facts}
    for fact in diary.facts:
        assert contains(fact.said, fact.answers)
        assert not any(contains(question, fact.answers) for question in fact.questions), fact.id
        assert fact.updates is None or days[fact.updates] < fact.day
    assert not any(contains(text, fact.answers) for text in diary.smalltalk for fact in diary.facts)
