"""Memory files: what is saved comes back, on its own base only; damage is found and named."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import FAMILIES, tiny

from everlearn.errors import FingerprintError, StoreCorrupt, StoreError
from everlearn.levels import Level
from everlearn.memories import ResidualMemory
from everlearn.models.memory_file import (
    atomic_write,
    fingerprint,
    layout,
    load_memory,
    memory_bytes,
    read_memory,
    save_memory,
)
from everlearn.models.stacking import continua, memory_parameters, memory_state, reset_level, snapshot, stack_levels

LEVELS = [Level("fast", 4), Level("slow")]


def disturbed(model=None, levels=LEVELS, **options):
    stacked = stack_levels(model if model is not None else tiny(), levels, **options)
    with torch.no_grad():
        for parameter in memory_parameters(stacked).values():
            parameter.add_(torch.randn_like(parameter))
    return stacked


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --------------------------------------------------------------------------------------------- fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_stable_and_unchanged_by_stacking_and_learning(family):
    model = tiny(family)
    print_ = fingerprint(model)
    assert fingerprint(tiny(family)) == print_
    assert fingerprint(disturbed(model)) == fingerprint(disturbed(model, init="pretrained")) == print_
    assert len({fingerprint(tiny(family, seed=seed)) for seed in range(3)}) == 3


def test_fingerprint_sees_architecture_and_any_fine_tune():
    model = tiny()
    print_ = fingerprint(model)
    assert len({fingerprint(tiny(family)) for family in FAMILIES}) == len(FAMILIES)
    assert fingerprint(tiny(num_hidden_layers=3)) != print_
    ids = torch.arange(1, 9)[None]
    for name, parameter in model.named_parameters():  # even of one tensor alone
        kept = parameter.detach().clone()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.AdamW([parameter], lr=1e-5).step()
        assert fingerprint(model) != print_, name
        with torch.no_grad():
            parameter.copy_(kept)
    assert fingerprint(model) == print_


def test_fingerprint_is_of_the_values_not_of_the_precision():
    model = tiny().bfloat16()
    assert fingerprint(model) == fingerprint(tiny().bfloat16().float())


@pytest.mark.real_model
def test_fingerprint_of_the_default_model_is_fast():
    from everlearn.models.hub import load_model

    model, _ = load_model()
    fingerprint(model)  # the checkpoint is memory-mapped: the first pass reads it from disk
    begin = time.process_time()
    fingerprint(model)
    assert time.process_time() - begin < 0.3


# -------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("init", ["residual", "pretrained"])
@pytest.mark.parametrize("wiring", ["sequential", "independent"])
def test_round_trip(tmp_path, init, wiring):
    stacked = disturbed(init=init, wiring=wiring)
    kept, path = snapshot(stacked), tmp_path / "me.safetensors"
    save_memory(stacked, path, {"night": 3, "name": "é"})
    reset_level(stacked)
    assert load_memory(stacked, path) == {"night": 3, "name": "é"}
    assert same(memory_state(stacked), kept)
    assert not any(part in key for key in read_memory(path)[0] for part in ("base", "embed", "attn"))
    assert list(tmp_path.iterdir()) == [path]


def test_one_level_alone_and_an_earlier_state(tmp_path):
    stacked = disturbed()
    kept = snapshot(stacked)
    save_memory(stacked, tmp_path / "slow", level="slow")
    save_memory(stacked, tmp_path / "reset", state={key: value * 0 for key, value in kept.items()})
    assert (tmp_path / "slow").stat().st_size < 0.6 * (tmp_path / "reset").stat().st_size
    load_memory(stacked, tmp_path / "reset")
    assert all(value.abs().sum() == 0 for value in memory_state(stacked).values())
    load_memory(stacked, tmp_path / "slow")
    for key, value in memory_state(stacked).items():
        assert torch.equal(value, kept[key] if ".slow." in key else kept[key] * 0)


def test_one_level_goes_into_a_stack_of_others(tmp_path):
    """The faster levels of a day may differ from those of the day on which the slow one was saved."""
    model = tiny()
    stacked, other = disturbed(model), stack_levels(model, [Level("mid", 8), Level("slow")])
    content, before = memory_bytes(stacked, {"night": 2}, level="slow"), snapshot(other, "mid")
    assert load_memory(other, content) == {"night": 2}
    assert same(memory_state(other, "slow"), memory_state(stacked, "slow"))
    assert same(memory_state(other, "mid"), before)
    with pytest.raises(FingerprintError, match="'slow', which the model here does not have"):
        load_memory(stack_levels(model, [Level("mid", 8)]), content)
    with pytest.raises(FingerprintError, match=r"the memory .* with memories = "):
        load_memory(stack_levels(model, [Level("slow")], width=7), content)
    with pytest.raises(StoreCorrupt, match="the memory is damaged"):
        load_memory(other, content[:-1])


def test_periods_and_optimisers_may_change(tmp_path):
    model = tiny()
    save_memory(disturbed(model), tmp_path / "m")
    load_memory(stack_levels(model, [Level("fast", 99), Level("slow", 1000)]), tmp_path / "m")


def test_wrong_base_is_refused_and_both_are_named(tmp_path):
    mine, other = tiny(), tiny(seed=1)
    mine.config._name_or_path, other.config._name_or_path = "mine", "other"
    save_memory(disturbed(mine), tmp_path / "m")
    stacked = disturbed(other)
    kept = snapshot(stacked)
    with pytest.raises(FingerprintError) as caught:
        load_memory(stacked, tmp_path / "m")
    for word in ("mine", "other", fingerprint(mine), fingerprint(other), str(tmp_path / "m")):
        assert word in str(caught.value)
    assert same(memory_state(stacked), kept)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("wiring", {"wiring": "independent"}),
        ("init", {"init": "pretrained"}),
        ("layers", {"layers": [1, 2]}),
        ("levels", {"levels": [Level("fast", 4), Level("mid", 8), Level("slow")]}),
        ("memories", {"width": 7}),
        ("memories", {"memory": lambda size: ResidualMemory(size, activation="gelu")}),
    ],
)
def test_wrong_layout_is_refused(tmp_path, key, options):
    model = tiny()
    save_memory(disturbed(model), tmp_path / "m")
    with pytest.raises(FingerprintError, match=f"with {key} = "):
        load_memory(disturbed(model, **options), tmp_path / "m")


def test_another_whitening_is_another_layout(tmp_path):
    stacked = disturbed()
    save_memory(stacked, tmp_path / "m")
    before = layout(stacked)
    for continuum in continua(stacked).values():
        for memory in continuum.memories:
            memory.set_whitening(2 * torch.eye(16))
    assert layout(stacked)["shared"] != before["shared"]
    with pytest.raises(FingerprintError, match="with shared = "):
        load_memory(stacked, tmp_path / "m")


# -------------------------------------------------------------------------------------------------- damage


def test_truncated_and_damaged_files_are_named_and_leave_the_model_alone(tmp_path):
    stacked = disturbed()
    save_memory(stacked, tmp_path / "m")
    whole, kept = (tmp_path / "m").read_bytes(), snapshot(stacked)
    path = tmp_path / "damaged"
    spots = [0, 9, 60, len(whole) // 2, len(whole) - 1]
    flipped = [whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :] for spot in spots]
    for data in [b"", whole[:5], whole[: len(whole) // 2], whole[:-1], whole + b"x", *flipped]:
        path.write_bytes(data)
        with pytest.raises(StoreCorrupt, match="damaged"):
            load_memory(stacked, path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(StoreCorrupt, match="no everlearn memory"):
        load_memory(stacked, path)
    assert same(memory_state(stacked), kept)


def test_missing_and_newer_files(tmp_path, monkeypatch):
    stacked = disturbed()
    with pytest.raises(StoreError, match="none"):
        load_memory(stacked, tmp_path / "none")
    with pytest.raises(StoreError, match="cannot be written"):
        save_memory(stacked, tmp_path / "no folder" / "m")
    monkeypatch.setattr("everlearn.models.memory_file.VERSION", 2)
    save_memory(stacked, tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="version 2"):
        load_memory(stacked, tmp_path / "m")


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "m"
    atomic_write(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
