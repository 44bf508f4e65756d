"""Stacked models: bit-identical until they learn, sharing the base, isolated from each other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_families import FAMILIES, HIDDEN, LAYERS, VOCAB, tiny
from torch import nn

from everlearn.errors import InvalidArgument, StackingError
from everlearn.levels import Level
from everlearn.memories import ResidualMemory
from everlearn.models.stacking import (
    continua,
    is_stacked,
    load_memory_state,
    memory_parameters,
    memory_state,
    reset_level,
    restore,
    snapshot,
    stack_levels,
    stack_of,
)

LEVELS = [Level("fast", 4), Level("slow")]
KINDS = [(init, wiring) for init in ("residual", "pretrained") for wiring in ("sequential", "nested", "independent")]


def padded(batch: int = 3, time: int = 9) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(1, VOCAB, (batch, time)), torch.ones(batch, time, dtype=torch.long)
    for row in range(1, batch):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": torch.arange(1, 8)[None]})).logits


def disturb(model, level=None, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in memory_parameters(model, level).values():
            parameter.add_(by * torch.randn_like(parameter))


# --------------------------------------------------------------------------------------------- bit identity


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("init", "wiring"), KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_unlearned_is_bit_identical(family, init, wiring, frozen):
    model = tiny(family).requires_grad_(not frozen)
    stacked = stack_levels(model, LEVELS, init=init, wiring=wiring)
    inputs = padded()
    assert torch.equal(logits(stacked, **inputs), logits(model, **inputs))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = stacked.generate(**inputs, **options), model.generate(**inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(one, two) for one, two in zip(ours.logits, theirs.logits, strict=True))
    disturb(stacked, by=1.0)
    assert not torch.equal(logits(stacked, **inputs), logits(model, **inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_memory_generates_alike_with_and_without_cache(family):
    stacked = stack_levels(tiny(family), LEVELS)
    disturb(stacked, by=0.3)
    options = {"max_new_tokens": 8, "do_sample": False}
    inputs = padded()
    cached = stacked.generate(**inputs, **options)
    assert torch.equal(cached, stacked.generate(**inputs, **options, use_cache=False))


def test_half_precision_base_is_bit_identical_with_a_float32_memory():
    model = tiny().bfloat16()
    stacked = stack_levels(model, LEVELS)
    assert torch.equal(logits(stacked), logits(model))
    assert {p.dtype for p in memory_parameters(stacked).values()} == {torch.float32}


def test_sampling_and_beams_work():
    stacked = stack_levels(tiny(), LEVELS)
    torch.manual_seed(1)
    assert stacked.generate(**padded(), max_new_tokens=4, do_sample=True).shape == (3, 13)
    assert stacked.generate(**padded(), max_new_tokens=4, num_beams=3, do_sample=False).shape == (3, 13)


# ------------------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["residual", "pretrained"])
def test_base_is_shared_frozen_in_the_stack_and_left_alone(family, init):
    model = tiny(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    stacked = stack_levels(model, LEVELS, init=init)
    assert type(stacked) is type(model)
    memory = {id(p) for p in memory_parameters(stacked).values()}
    theirs = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    for tensor in [*stacked.parameters(), *stacked.buffers()]:
        assert (id(tensor) in memory) == tensor.requires_grad == (tensor.data_ptr() not in theirs)
    assert memory
    disturb(stacked)
    reset_level(stacked)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not is_stacked(model)
    assert stack_of(stacked).base is model


def test_tied_weights_and_generation_config_survive():
    model = tiny("llama")
    model.generation_config.max_new_tokens = 17
    stacked = stack_levels(model, LEVELS)
    assert stacked.lm_head.weight is stacked.model.embed_tokens.weight
    assert stacked._tied_weights_keys == model._tied_weights_keys
    assert stacked.generation_config.to_dict() == model.generation_config.to_dict()
    assert stacked.config.to_dict() == model.config.to_dict()
    stacked.generation_config.max_new_tokens = 3
    assert model.generation_config.max_new_tokens == 17


def test_two_stacks_on_one_base_never_mix():
    model = tiny()
    one, two = stack_levels(model, LEVELS), stack_levels(model, LEVELS)
    base = logits(model)
    disturb(one)
    assert torch.equal(logits(two), base)
    learned = logits(one)
    disturb(two, by=0.5)
    assert torch.equal(logits(one), learned)
    assert torch.equal(logits(model), base)
    assert not torch.equal(logits(two), learned)


def test_training_reaches_the_memory_alone_and_needs_no_graph_below_it():
    model = tiny()
    stacked = stack_levels(model, LEVELS, layers=[2])
    ids = torch.randint(VOCAB, (2, 8))
    out = stacked(input_ids=ids, labels=ids, output_hidden_states=True)
    assert [h.requires_grad for h in out.hidden_states] == [False, False, False, True, True]
    out.loss.backward()
    reached = {name for name, p in stacked.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in stacked.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())


def test_copies_and_pickles():
    stacked = stack_levels(tiny(), LEVELS)
    disturb(stacked)
    for twin in (copy.deepcopy(stacked), pickle.loads(pickle.dumps(stacked))):
        assert torch.equal(logits(twin), logits(stacked))
        disturb(twin)
        assert not torch.equal(logits(twin), logits(stacked))
    assert stack_of(copy.deepcopy(stacked)).base is stack_of(stacked).base


# -------------------------------------------------------------------------------------------- what is built


def test_default_layers_are_the_last_third_and_any_can_be_chosen():
    assert list(continua(stack_levels(tiny(), LEVELS))) == [2, 3]
    assert list(continua(stack_levels(tiny(num_hidden_layers=6), LEVELS))) == [4, 5]
    assert list(continua(stack_levels(tiny(), LEVELS, layers=[-1, 0]))) == [0, 3]


def test_pretrained_assigns_runs_of_layers_to_levels():
    stacked = stack_levels(tiny(), LEVELS, init="pretrained", layers=range(LAYERS))
    assert {name.split(".")[0] for name in memory_parameters(stacked, "fast")} == {"0", "1"}
    assert {name.split(".")[0] for name in memory_parameters(stacked, "slow")} == {"2", "3"}
    mixed = stack_levels(tiny(), LEVELS, init="pretrained", wiring="independent")
    assert "2.fast.mixture_logit" in memory_parameters(mixed, "fast")
    assert len(memory_parameters(mixed, "fast")) == len(memory_parameters(mixed, "slow")) == 2 * 4


class Gated(nn.Module):
    """Some other memory, with a persistent buffer and no `delta`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x):
        return x + self.out(x) * (x.norm(dim=-1, keepdim=True) > self.threshold)


@pytest.mark.parametrize("wiring", ["sequential", "independent"])
def test_any_memory_class_can_be_stacked(wiring):
    model = tiny()
    stacked = stack_levels(model, LEVELS, memory=Gated, wiring=wiring)
    assert torch.equal(logits(stacked), logits(model))
    kept = ("out.weight", "threshold")
    assert set(memory_state(stacked, "slow")) == {f"{layer}.slow.{key}" for layer in (2, 3) for key in kept}
    wide = stack_levels(model, LEVELS, memory=lambda size: ResidualMemory(size, 5, activation="relu"))
    assert memory_parameters(wide)["3.fast.W1"].shape == (HIDDEN, 5)


def test_saving_the_whole_is_refused_and_the_base_still_can(tmp_path):
    model = tiny()
    stacked = stack_levels(model, LEVELS)
    with pytest.raises(StackingError, match="save_memory"):
        stacked.save_pretrained(tmp_path / "stacked")
    assert not (tmp_path / "stacked").exists()
    stack_of(stacked).base.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_start_is_seeded_and_leaves_the_global_generator_alone():
    model = tiny()
    state = torch.get_rng_state()
    one, same, other = (memory_state(stack_levels(model, LEVELS, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["3.fast.W2"], other["3.fast.W2"])
    assert not torch.equal(one["3.fast.W2"], one["2.fast.W2"])


# --------------------------------------------------------------------------------------------- memory state


@pytest.mark.parametrize(("init", "wiring"), KINDS)
def test_reset_returns_to_the_start(init, wiring):
    model = tiny()
    stacked = stack_levels(model, LEVELS, init=init, wiring=wiring)
    start = snapshot(stacked)
    disturb(stacked)
    moved = snapshot(stacked)
    reset_level(stacked, "fast")
    now = memory_state(stacked)
    assert now.keys() == start.keys()
    assert all(torch.equal(now[key], (start if ".fast." in key else moved)[key]) for key in now)
    reset_level(stacked)
    assert torch.equal(logits(stacked), logits(model))


def test_snapshot_and_restore_keep_the_parameters_themselves():
    stacked = stack_levels(tiny(), LEVELS)
    disturb(stacked)
    parameters, kept, before = memory_parameters(stacked), snapshot(stacked), logits(stacked)
    disturb(stacked)
    assert not torch.equal(logits(stacked), before)
    restore(stacked, kept)
    assert torch.equal(logits(stacked), before)
    assert all(parameter is parameters[name] for name, parameter in memory_parameters(stacked).items())
    slow = snapshot(stacked, "slow")
    disturb(stacked)
    load_memory_state(stacked, slow, "slow")
    assert all(torch.equal(memory_state(stacked)[key], value) for key, value in slow.items())


def test_a_bad_state_writes_nothing():
    stacked = stack_levels(tiny(), LEVELS)
    disturb(stacked)
    kept = snapshot(stacked)
    short = dict(list(kept.items())[:-1])
    wrong = {**{key: value + 1 for key, value in kept.items()}, "3.slow.W2": torch.zeros(2, 2)}
    for state in (short, wrong):
        with pytest.raises(InvalidArgument, match="state"):
            load_memory_state(stacked, state)
    assert all(torch.equal(value, kept[key]) for key, value in memory_state(stacked).items())


# -------------------------------------------------------------------------------------------------- errors


def test_errors():
    model = tiny()
    stacked = stack_levels(model, LEVELS)
    for name, options in (
        ("init", {"init": "random"}),
        ("wiring", {"wiring": "parallel"}),
        ("layers", {"layers": [4]}),
        ("layers", {"layers": []}),
        ("layers", {"layers": [3, -1]}),
        ("memory", {"init": "pretrained", "memory": Gated}),
        ("width", {"width": 0}),
    ):
        with pytest.raises(InvalidArgument, match=name):
            stack_levels(model, LEVELS, **options)
    with pytest.raises(StackingError, match="stacked already"):
        stack_levels(stacked, LEVELS)
    with pytest.raises(StackingError, match="choose more layers"):
        stack_levels(model, LEVELS, init="pretrained", layers=[3])
    with pytest.raises(InvalidArgument, match="level"):
        memory_state(stacked, "mid")
    with pytest.raises(InvalidArgument, match="stack_levels"):
        memory_state(model)
