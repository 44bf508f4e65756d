"""MAD's suite: the auto-encoder of the compression task, epochs, and runs at the tiny budget."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from everlearn.evals import mad
from everlearn.evals.contestants import choose, make
from everlearn.evals.fitting import Batch
from everlearn.evals.mad import BUDGETS, MAD, AutoEncoder
from everlearn.evals.mad_tasks import TASKS
from everlearn.evals.suite import Job, run_suite

PLAN = BUDGETS["tiny"]


def test_the_auto_encoder_sees_the_last_output_only():
    torch.manual_seed(0)
    model = AutoEncoder(make(choose(["transformer"], {})[0], PLAN.size, 16, tied=False), 6).eval()
    inputs = torch.randint(0, 16, (2, 6))
    logits = model(inputs)
    assert logits.shape == (2, 6, 16)
    last = model.decoder.model(input_ids=inputs).last_hidden_state[:, -1]
    by_hand = model.decoder.lm_head(model.reader(last[0] + model.positions[3]))
    assert torch.allclose(logits[0, 3], by_hand, atol=1e-6)
    assert not torch.allclose(logits[0, 3], logits[0, 4])  # positions are told apart


def test_positions_are_sines_and_cosines():
    found = mad._sin_cos(4, 6)
    assert found[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert found[1, 0].item() == pytest.approx(torch.tensor(1.0).sin().item())
    assert found[2, 4].item() == pytest.approx(torch.tensor(2 * 10_000 ** (-1 / 3)).cos().item())


def test_an_epoch_has_every_example_once():
    data = Batch(torch.arange(10)[:, None], torch.arange(10)[:, None])
    made = list(itertools.islice(mad._epochs(data, 4, seed=0), 6))
    assert [len(batch.inputs) for batch in made] == [4, 4, 2, 4, 4, 2]
    first, second = ([int(x) for batch in made[i : i + 3] for x in batch.inputs] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_every_task_runs(tmp_path):
    found = run_suite(MAD, tmp_path / "r.json", models=["transformer"], seeds=1, budget="tiny")
    assert {line["task"] for line in found["summary"]} == set(TASKS)
    assert len({(line["task"], line["setting"]) for line in found["summary"]}) == 12
    for line in found["summary"]:
        if line["metric"] in ("macro", "micro"):
            assert 0 <= line["mean"] <= 1
    assert json.loads((tmp_path / "r.json").read_text())["protocol"]["notes"][0].startswith("12 of 66 settings")


def test_test_examples_are_no_training_examples(monkeypatch):
    parts = []
    original = mad.examples
    monkeypatch.setattr(mad, "examples", lambda *given, **named: parts.append(given[3]) or original(*given, **named))
    job = Job("memorization", "baseline", choose(["transformer"], {})[0], 0, (("lr", 1e-3), ("weight_decay", 0.0)))
    mad.run(job, PLAN, None, lambda what, share: None)
    assert parts == [0, 1, 2]
