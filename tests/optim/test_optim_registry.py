"""Optimisers by name, and a real Trainer run with each."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from everlearn.errors import InvalidArgument
from everlearn.memories.gated import Gate, GatedMemory
from everlearn.optim import DGD, M3, OPTIMIZERS, by_name, create, for_memory


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )


def data() -> list[dict[str, torch.Tensor]]:
    rows = torch.arange(12).reshape(-1, 1).add(torch.arange(8)) % 16
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: LlamaForCausalLM, folder, name: str, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        logging_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=data(), optimizer_cls_and_kwargs=by_name(name, **options))


def test_create_builds_every_name_over_the_groups_of_the_model():
    model = tiny_model()
    for name, kind in OPTIMIZERS.items():
        optimizer = create(name, model, lr=0.01)
        assert isinstance(optimizer, kind)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_embeddings_and_heads_get_adamw_by_name():
    model = tiny_model()
    for name in ("muon", "dgd"):
        groups = create(name, model).param_groups
        rule = {id(p): group["rule"] for group in groups for p in group["params"]}
        assert rule[id(model.model.embed_tokens.weight)] == rule[id(model.lm_head.weight)] == "adamw"
        assert rule[id(model.model.layers[0].mlp.up_proj.weight)] == "matrix"


def test_unknown_names_are_refused():
    with pytest.raises(InvalidArgument, match="expected one of"):
        by_name("m4")
    with pytest.raises(InvalidArgument, match="expected one of"):
        create("m4", tiny_model())


@pytest.mark.parametrize("name", ["adamw", "delta_momentum", "dmgd", "muon", "m3"])
def test_a_gated_memory_learns_with_every_rule(name):
    """W1 starts at zero, so that W2 and b get no gradient at first."""
    torch.manual_seed(0)
    gate = Gate(12)
    gate.set_(torch.zeros(12), torch.ones(()))
    memory, x, y = GatedMemory(12, 6, gate, opens=True), torch.randn(8, 12), torch.randn(8, 12)
    scale = {"adamw": 1.0, "delta_momentum": 50.0, "dmgd": 50.0}.get(name, 5.0)
    optimizer = for_memory(name, scale=scale)(list(memory.parameters()), 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (memory.delta(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert [group["lr"] for group in optimizer.param_groups] == [scale * 0.01]
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in memory.parameters())


def test_a_memory_needs_a_rule_of_parameters_alone():
    for name in ("dgd", "m4"):
        with pytest.raises(InvalidArgument, match="name"):
            for_memory(name)


@pytest.mark.parametrize("name", ["m3", "dgd"])
def test_trainer_runs_and_resumes_bit_for_bit(name, tmp_path):
    options = {"lr": 0.01}
    whole = trainer(tiny_model(), tmp_path / "whole", name, **options)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, {"m3": M3, "dgd": DGD}[name])
    assert [group["rule"] for group in whole.optimizer.param_groups][:2] == ["matrix", "adamw"]
    assert whole.state.log_history[0]["loss"] > whole.state.log_history[1]["loss"]

    resumed = trainer(tiny_model(), tmp_path / "resumed", name, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
