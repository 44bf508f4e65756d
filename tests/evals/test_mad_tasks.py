"""MAD's data: invariants that follow from the tasks' rules, and a solver by rule for each."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from everlearn.evals.fitting import IGNORED
from everlearn.evals.mad_tasks import TASKS, examples, fixed_map, settings

CASES = [(task, name) for task in TASKS for name in ("baseline", list(settings(task))[1], list(settings(task))[-1])]


@pytest.mark.parametrize(("task", "name"), CASES)
def test_shapes_and_vocabulary(task, name):
    setting = settings(task)[name]
    for testing in (False, True):
        inputs, targets = examples(task, setting, 3, 2, testing=testing)
        shifted = "recall" in task
        length = setting.length - (1 if shifted and "fuzzy" not in task else 0)
        assert inputs.shape == targets.shape == (3, length)
        assert int(inputs.min()) >= 0
        assert int(inputs.max()) < setting.vocab
        scored = targets[targets != IGNORED]
        assert len(scored)
        assert int(scored.min()) >= 0
        assert int(scored.max()) < setting.vocab


def test_parts_differ_and_repeat():
    setting = settings("compression")["baseline"]
    first, again, other = (examples("compression", setting, 4, part, testing=True).inputs for part in (0, 0, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("task", ["in-context-recall", "noisy-in-context-recall"])
def test_recall_scores_values_of_keys_seen_before(task):
    setting = settings(task)["baseline"]
    half = (setting.vocab - setting.noise_vocab) // 2
    inputs, targets = examples(task, setting, 20, 2, testing=True)
    noise = 0
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        known = {}
        for slot in range(0, len(row), 2):
            key, value = row[slot], row[slot + 1] if slot + 1 < len(row) else wanted[slot]
            if key >= 2 * half:
                assert wanted[slot] == IGNORED
                noise += 1
                continue
            assert key < half <= value < 2 * half
            assert wanted[slot] == known.get(key, IGNORED)
            assert known.setdefault(key, value) == value
            if slot + 1 < len(row):
                assert wanted[slot + 1] == IGNORED
        assert wanted[-1] != IGNORED
    share = noise / (20 * 63)
    assert (0.15 < share < 0.25) if setting.noise else share == 0


def test_recall_trains_on_every_next_token():
    inputs, targets = examples("in-context-recall", settings("in-context-recall")["baseline"], 4, 0, testing=False)
    assert targets[:, :-1].equal(inputs[:, 1:])
    assert bool((targets != IGNORED).all())


def test_the_fuzzy_probe_can_be_recalled():
    setting = settings("fuzzy-in-context-recall")["baseline"]
    pad, keys = setting.vocab - 1, (setting.vocab - 1) // 2
    inputs, targets = examples("fuzzy-in-context-recall", setting, 30, 2, testing=True)
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        sequence = [*row, wanted[-1]]
        body = [token for token in sequence if token != pad]
        assert sequence[len(sequence) - len(body) :] == body  # padding is on the left
        runs = [[body[0]]]
        for before, token in pairwise(body):
            if (before < keys) != (token < keys):
                runs.append([])
            runs[-1].append(token)
        pairs = list(zip(map(tuple, runs[::2]), map(tuple, runs[1::2])))
        assert all(len(key) == 3 == len(set(key)) and 1 <= len(value) <= 3 for key, value in pairs)
        (key, value), earlier = pairs[-1], dict(pairs[:-1])
        assert earlier[key] == value
        assert wanted[-len(value) :] == list(value)


def test_selective_copying_by_rule():
    setting = settings("selective-copying")["baseline"]
    inputs, targets = examples("selective-copying", setting, 10, 2, testing=True)
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        content = [token for token in row if token < setting.vocab - 2]
        assert len(content) == setting.copy
        assert wanted == [IGNORED] * (setting.length - setting.copy) + content
        assert row[-setting.copy - 1 :] == [setting.vocab - 1] + [setting.vocab - 2] * setting.copy
        assert row[-setting.copy - 2] == content[-1]  # no blank after the last content token


def test_compression_repeats_its_input():
    setting = settings("compression")["baseline"]
    inputs, targets = examples("compression", setting, 10, 0, testing=False)
    assert inputs.equal(targets)
    assert bool((inputs[:, -1] == setting.vocab - 1).all())
    assert int(inputs[:, :-1].max()) == setting.vocab - 2


def test_memorization_has_one_map():
    facts = fixed_map(256)
    assert sorted(facts) == list(range(127))
    assert set(facts.values()) <= set(range(127, 255))
    assert len(set(facts.values())) == 127
    assert list(facts.values()) != sorted(facts.values())
    for part in (0, 2):
        inputs, targets = examples("memorization", settings("memorization")["baseline"], 20, part, testing=part == 2)
        assert bool((inputs[:, 1::2] == 255).all())
        assert bool((targets[:, ::2] == IGNORED).all())
        assert targets[:, 1::2].tolist() == [[facts[key] for key in row] for row in inputs[:, ::2].tolist()]


def test_settings_change_one_variable_at_a_time():
    counts = {task: len(settings(task)) for task in TASKS}
    assert list(counts.values()) == [11, 14, 11, 13, 11, 6]
    for task in TASKS:
        base = vars(settings(task)["baseline"])
        for name, setting in list(settings(task).items())[1:]:
            changed = {key: value for key, value in vars(setting).items() if value != base[key]}
            assert [f"{key}={value}" for key, value in changed.items()] == [name]


def test_noise_slots_leave_one_key():
    setting = replace(settings("noisy-in-context-recall")["baseline"], noise=1.0)
    inputs, targets = examples("noisy-in-context-recall", setting, 5, 2, testing=True)
    assert np.all((inputs < 16).sum(1).numpy() == 3)  # one pair, and the probe's key
    assert np.all((targets != IGNORED).sum(1).numpy() == 1)
