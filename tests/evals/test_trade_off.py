"""The trade-off curve moves the memory that the model reads, not a copy of it."""

from __future__ import annotations

import tiny_learner
import torch
from benchmarks.trade_off import move

from everlearn.memories.slots import SlotMemory
from everlearn.models.hub import load_model
from everlearn.models.stacking import continua


def test_a_point_moves_the_memory_that_the_model_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    base, tokenizer = load_model(str(tiny_learner.make_model(tmp_path)))
    make = tiny_learner.simple_from_pretrained()
    with make(base, tokenizer=tokenizer, memory=tmp_path / "m") as learner:
        move(learner, torch.tensor(1.5), shut=0.5, begin=0.3, go_on=0.6)
        read = [m for c in continua(learner.model).values() for m in c.memories if isinstance(m, SlotMemory)]
        assert [(memory.asked, memory.spoken) for memory in read] == [(0.3, 0.6)]
        gates = [m.gate for c in continua(learner.model).values() for m in c.memories if getattr(m, "opens", False)]
        assert [gate.bias for gate in gates] == [1.5 - 4.0 * 0.5]
