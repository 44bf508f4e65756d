"""Training end to end at a tiny size: it learns, resumes, agrees between one and two processes, and generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from everlearn.errors import InvalidArgument, ModelNotFound
from everlearn.models.hope import HopeConfig, HopeForCausalLM
from everlearn.optim.multi_frequency import MultiFrequency
from everlearn.train import generate, train
from everlearn.train.data import load_corpus, load_tokenizer, pack
from everlearn.train.trainer import make_optimizer

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "chunk_size": 8}
RUN = {"length": 16, "batch_size": 4, "vocab_size": 257, "lr": 1e-2, "cpu": True, "log_every": 1, **TINY}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book"
    path.mkdir()
    (path / "a.txt").write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    (path / "b.txt").write_text("a dog ran to the door. " * 60, encoding="utf-8")
    return path


def losses(result):
    return [entry["loss"] for entry in result.history]


@pytest.mark.parametrize("model", ["hope-tiny", "transformer-tiny"])
def test_learns_saves_and_generates(model, book, tmp_path):
    out = tmp_path / "out"
    result = train(model, book, tokens=64 * 25, out=out, **RUN)
    assert result.tokens == 64 * 25
    assert result.steps == len(result.history) == 25
    assert losses(result)[0] > 5 > 4 > losses(result)[-1]
    assert result.held_out_loss < 4
    assert json.loads((out / "result.json").read_text())["held_out_loss"] == result.held_out_loss
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in saved.parameters()) == result.parameters
    held = pack(load_corpus(book).held_out, load_tokenizer(out), 16)
    expected = [saved(**{name: value[None] for name, value in row.items()}).loss.item() for row in held]
    kept = [(row["document_ids"][1:] == row["document_ids"][:-1]).sum().item() for row in held]
    mean = sum(loss * n for loss, n in zip(expected, kept)) / sum(kept)
    assert result.held_out_loss == pytest.approx(mean, abs=1e-5)
    text = generate(out, "the cat", max_new_tokens=5, temperature=0.0)
    assert text == generate(out, "the cat", max_new_tokens=5, temperature=0.0)
    assert generate(out, "", max_new_tokens=5, seed=1) == generate(out, "", max_new_tokens=5, seed=1)


def test_resuming_continues_the_same_curve(book, tmp_path):
    """Cut off after a checkpoint, and the rest is as if it had not been: levels' clocks and sums included."""
    run = {**RUN, "cms_periods": [1, 64 * 3]}
    whole = train("hope-tiny", book, tokens=64 * 8, out=tmp_path / "whole", save_every=4, **run)
    for name in ("tokenizer.json", "tokenizer_config.json", "checkpoint-4"):
        source, target = tmp_path / "whole" / name, tmp_path / "cut" / name
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    cut = train("hope-tiny", book, tokens=64 * 8, out=tmp_path / "cut", **run)
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-4)
    assert cut.held_out_loss == pytest.approx(whole.held_out_loss, abs=1e-5)


def test_levels_step_on_their_own_clocks():
    model = HopeForCausalLM(HopeConfig(vocab_size=300, **TINY, cms_periods=[1, 20]))
    optimizer = make_optimizer(model, 1e-2, 0.1, tokens_per_step=10)
    assert isinstance(optimizer, MultiFrequency)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(set(map(id, grouped)))
    slow, fast = (model.level_parameters()[name][0] for name in ("level2", "level1"))
    for step in range(1, 5):
        before = slow.detach().clone(), fast.detach().clone()
        ids = torch.randint(0, 300, (1, 10))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        assert torch.equal(before[0], slow) == (step % 2 == 1)
        assert not torch.equal(before[1], fast)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.1}
    assert isinstance(make_optimizer(HopeForCausalLM(HopeConfig(**TINY)), 1e-2, 0.1, 10), torch.optim.AdamW)


def test_bad_arguments_are_named(book, tmp_path):
    with pytest.raises(InvalidArgument, match="tokens"):
        train("hope-tiny", book, tokens=0, out=tmp_path)
    with pytest.raises(InvalidArgument, match="'colour'"):
        train("hope-tiny", book, tokens=10, out=tmp_path, cpu=True, colour=1)
    with pytest.raises(InvalidArgument, match="'hope-9b'"):
        train("hope-9b", book, tokens=10, out=tmp_path, cpu=True)
    with pytest.raises(InvalidArgument, match="besides a configuration"):
        train(HopeConfig(**TINY), book, tokens=10, out=tmp_path, cpu=True, hidden_size=8)
    with pytest.raises(ModelNotFound, match="holds no model"):
        generate(tmp_path / "nowhere", "x")
    with pytest.raises(InvalidArgument, match="max_new_tokens"):
        generate(tmp_path, "x", max_new_tokens=0)


def test_logs_to_tensorboard(book, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train("transformer-tiny", book, tokens=64 * 3, out=tmp_path / "out", report_to="tensorboard", **RUN)
    (events,) = (tmp_path / "out").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(losses(result), abs=1e-3)


SCRIPT = """
import sys
from everlearn.train import train
train("hope-tiny", sys.argv[1], tokens=64 * 6, out=sys.argv[2], batch_size=int(sys.argv[3]), length=16, vocab_size=257,
      lr=1e-2, cpu=True, log_every=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
      chunk_size=8, cms_periods=[1, 128])
"""


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one(book, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    found = []
    for processes, batch in ((1, "4"), (2, "2")):
        out = tmp_path / f"out{processes}"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29571"]
        command = [sys.executable, *(launch if processes > 1 else []), str(script), str(book), str(out), batch]
        subprocess.run(
            command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
        )
        found.append(json.loads((out / "result.json").read_text()))
    one, two = found
    assert [e["loss"] for e in two["history"]] == pytest.approx([e["loss"] for e in one["history"]], abs=2e-4)
    assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], abs=1e-4)
    assert two["tokens"] == one["tokens"]


@pytest.mark.slow
def test_a_killed_run_continues_the_same_curve(book, tmp_path):
    """kill -9 some time after the first checkpoint; the same command again ends where an unbroken run does."""
    code = (
        "import sys\nfrom everlearn.train import train\n"
        f"train('hope-tiny', sys.argv[1], tokens=64 * 40, out=sys.argv[2], save_every=4, **{RUN!r})\n"
    )
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    command = [sys.executable, "-c", code, str(book)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, str(whole)], check=True, timeout=300, **quiet)
    process = subprocess.Popen([*command, str(cut)], **quiet)
    while process.poll() is None and not list(cut.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (cut / "result.json").exists()
    subprocess.run([*command, str(cut)], check=True, timeout=300, **quiet)
    found = [json.loads((out / "result.json").read_text()) for out in (whole, cut)]
    curves = [[entry["loss"] for entry in result["history"]] for result in found]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert found[1]["held_out_loss"] == pytest.approx(found[0]["held_out_loss"], abs=1e-5)
