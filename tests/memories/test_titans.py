"""Titans' neural memory against its definition token by token: reads, states and every gradient."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from fla_reference import reference

from everlearn.errors import InvalidArgument
from everlearn.memories.self_modifying_plan import make_plan
from everlearn.memories.titans import Inputs, NeuralMemory, momentum_table
from everlearn.memories.titans_naive import titans_naive

BATCH, HEADS, SIZE, LENGTH = 2, 2, 4, 7


def drawn(**options) -> NeuralMemory:
    memory = NeuralMemory(HEADS, SIZE, width=3, **options).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    return memory


def inputs(length=LENGTH, scale=1.0) -> Inputs:
    q, k, v = (scale * torch.randn(BATCH * HEADS, SIZE, length, dtype=torch.float64) for _ in range(3))
    step, keep, momentum = (torch.rand(BATCH * HEADS, length, dtype=torch.float64) for _ in range(3))
    return Inputs(q, k, v, 0.3 * step, (0.5 + keep / 2).log(), momentum.log(), torch.ones_like(step))


def chunked(memory: NeuralMemory, given: Inputs, chunk_size: int):
    position = torch.zeros(BATCH, dtype=torch.long)
    plan = make_plan(given.k.shape[-1], position, chunk_size, chunk_size)
    carry, reads = memory.init_carry(BATCH), []
    for piece, _ in plan.pieces:
        carry, read = memory.write(carry, Inputs(*(x[..., piece.begin : piece.end] for x in given)), piece)
        reads.append(read)
    return torch.cat(reads, dim=-1), carry.now, carry.momentum


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
@pytest.mark.parametrize(
    "options", [{}, {"max_error": None, "activation": "tanh"}, {"max_error": 0.5}, {"retention": "zero"}], ids=str
)
def test_is_its_definition(chunk_size, options):
    memory, given = drawn(**options), inputs()
    torch.testing.assert_close(chunked(memory, given, chunk_size), titans_naive(memory, given, chunk_size))


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_are_those_of_the_definition(recompute):
    memory, given = drawn(recompute=recompute), inputs()
    found = []
    for run in (chunked, titans_naive):
        leaves = [x.clone().requires_grad_() for x in given[:-1]]
        reads, now, momentum = run(memory, Inputs(*leaves, given.valid), 3)
        weights = torch.Generator().manual_seed(1)
        loss = sum(
            (x * torch.randn(x.shape, generator=weights, dtype=torch.float64)).sum() for x in (reads, *now, *momentum)
        )
        found.append(torch.autograd.grad(loss, [*leaves, *memory.parameters()]))
    torch.testing.assert_close(*found)


def test_table():
    """Every share by running the recurrence on unit writes."""
    keep, eta = torch.rand(2, 5, dtype=torch.float64)
    valid = torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64)
    table = momentum_table(keep.log(), eta.log(), valid)
    for source in range(-2, 5):  # the memory, its momentum, then every token
        memory, momentum = float(source == -2), float(source == -1)
        for t in range(5):
            if valid[t]:
                momentum = eta[t].item() * momentum + (source == t)
                memory = keep[t].item() * memory + momentum
            share = table.keep[t] if source == -2 else table.kick[t] if source == -1 else table.mix[t, source]
            if source < 0 or valid[source]:
                assert share.item() == pytest.approx(memory)
        if source == -1 or (source >= 0 and valid[source]):
            assert table.momentum[source + 1].item() == pytest.approx(momentum)


def test_table_is_flash_linear_attentions(monkeypatch):
    log_space = types.ModuleType("fla.ops.titans.log_impl")  # what the reference would import besides; not used here
    log_space.combine_params_log = None
    monkeypatch.setitem(sys.modules, log_space.__name__, log_space)
    combine = reference("titans", "combine_params")
    step, forget, eta = torch.rand(3, 2, 3, 9, 1, dtype=torch.float64)
    keep, _, kick, _, _, mix, _, last = combine(step, forget, eta, 9)
    rows = (x[..., 0].flatten(0, 1) for x in (1 - forget, eta, torch.ones_like(eta)))
    table = momentum_table(*(x if i == 2 else x.log() for i, x in enumerate(rows)))
    step = step[..., 0].flatten(0, 1)
    torch.testing.assert_close(table.keep, keep.flatten(0, 1))
    torch.testing.assert_close(table.kick, kick.flatten(0, 1), rtol=1e-6, atol=1e-6)  # theirs is in float32
    torch.testing.assert_close(table.mix * step[:, None], mix.flatten(0, 1))
    torch.testing.assert_close(table.momentum[:, 1:] * step, last.flatten(0, 1))


def test_slots_without_a_token_change_nothing():
    memory, given = drawn(), inputs()
    kept = torch.tensor([0, 1, 3, 5])
    valid = torch.zeros(BATCH * HEADS, LENGTH, dtype=torch.float64).index_fill(1, kept, 1.0)
    reads, now, momentum = chunked(memory, given._replace(valid=valid), LENGTH)
    less = Inputs(*(x[..., kept] for x in given))
    torch.testing.assert_close((reads[..., kept], now, momentum), chunked(memory, less, len(kept)))


@pytest.mark.parametrize("text", ["random", "one_token", "short_cycle"])
@torch.no_grad()
def test_stays_bounded(text):
    """At the rates training starts with, on keys of unit length."""
    memory, length = NeuralMemory(1, 64).double(), 2048
    for name, value in memory.draw().items():
        getattr(memory, name).copy_(value)
    q, k, v = torch.nn.functional.silu(torch.randn(3, 1, 64, length, dtype=torch.float64))
    if text != "random":
        period = {"one_token": 1, "short_cycle": 5}[text]
        k, v = (x[..., torch.arange(length) % period] for x in (k, v))
    q, k = (x / x.norm(dim=1, keepdim=True) for x in (q, k))
    rates = (torch.full((1, length), value, dtype=torch.float64) for value in (0.005, math.log(0.99), math.log(0.5)))
    carry, largest, given = memory.init_carry(1), [], Inputs(q, k, v, *rates, torch.ones_like(k[:, 0]))
    for piece, _ in make_plan(length, torch.zeros(1, dtype=torch.long), 64, 64).pieces:
        carry, read = memory.write(carry, Inputs(*(x[..., piece.begin : piece.end] for x in given)), piece)
        largest.append(max(x.abs().max().item() for x in (read, *carry.now)))
    assert max(largest) < 20
    assert max(largest[16:]) < 1.5 * max(largest[:16])


def test_bad_options_are_named():
    with pytest.raises(InvalidArgument, match="width: got 0"):
        NeuralMemory(2, 4, width=0)
    with pytest.raises(InvalidArgument, match="retention: got 'brass'"):
        NeuralMemory(2, 4, retention="brass")
