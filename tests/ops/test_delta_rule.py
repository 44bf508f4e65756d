"""The chunk form, its hand-written backward and the step against the recurrence as written."""

from __future__ import annotations

import math

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.ops.delta_rule import delta_rule, delta_rule_naive, delta_rule_step, gated_delta_rule
from everlearn.ops.delta_rule_chunk import decay_ratios

VARIANTS = ["full", "no_beta", "no_decay", "plain", "no_query", "no_state"]


def inputs(variant="full", lead=(2,), length=7, key_dim=3, value_dim=4, dtype=torch.float64, seed=0):
    """Random arguments of `delta_rule`, in order; None where the variant leaves one out."""
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    q, k, w = rand(*lead, length, key_dim), rand(*lead, length, key_dim), rand(*lead, length, value_dim)
    k = k / k.norm(dim=-1, keepdim=True)
    log_decay, beta = -rand(*lead, length).abs(), torch.rand(*lead, length, generator=gen).to(dtype)
    state = rand(*lead, value_dim, key_dim)
    return [
        None if variant == "no_query" else q,
        k,
        w,
        None if variant in ("no_decay", "plain") else log_decay,
        None if variant in ("no_beta", "plain") else beta,
        None if variant == "no_state" else state,
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 64])
def test_chunk_equals_naive_with_every_gradient(variant, chunk_size):
    args = [x.requires_grad_() if x is not None else None for x in inputs(variant, lead=(2, 3))]
    given = [x for x in args if x is not None]
    results = []
    for mode in ("naive", "chunk"):
        out, state = delta_rule(*args, chunk_size=chunk_size, mode=mode)
        weight = torch.linspace(-1, 1, state.numel(), dtype=state.dtype).view_as(state)
        loss = (state.sin() * weight).sum() + (out.cos().sum() if out is not None else 0.0)
        results.append([*(x for x in (out, state) if x is not None), *torch.autograd.grad(loss, given)])
    for naive, chunk in zip(*results):
        torch.testing.assert_close(chunk, naive, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["chunk", "naive"])
def test_gradcheck_of_every_input_and_the_initial_state(variant, mode):
    args = [x.requires_grad_() if x is not None else None for x in inputs(variant, lead=(1,), length=5)]

    def run(*a):
        return tuple(x for x in delta_rule(*a, chunk_size=2, mode=mode) if x is not None)

    assert torch.autograd.gradcheck(run, args)


def test_second_derivatives():
    args = [x.requires_grad_() for x in inputs("full", lead=(1,), length=3, key_dim=2, value_dim=2)]
    assert torch.autograd.gradgradcheck(lambda *a: delta_rule(*a, chunk_size=2), args)


def test_works_under_function_transforms():
    """A gradient inside a gradient by `torch.func`, mapped over a batch, as learning in context does it."""
    q, k, w, log_decay, beta, state = inputs("full", lead=(3, 2), length=5)

    def inner(w, q, k, log_decay, beta, state, run):
        step = torch.func.grad(lambda w: run(q, k, w, log_decay, beta, state)[0].sin().sum())(w)
        return run(q, k, w - 0.1 * step, log_decay, beta, state)[1].cos().sum()

    rest = (q, k, log_decay, beta, state)
    found = []
    for run in (lambda *a: delta_rule(*a, chunk_size=2), delta_rule_naive):
        outer = torch.func.grad(lambda w, *a, run=run: inner(w, *a, run))
        found.append(torch.vmap(outer)(w, *rest))
    torch.testing.assert_close(*found)


def test_only_one_output_used():
    args = [x.requires_grad_() for x in inputs()]
    for which in (0, 1):
        chunk = torch.autograd.grad(delta_rule(*args, chunk_size=3)[which].sin().sum(), args[1:5])
        naive = torch.autograd.grad(delta_rule_naive(*args)[which].sin().sum(), args[1:5])
        torch.testing.assert_close(chunk, naive)


def test_two_calls_equal_one_through_the_state():
    q, k, w, log_decay, beta, state = inputs(length=10)
    out, last = delta_rule(q, k, w, log_decay, beta, state, chunk_size=4)
    first, middle = delta_rule(q[:, :3], k[:, :3], w[:, :3], log_decay[:, :3], beta[:, :3], state, chunk_size=4)
    second, end = delta_rule(q[:, 3:], k[:, 3:], w[:, 3:], log_decay[:, 3:], beta[:, 3:], middle, chunk_size=4)
    torch.testing.assert_close(torch.cat((first, second), dim=1), out)
    torch.testing.assert_close(end, last)


def test_step_is_one_token():
    q, k, w, log_decay, beta, state = inputs(length=1)
    out, last = delta_rule(q, k, w, log_decay, beta, state)
    step_out, step_state = delta_rule_step(q[:, 0], k[:, 0], w[:, 0], log_decay[:, 0], beta[:, 0], state)
    torch.testing.assert_close(step_out, out[:, 0])
    torch.testing.assert_close(step_state, last)


def test_leading_dims_are_any():
    for lead in ((), (2,), (2, 1, 3)):
        out, state = delta_rule(*inputs(lead=lead), chunk_size=4)
        assert out.shape == (*lead, 7, 4)
        assert state.shape == (*lead, 4, 3)


@pytest.mark.parametrize("log_alpha", [-math.inf, -1e30, -500.0, -1e-30])
def test_vanishing_decay_is_exact_and_finite(log_alpha):
    args = inputs(dtype=torch.float32, length=20)
    args[3][:, ::3] = log_alpha
    args = [x.requires_grad_() for x in args]
    out, state = delta_rule(*args, chunk_size=8)
    expected, expected_state = delta_rule_naive(*args)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.sum() + state.sum(), args)
    naive_grads = torch.autograd.grad(expected.sum() + expected_state.sum(), args)
    torch.testing.assert_close(grads, naive_grads, rtol=1e-3, atol=1e-4)


def test_ratios_do_not_lose_precision_after_a_steep_fall():
    """fp32: ratios behind a fall of e^-80 a token are as precise as without it."""
    tail = torch.full((32,), -0.01)
    alone = decay_ratios(tail)
    behind = decay_ratios(torch.cat((torch.full((32,), -80.0), tail)))
    assert torch.equal(behind[32:, 32:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_compute_in_float32(dtype):
    args = inputs(dtype=torch.float32)
    low = [x.to(dtype) for x in args]
    out, state = delta_rule(*low, chunk_size=4)
    expected, expected_state = delta_rule_naive(*(x.float() for x in low))
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(out, expected.to(dtype))
    naive_out, naive_state = delta_rule_naive(*low)
    assert naive_state.dtype == torch.float32
    torch.testing.assert_close(naive_out, out)


def test_autocast_does_not_reach_inside():
    args = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    outside = delta_rule(*args, chunk_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = delta_rule(*args, chunk_size=4)
        grads = torch.autograd.grad(inside[0].sum(), args)
    assert torch.equal(outside[0], inside[0])
    torch.testing.assert_close(grads, torch.autograd.grad(outside[0].sum(), args))


@pytest.mark.parametrize("variant", ["full", "no_beta"])
def test_compiles_without_graph_breaks(variant):
    args = [x.requires_grad_() for x in inputs(variant, dtype=torch.float32) if x is not None]
    names = ["q", "k", "w", "log_decay", *(["beta"] if variant == "full" else []), "initial_state"]

    def run(*values):
        out, state = delta_rule(**dict(zip(names, values)), chunk_size=4)
        return out.sum() + state.sin().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), run(*args))
    torch.testing.assert_close(torch.autograd.grad(compiled(*args), args), torch.autograd.grad(run(*args), args))


@pytest.mark.parametrize("with_decay", [True, False])
def test_gated_delta_rule_is_the_recurrence_with_its_own_names(with_decay):
    q, k, v, log_decay, rate, state = inputs()
    log_decay = log_decay if with_decay else None
    out, last = gated_delta_rule(q, k, v, log_decay, rate, state, chunk_size=4)
    for t in range(7):
        alpha = log_decay[:, t].exp() if with_decay else torch.ones(2, dtype=torch.float64)
        key, step = k[:, t].unsqueeze(-1), rate[:, t, None, None]
        state = alpha[:, None, None] * (state - step * state @ key @ key.mT) + step * v[:, t].unsqueeze(-1) @ key.mT
        torch.testing.assert_close(out[:, t], (state @ q[:, t].unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 3)}, "q: got shape"),
        ({"w": torch.zeros(2, 6, 4)}, "w: got shape"),
        ({"log_decay": torch.zeros(2, 7, 1)}, "log_decay: got shape"),
        ({"beta": torch.zeros(7)}, "beta: got shape"),
        ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state: got shape"),
        ({"k": torch.zeros(2, 0, 3)}, "empty sequence"),
        ({"k": torch.zeros(3)}, "k, w: got shapes"),
        ({"beta": torch.zeros(2, 7, dtype=torch.long)}, "beta: got dtype"),
        ({"k": torch.zeros(2, 7, 3, dtype=torch.float64)}, "k: got dtype"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 2.0}, "chunk_size"),
        ({"mode": "fast"}, "mode"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, w, log_decay, beta, state = inputs(dtype=torch.float32)
    good = {"q": q, "k": k, "w": w, "log_decay": log_decay, "beta": beta, "initial_state": state}
    with pytest.raises(InvalidArgument, match=message):
        delta_rule(**(good | change))
