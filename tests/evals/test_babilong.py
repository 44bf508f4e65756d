"""BABILong: exact lengths, facts in order, the answer rule by hand, and a run at the tiny budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tiny_sources import make_sources

from everlearn.errors import InvalidArgument
from everlearn.evals.babilong import BABILONG, BUDGETS, LABELS, PROMPT_ALLOWANCE, _Maker, context, is_right, stories
from everlearn.evals.sources import BABI_TASKS, Babi, Sources
from everlearn.evals.suite import run_suite

BOOKS = [[[book * 100 + i] * 10 for i in range(20)] for book in (1, 2)]
FACTS = [[1, 1, 1], [2, 2], [3, 3, 3, 3]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("data"))


def test_facts_lie_in_order_between_sentences_of_one_book():
    where = []
    for seed in range(50):
        made = context(FACTS, 159, random.Random(seed), BOOKS)
        assert len(made) == 159
        places = [made.index(fact[0]) for fact in FACTS]
        assert places == sorted(places)
        assert all(made[place : place + len(fact)] == fact for place, fact in zip(places, FACTS))
        rest = [token for token in made if token > 9]
        sentences = [rest[i : i + 10] for i in range(0, len(rest), 10)]
        assert all(len(set(sentence)) == 1 for sentence in sentences)
        first = sentences[0][0]
        order = [first // 100 * 100 + (first % 100 + i) % 20 for i in range(len(sentences))]
        assert [sentence[0] for sentence in sentences] == order
        for place, fact in zip(places, FACTS):  # between whole sentences
            before = [token for token in made[:place] if token > 9]
            assert len(before) % 10 == 0 or place + len(fact) == len(made) or len(before) == len(rest)
        where.append(places[0] / 159)
    assert min(where) == 0
    assert max(where) > 0.5


def test_without_a_length_there_are_the_facts_alone():
    assert context(FACTS, 0, random.Random(0), BOOKS) == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert context(FACTS, 9, random.Random(0), BOOKS) == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    with pytest.raises(InvalidArgument, match="length: got 8 tokens, expected at least 9"):
        context(FACTS, 8, random.Random(0), BOOKS)


@pytest.mark.parametrize(
    ("said", "question", "target", "right"),
    [
        (" Kitchen.", "Where is Mary?", "kitchen", True),
        ("the kitchen. Or the garden", "Where is Mary?", "kitchen", True),  # the first sentence only
        ("kitchen or garden", "Where is Mary?", "kitchen", False),
        ("garden", "Where is Mary?", "kitchen", False),
        ("", "Where is Mary?", "kitchen", False),
        ("kitchen Question: where? garden", "Where is Mary?", "kitchen", True),
        ("before the garden it was the kitchen", "Where was it before the garden?", "kitchen", True),
        ("kitchen, garden", "Where was Mary?", "garden,kitchen", True),
    ],
)
def test_answers_by_hand(said, question, target, right):
    assert is_right(said, question, target, LABELS["qa1"]) is right


def test_names_are_labels_of_qa5():
    assert is_right(" Fred.", "Who gave the football to Jeff?", "Fred", LABELS["qa5"])
    assert is_right("Fred gave Jeff the football.", "Who gave the football to Jeff?", "Fred", LABELS["qa5"])
    assert not is_right("Bill or Fred.", "Who gave the football to Jeff?", "Fred", LABELS["qa5"])


def test_samples_have_the_length_asked_for_and_come_from_their_part(data):
    maker = _Maker(Sources.at(data), BUDGETS["tiny"])
    for length in (400, 500):
        begin, question, item = maker.draw("qa2", length, random.Random(0), "test")
        assert len(begin) == length - BUDGETS["tiny"].allowance
        text = maker.tokenizer.decode(begin)
        assert all(fact in text for fact in item.facts)
        assert maker.tokenizer.decode(question) == f"\nQuestion: {item.question} Answer:"
        assert item in maker.items["qa2", "test"]
    begin, _, item = maker.draw("qa2", 0, random.Random(0), "train")
    assert maker.tokenizer.decode(begin) == "".join(f" {fact}" for fact in item.facts)


def test_training_is_no_longer_than_its_longest_length_and_what_cannot_fit_is_an_error(data):
    maker = _Maker(Sources.at(data), replace(BUDGETS["tiny"], train_lengths=(0, 40)))
    begins = [maker.draw("qa1", 0, random.Random(seed), "train")[0] for seed in range(20)]
    assert max(map(len, begins)) <= 40
    with pytest.raises(InvalidArgument, match="lengths: got 25 tokens, in which no question of qa1"):
        maker.draw("qa1", 25, random.Random(0), "test")


def test_stories_are_found_again_by_their_facts():
    a, b, c, d = (f"{name} went." for name in "abcd")
    items = [Babi(facts, "Who?", "x") for facts in ((a,), (a, b, c), (b,), (b, c), (b, d), (b, d, a))]
    assert [[len(item.facts) for item in story] for story in stories(items)] == [[1, 3], [1, 2], [2, 3]]


def test_a_drill_is_a_story_with_its_questions_answered_where_they_are_asked(data):
    maker = _Maker(Sources.at(data), replace(BUDGETS["tiny"], train_lengths=(0, 160)))

    def written(story):
        told, text = 0, ""
        for item in story:
            facts = "".join(f" {fact}" for fact in item.facts[told:])
            text += f"{facts}\nQuestion: {item.question} Answer: {item.answer}.{maker.tokenizer.eos_token}"
            told = len(item.facts)
        return text

    counts = []
    for seed in range(20):
        turns = maker.drill("qa1", random.Random(seed))
        tokens = [token for turn in turns for part in turn for token in part]
        assert len(tokens) <= 160
        assert maker.tokenizer.decode(tokens) in [written(story[: len(turns)]) for story in maker.stories["qa1"]]
        assert all(said[-1] == maker.tokenizer.eos_token_id for _, said in turns)
        counts.append(len(turns))
    assert max(counts) > 1
    short = _Maker(Sources.at(data), replace(BUDGETS["tiny"], train_lengths=(0, 5)))
    with pytest.raises(InvalidArgument, match="train_lengths: got 5 tokens at most"):
        short.drill("qa1", random.Random(0))


def test_the_published_prompt_has_examples_and_an_allowance(data):
    assert BUDGETS["paper"].allowance == PROMPT_ALLOWANCE == 300
    maker = _Maker(Sources.at(data), replace(BUDGETS["tiny"], examples=2, allowance=300))
    begin, question, _ = maker.draw("qa1", 1000, random.Random(0), "test")
    text = maker.tokenizer.decode(begin)
    assert text.count("<example>") == 2
    assert text.index("facts hidden") < text.index("<example>") < text.index("<context>")
    assert maker.tokenizer.decode(question).startswith("\n</context>\nQuestion: ")
    assert len(begin) - len(maker.say(maker.prompt("qa1"))) == 700


def test_a_run_asks_every_task_at_every_length(data, tmp_path):
    found = run_suite(BABILONG, tmp_path / "r.json", models=["hope"], seeds=1, budget="tiny", data=data)
    rows = {(row["task"], row["setting"]): row["value"] for row in found["rows"] if row["metric"] == "accuracy"}
    assert set(rows) == {(task, f"length={length}") for task in BABI_TASKS for length in (0, 500)}
    assert all(0 <= value <= 1 for value in rows.values())
    memory = {row["value"] for row in found["rows"] if row["metric"] == "cache_bytes"}
    assert len(memory) == 1
