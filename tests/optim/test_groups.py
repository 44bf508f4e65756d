"""Which parameters are matrices."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from everlearn import HopeConfig, HopeForCausalLM
from everlearn.optim import param_groups


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def test_a_language_model_is_split_into_matrices_embeddings_and_vectors():
    for tied, embeddings in ((True, 1), (False, 2)):
        model = tiny_llama(tied)
        matrices, tables, vectors = param_groups(model)
        assert [group["rule"] for group in (matrices, tables, vectors)] == ["matrix", "adamw", "adamw"]
        assert len(matrices["params"]) == 7
        assert len(tables["params"]) == embeddings
        assert all(p.shape == (32, 16) for p in tables["params"])
        assert len(vectors["params"]) == 3
        assert vectors["weight_decay"] == 0.0
        grouped = [id(p) for group in (matrices, tables, vectors) for p in group["params"]]
        assert sorted(grouped) == sorted({id(p) for p in model.parameters()})


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    assert param_groups(model) == [{"params": [model.weight], "rule": "matrix"}]


def test_heads_are_found_by_name():
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "out": nn.Linear(4, 2)})
    assert len(param_groups(model)[0]["params"]) == 2
    groups = param_groups(model, heads=["out"])
    assert groups[0]["params"][0] is model["body"].weight
    assert groups[1]["params"][0] is model["out"].weight


def test_stacks_of_matrices_are_told_from_convolutions():
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(2, 3, 2, bias=False), "depthwise": nn.Conv1d(4, 4, 3, groups=4, bias=False)}
    )
    model.experts = nn.Parameter(torch.randn(2, 3, 4))
    matrices, stacks, vectors = param_groups(model)
    assert [id(p) for p in matrices["params"]] == [id(model["conv"].weight)]
    assert [id(p) for p in stacks["params"]] == [id(model.experts)]
    assert (stacks["rule"], stacks["stacked"]) == ("matrix", True)
    assert [id(p) for p in vectors["params"]] == [id(model["depthwise"].weight)]


def test_memories_of_hope_are_stacks_and_its_gates_are_vectors():
    model = HopeForCausalLM(
        HopeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    matrices, stacks, tables, vectors = param_groups(model)
    mixer = model.model.layers[0].mixer
    assert {id(p) for p in stacks["params"]} == {id(p) for p in mixer.starts}
    gates = {id(mixer.conv_weight), id(mixer.eta_weight), id(mixer.alpha_weight)}
    assert gates <= {id(p) for p in vectors["params"]}
    assert vectors["weight_decay"] == 0.0
    assert len(matrices["params"]) == 5
    assert len(tables["params"]) == 1


def test_groups_serve_torch_optimisers_too():
    torch.optim.AdamW(param_groups(tiny_llama(True)), lr=1e-3).step()
