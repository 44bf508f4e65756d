"""Needles in haystacks: exact lengths, what is hidden where, scoring by hand, and a run at the tiny budget."""

from __future__ import annotations

import random
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from tiny_sources import make_sources
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.evals.contestants import Size, choose, make
from everlearn.evals.fitting import IGNORED, parameters
from everlearn.evals.language import tokenizer
from everlearn.evals.long_context import lesson, two_losses
from everlearn.evals.niah import NIAH
from everlearn.evals.niah_prompts import (
    ADJECTIVES,
    DEPTHS,
    NIAH_TASKS,
    NOISE,
    NOUNS,
    draw,
    make_drill,
    make_prompt,
    names,
    share_found,
)
from everlearn.evals.sources import Sources
from everlearn.evals.suite import run_suite

ESSAY = [f" Sentence {i} of it." for i in range(50)]


def encode(text):
    return [*text.encode()]


def prompt(name, length=2000, seed=0, **given):
    essay = [encode(sentence) for sentence in ESSAY]
    made = make_prompt(NIAH_TASKS[name], length, random.Random(seed), encode, essay, **given)
    return made, bytes(made.context).decode(), bytes(made.question).decode()


@pytest.mark.parametrize("name", NIAH_TASKS)
def test_every_task_has_what_its_row_says(name):
    task = NIAH_TASKS[name]
    made, context, question = prompt(name)
    assert len(made.context) + len(made.question) == 2000
    number, uid = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    key = uid if task.key == "uuids" else r"[a-z]+-[a-z]+"
    value = uid if task.value == "uuids" else number
    found = re.findall(f"One of the special magic {task.value} for ({key}) is: ({value})\\.", context)
    hidden = {value for _, value in found}
    assert set(made.values) <= hidden
    assert len(made.values) == task.queries * task.values
    if task.haystack != "needle":
        assert len(found) == task.keys * task.values
    else:
        assert len(found) > 8
    asked = dict(found)
    assert all(key in question for key, value in found if value in made.values)
    assert len({key for key, value in found if value in made.values}) == task.queries
    assert len(asked) >= task.keys
    assert question.endswith(" is" if len(made.values) == 1 else " are")
    assert all(value in made.answer for value in made.values)
    assert (NOISE in context) == (task.haystack == "noise")
    assert ("Sentence 1" in context) == (task.haystack == "essay")


def test_the_words_of_a_prompt():
    made, context, question = prompt("S-NIAH-1", 400)
    key = re.findall(r"for (\S+) is:", context)[0]
    assert context.startswith("A special magic number is hidden within the following text. Make sure to memorize it.")
    assert question == (
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert made.answer == f" {made.values[0]}."
    made, context, question = prompt("MQ-NIAH")
    assert context.startswith("Some special magic numbers are hidden")
    assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned", question)
    assert made.answer == " {}, {}, {}, and {}.".format(*made.values)
    assert "hidden within" not in prompt("S-NIAH-1", instruct=False)[1]


def test_needles_lie_anywhere_and_at_distinct_depths_of_an_essay():
    places = []
    for seed in range(40):
        _, context, _ = prompt("S-NIAH-2", seed=seed)
        places.append(context.index("One of the special") / len(context))
    assert min(places) < 0.2
    assert max(places) > 0.8
    assert (DEPTHS[0], DEPTHS[-1], len(DEPTHS)) == (0, 100, 40)
    _, context, _ = prompt("MV-NIAH")
    assert context.count("One of the special magic numbers for") == 4
    assert re.search(r"numbers for (\S+) is: \d+\.(.*?)numbers for \1", context)


def test_an_essay_goes_on_from_a_random_place_and_round():
    _, context, _ = prompt("S-NIAH-2", 3000, seed=3)
    numbers = [int(n) for n in re.findall(r"Sentence (\d+) of", context)]
    assert all(b == (a + 1) % len(ESSAY) for a, b in pairwise(numbers))
    assert len(numbers) > len(ESSAY)


def test_a_length_without_room_is_an_error():
    with pytest.raises(InvalidArgument, match=r"length: got 300 tokens, expected at least \d+"):
        prompt("MQ-NIAH", 300)


def test_scores_by_hand():
    assert share_found(["1234567", "7654321"], "it is 1234567, no doubt") == 0.5
    assert share_found(["ABC-1"], "abc-12") == 1.0
    assert share_found(["1234567"], "") == 0.0
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) > 80
    assert len(set(NOUNS)) == len(NOUNS) > 100


def test_a_drill_states_needles_and_asks_for_them_again_and_again():
    forms = [r"\nOne of the special magic numbers for (\S+) is: (\d+)\.", r"\n(\S+) is: (\d+)\.",
             r"\nWhat is the special magic number for \S+ mentioned in the provided text\?"
             r" The special magic number for (\S+) mentioned in the provided text is (\d+)\."]  # fmt: skip
    counts, answers = [0, 0, 0], 0
    for seed in range(40):
        turns, told = make_drill(700, random.Random(seed), encode), {}
        assert sum(len(part) for turn in turns for part in turn) <= 700
        for given, said in turns:
            line = bytes([*given, *said]).decode()
            form, match = next((i, m) for i, form in enumerate(forms) if (m := re.fullmatch(form, line)))
            key, value = match.groups()
            counts[form] += 1
            assert bytes(said).decode() == (f" {value}." if key in told else "")
            assert told.setdefault(key, value) == value
            answers += bool(said)
        assert len(told) <= 6
    assert min(counts) > 40
    assert answers > 100
    bare = make_drill(300, random.Random(0), encode, bare=1.0, most=2, draw=partial(draw, few=("fox", "owl"), digits=2))
    assert {bytes(given).decode()[:8] for given, _ in bare} == {"\nfox is:", "\nowl is:"}
    with pytest.raises(InvalidArgument, match="length: got 40 tokens"):
        make_drill(40, random.Random(0), encode)


def test_few_names_and_short_numbers_are_drawn_and_never_twice_for_one_prompt():
    few = partial(draw, few=names(4), digits=2)
    for seed in range(20):
        essay = [encode(sentence) for sentence in ESSAY]
        made = make_prompt(NIAH_TASKS["MQ-NIAH"], 900, random.Random(seed), encode, essay, draw=few)
        found = dict(re.findall(r"numbers for (\S+) is: (\d\d)\.", bytes(made.context).decode()))
        assert set(found) == set(names(4))
        assert set(found.values()) == set(made.values)
        made = make_prompt(NIAH_TASKS["MK-NIAH-2"], 900, random.Random(seed), encode, [], draw=few)
        told = re.findall(r"numbers for (\S+) is: (\d\d)\.", bytes(made.context).decode())
        key = re.search(r"number for (\S+) mentioned", bytes(made.question).decode())[1]
        assert len(told) > 8
        assert [value for name, value in told if name == key] == made.values  # hay never answers
    with pytest.raises(InvalidArgument, match="names: got 3 different words, expected at least 4"):
        make_prompt(NIAH_TASKS["MQ-NIAH"], 900, random.Random(0), encode, essay, draw=partial(draw, few=names(3)))
    with pytest.raises(InvalidArgument, match="names: got 0"):
        names(0)


def test_the_tokenizer_takes_every_digit_apart(tmp_path):
    made = tokenizer(Sources.at(make_sources(tmp_path / "data")), 400, ("is: 1234." * 50,), digits=True)
    assert made.tokenize("is: 1234.")[-5:] == ["Ġ1", "2", "3", "4", "."]


def test_a_lesson_scores_text_and_answers_apart():
    made = lesson([[([1, 2, 3], [4, 5])], [([6], [7])]])
    two = lesson([[([1], [2]), ([3], [4])]])
    assert (two.inputs.tolist(), two.targets.tolist()) == ([[1, 2, 3]], [[2, 3, 4]])
    assert two.answer.tolist() == [[True, False, True]]
    assert made.inputs.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0]]
    assert made.targets.tolist() == [[2, 3, 4, 5], [7, IGNORED, IGNORED, IGNORED]]
    assert made.answer.tolist() == [[False, False, True, True], [True, False, False, False]]
    model = make(choose(["transformer"], {})[0], Size(16, 1, 2, 16, {}), 8).eval()
    with torch.no_grad():
        text, said = two_losses(model, made)
        logits = model(input_ids=made.inputs).logits
    by_hand = [F.cross_entropy(logits[r, t], made.targets[r, t]) for r, t in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0))]
    assert text.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    assert said.item() == pytest.approx(torch.stack(by_hand[2:]).mean().item(), rel=1e-5)


def test_a_run_asks_every_task_at_every_length(tmp_path):
    data = make_sources(tmp_path / "data")
    found = run_suite(NIAH, tmp_path / "r.json", models=["hope"], seeds=1, budget="tiny", data=data)
    rows = [row for row in found["rows"] if row["metric"] == "accuracy"]
    assert {(row["task"], row["setting"]) for row in rows} == {
        (task, f"length={length}") for task in NIAH_TASKS for length in (600, 700)
    }
    memory = {row["setting"]: row["value"] for row in found["rows"] if row["metric"] == "cache_bytes"}
    assert len(set(memory.values())) == 1
    assert len({row["run"] for row in found["rows"]}) == 1
    budget = NIAH.budgets["tiny"]
    untied = make(choose(["hope"], {})[0], budget.size, budget.vocab_size, tied=False)
    assert {row["parameters"] for row in rows} == {parameters(untied)}  # tied, copying is learned later
