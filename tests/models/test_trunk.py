"""The cut model: both halves together are the model, for every family, and share its memory."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, HIDDEN, VOCAB, tiny

from everlearn import Level, stack_levels
from everlearn.memories.gated import gated_memories
from everlearn.models.stacking import memory_parameters
from everlearn.models.trunk import SplitModel


def stacked(family: str, below: bool = False):
    """Memories in layers 1 and 3, or, with ``below``, in 3 alone, with their gate in 1."""
    memory = gated_memories(4, below=below)
    return stack_levels(tiny(family), [Level("slow")], wiring="independent", layers=[1, 3], memory=memory)


def teach(model) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            parameter.normal_()
        gate = next(module for module in model.modules() if type(module).__name__ == "Gate")
        gate.set_(torch.randn(HIDDEN) * 0.3, torch.tensor(0.5))


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_are_the_model(family, below):
    model = stacked(family, below)
    split = SplitModel(model)
    assert split.layer == (3 if below else 1)
    ids = torch.randint(0, VOCAB, (3, 7))
    for taught in (False, True):
        if taught:
            teach(model)  # after the cut: the halves see it
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            acts = split.trunk(ids)
            hidden = split.upper(acts)
            got = split.logits(hidden.flatten(0, 1)).view_as(expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    base = tiny(family)(input_ids=ids).logits
    assert not torch.allclose(base, expected, atol=1e-3), "the memory must have shown"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_is_run_once_and_changes_nothing(family, monkeypatch):
    split = SplitModel(stacked(family, below=True))
    ids = torch.randint(0, VOCAB, (5, 9))
    ids[:, :6] = ids[0, :6]
    short = split.trunk(ids)
    runs = []

    def reach(ids, *cache):
        runs.append(tuple(ids.shape))
        return SplitModel._reach(split, ids, *cache)

    monkeypatch.setattr(split, "_reach", reach)
    split.trunk(ids)
    assert runs == [(1, 6), (5, 3)]
    monkeypatch.setattr("everlearn.models.trunk.SHARED_ROWS", 99)
    whole = split.trunk(ids)
    torch.testing.assert_close(short.hidden, whole.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(short.read, whole.read, rtol=1e-4, atol=1e-4)


def test_trunk_stops_below_the_memory_and_upper_has_gradients():
    model = stacked("llama")
    teach(model)
    split = SplitModel(model)
    acts = split.trunk(torch.randint(0, VOCAB, (2, 5)))
    assert acts.hidden.shape == acts.read.shape == (2, 5, HIDDEN)
    assert not acts.hidden.requires_grad
    split.logits(split.upper(acts)[:, -1]).sum().backward()
    grads = {name: parameter.grad for name, parameter in memory_parameters(model).items()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values()), grads


@pytest.mark.parametrize("below", [False, True])
def test_trunk_does_not_depend_on_the_memory(below):
    model = stacked("llama", below)
    split = SplitModel(model)
    ids = torch.randint(0, VOCAB, (2, 5))
    before = split.trunk(ids)
    teach(model)
    after = split.trunk(ids)
    assert torch.equal(before.hidden, after.hidden)
    assert torch.equal(before.read, after.read)


def test_right_padding_changes_nothing_before_it():
    model = stacked("llama")
    teach(model)
    split = SplitModel(model)
    ids = torch.randint(0, VOCAB, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    short = split.upper(split.trunk(ids))
    long = split.upper(split.trunk(padded))[:, :5]
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_beginning_is_run_once(family, below):
    model = stacked(family, below)
    split = SplitModel(model)
    ids = torch.randint(0, VOCAB, (3, 7))
    ids[:, :3] = ids[0, :3]
    with torch.no_grad():
        acts = split.trunk(ids)
        past = split.past(acts.part(slice(1), slice(3)))
        expected = split.upper(acts)[:, 3:]
        got = split.upper(acts.part(times=slice(3, None)), past)
        again = split.upper(acts.part(times=slice(3, None)), past)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got, again), "the past must not grow"


def test_what_the_learning_memories_read_can_be_watched():
    model = stacked("llama", below=True)
    split = SplitModel(model)
    acts = split.trunk(torch.randint(0, VOCAB, (3, 5)))
    with split.watching() as seen:
        for part in acts.split(2):
            split.upper(part)
    assert [[tuple(x.shape) for x in layer] for layer in seen] == [[(2, 5, HIDDEN), (1, 5, HIDDEN)]]
    split.upper(acts)
    assert len(seen[0]) == 2, "nothing is watched afterwards"
