"""Each update rule against the memory problem it solves (Nested Learning, section 4 and appendices B, C)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import grad, hessian

from everlearn.ops.newton_schulz import newton_schulz
from everlearn.ops.updates import (
    AdamState,
    DeepMomentumState,
    M3State,
    MomentumState,
    adam_step,
    deep_momentum_start,
    deep_momentum_step,
    delta_momentum_step,
    dgd_step,
    dgd_step_naive,
    m3_step,
    momentum_step,
    muon_step,
)

F64 = torch.float64
M3_OPTIONS = {"betas": (0.9, 0.99, 0.8), "alpha": 0.5, "frequency": 3, "eps": 1e-8}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def m3_start(*shape: int) -> M3State:
    return M3State(*(torch.zeros(*shape, dtype=F64) for _ in M3State._fields))


def run_m3(gradients: torch.Tensor, **options) -> tuple[list[torch.Tensor], M3State]:
    state, directions = m3_start(*gradients.shape[1:]), []
    for step, gradient in enumerate(gradients):
        direction, state = m3_step(gradient, state, step=step, **{**M3_OPTIONS, **options})
        directions.append(direction)
    return directions, state


# momentum


def test_momentum_is_a_gradient_step_of_the_dot_product_memory():
    m, g = randn(4, 5), randn(4, 5)
    inner = grad(lambda memory: -(memory * g).sum())
    direction, state = momentum_step(g, MomentumState(m), beta=0.9, eta=0.3)
    torch.testing.assert_close(state.momentum, 0.9 * m - 0.3 * inner(m), rtol=0, atol=1e-15)
    torch.testing.assert_close(direction, state.momentum, rtol=0, atol=0)


def test_momentum_equals_torch_sgd():
    p = torch.zeros(3, 4, dtype=F64, requires_grad=True)
    sgd = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    state, ours = MomentumState(torch.zeros(3, 4, dtype=F64)), torch.zeros(3, 4, dtype=F64)
    for g in randn(6, 3, 4):
        p.grad = g.clone()
        sgd.step()
        direction, state = momentum_step(g, state, beta=0.9)
        ours = ours - direction
    torch.testing.assert_close(p.detach(), ours, rtol=0, atol=1e-13)


# Adam


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.9), (0.9, 0.999), (0.5, 0.95)])
def test_adam_is_the_optimal_elementwise_l2_memory(beta1, beta2):
    """Minimise the memory's objective over the whole history by one exact Newton step found by autodiff."""
    history = randn(12, 6)
    state = AdamState(torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64), 0)
    for g in history:
        direction, state = adam_step(g, state, beta1=beta1, beta2=beta2, eps=0.0)
    ages = torch.arange(len(history) - 1, -1, -1, dtype=F64)
    w1, w2 = (beta**ages / (beta**ages).sum() for beta in (beta1, beta2))
    p = (w2[:, None] * history.square()).sum(0).sqrt()

    def objective(m):
        return (0.5 * w2[:, None] * (m * history).square() - w1[:, None] * m * history * p).sum()

    start = torch.zeros(6, dtype=F64)
    optimum = start - torch.linalg.solve(hessian(objective)(start), grad(objective)(start))
    torch.testing.assert_close(direction, optimum, rtol=1e-12, atol=1e-13)


def test_adam_with_equal_factors_is_weighted_least_squares():
    history = randn(10, 1)
    state = AdamState(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64), 0)
    for g in history:
        direction, state = adam_step(g, state, beta1=0.8, beta2=0.8, eps=0.0)
    weights = (0.8 ** torch.arange(9, -1, -1, dtype=F64))[:, None]
    p = ((weights * history.square()).sum() / weights.sum()).sqrt()
    fit = torch.linalg.lstsq(weights.sqrt() * history, weights.sqrt() * p).solution
    torch.testing.assert_close(direction, fit[:, 0], rtol=1e-12, atol=1e-13)


def test_adam_equals_torch_adam():
    p = torch.zeros(5, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    state, ours = AdamState(torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64), 0), torch.zeros(5, dtype=F64)
    for g in randn(8, 5):
        p.grad = g.clone()
        adam.step()
        direction, state = adam_step(g, state, beta1=0.9, beta2=0.99, eps=1e-8)
        ours = ours - direction
    torch.testing.assert_close(p.detach(), ours, rtol=0, atol=1e-12)


# delta momentum


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5)])
def test_delta_momentum_is_a_gradient_step_of_the_l2_memory(shape):
    m, g = randn(*shape), randn(*shape)
    eta = 0.3
    rate = eta / (1 + eta * g.square().sum())
    inner = grad(lambda memory: 0.5 * (memory @ g.mT - torch.eye(shape[0], dtype=F64)).square().sum())
    direction, _ = delta_momentum_step(g, MomentumState(m), beta=0.9, eta=eta, unit_keys=False)
    torch.testing.assert_close(direction, 0.9 * m - rate * inner(m), rtol=1e-12, atol=1e-13)
    k, p = g / g.norm(), g.norm()
    inner = grad(lambda memory: 0.5 * (memory @ k.mT - p * torch.eye(shape[0], dtype=F64)).square().sum())
    direction, _ = delta_momentum_step(g, MomentumState(m), beta=0.9, eta=eta)
    torch.testing.assert_close(direction, 0.9 * m - eta / (1 + eta) * inner(m), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_delta_momentum_of_a_rank_one_gradient_is_the_proximal_minimiser(norm):
    m, g = randn(1, 6), randn(1, 6)
    g, eta = g * norm / g.norm(), 0.7
    # min 1/2 |m g^T - 1|^2 + 1/(2 eta) |m - m_t|^2, solved directly
    system = g.mT @ g + torch.eye(6, dtype=F64) / eta
    solved = torch.linalg.solve(system, (g + m / eta).mT).mT
    direction, _ = delta_momentum_step(g, MomentumState(m), beta=1.0, eta=eta, unit_keys=False)
    torch.testing.assert_close(direction, solved, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_delta_momentum_with_unit_keys_scales_with_gradients_and_stays_bounded(size):
    state, unit = MomentumState(torch.zeros(3, 4, dtype=F64)), MomentumState(torch.zeros(3, 4, dtype=F64))
    for g in randn(200, 3, 4):
        direction, state = delta_momentum_step(size * g, state, beta=0.9, eta=5.0, eps=0.0)
        expected, unit = delta_momentum_step(g, unit, beta=0.9, eta=5.0, eps=0.0)
    torch.testing.assert_close(direction / size, expected, rtol=1e-9, atol=1e-12)
    assert expected.norm() < 40


def test_delta_momentum_forgets_only_along_the_gradient():
    m = torch.tensor([[3.0, 4.0]], dtype=F64)
    direction, _ = delta_momentum_step(torch.tensor([[1.0, 0.0]], dtype=F64), MomentumState(m), beta=1.0, eta=1e12)
    torch.testing.assert_close(direction, torch.tensor([[1.0, 4.0]], dtype=F64), rtol=0, atol=1e-9)


# deep momentum


def random_memory(hidden: int, rows: int, columns: int) -> DeepMomentumState:
    start = deep_momentum_start(torch.zeros(rows, columns, dtype=F64), hidden)
    return start._replace(output=randn(hidden, rows, columns))


def test_deep_momentum_writes_are_gradient_steps_of_its_inner_loss():
    g, state, eta = randn(3, 5), random_memory(4, 3, 5), 0.05
    key = g / g.norm()

    def inner(output, left, right):
        z = 15**0.5 * torch.einsum("ro,oi,ri->r", left, key, right)
        h = torch.nn.functional.softplus(z)
        return -((h / h.norm())[:, None, None] * output * g).sum()

    d_output, d_left, d_right = grad(inner, argnums=(0, 1, 2))(*state)
    _, after = deep_momentum_step(g, state, beta=0.9, eta=eta)
    unit = torch.nn.functional.normalize
    scale = eta / g.norm() ** 2
    torch.testing.assert_close(after.output, 0.9 * state.output - d_output, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after.left, unit(state.left - scale * d_left, dim=-1), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after.right, unit(state.right - scale * d_right, dim=-1), rtol=1e-12, atol=1e-13)


def test_deep_momentum_with_one_hidden_unit_is_momentum():
    deep = deep_momentum_start(torch.zeros(3, 5, dtype=F64), 1)
    linear = MomentumState(torch.zeros(3, 5, dtype=F64))
    for g in randn(6, 3, 5):
        ours, deep = deep_momentum_step(g, deep, beta=0.9, eta=0.1)
        theirs, linear = momentum_step(g, linear, beta=0.9)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_deep_momentum_recalls_gradients_like_the_present_one():
    """Without training of its features, the answer is sum_s b^(t-s) <h_s, h_t> G_s."""
    state, gradients, hidden = deep_momentum_start(torch.zeros(3, 5, dtype=F64), 4), randn(5, 3, 5), []
    for g in gradients:
        z = 15**0.5 * torch.einsum("ro,oi,ri->r", state.left, g / g.norm(), state.right)
        h = torch.nn.functional.softplus(z)
        hidden.append(h / h.norm())
        direction, state = deep_momentum_step(g, state, beta=0.9, eta=0.0)
    weights = [0.9 ** (4 - s) * (hidden[s] @ hidden[4]) for s in range(5)]
    torch.testing.assert_close(direction, sum(w * g for w, g in zip(weights, gradients)), rtol=1e-12, atol=1e-13)


def test_deep_momentum_stays_bounded_at_a_large_inner_rate():
    state = deep_momentum_start(torch.zeros(3, 5, dtype=F64), 4)
    for g in randn(300, 3, 5):
        direction, state = deep_momentum_step(g, state, beta=0.9, eta=1e3)
    assert torch.isfinite(direction).all()
    assert state.output.norm() < 10 * 15**0.5 * 3


# Muon


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_muon_is_newton_schulz_of_linear_momentum(shape):
    state, linear = MomentumState(torch.zeros(*shape, dtype=F64)), MomentumState(torch.zeros(*shape, dtype=F64))
    for g in randn(5, *shape):
        direction, state = muon_step(g, state, beta=0.9, nesterov=False)
        momentum, linear = momentum_step(g, linear, beta=0.9, eta=0.1)
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(direction, scale * newton_schulz(momentum), rtol=1e-10, atol=1e-12)


def test_muon_with_nesterov_looks_ahead():
    g, m = randn(4, 6), randn(4, 6)
    direction, state = muon_step(g, MomentumState(m), beta=0.9)
    torch.testing.assert_close(state.momentum, 0.9 * m + 0.1 * g, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(direction, newton_schulz(0.9 * state.momentum + 0.1 * g), rtol=1e-10, atol=1e-12)


# M3


@pytest.mark.parametrize("form", ["decayed", "printed"])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_m3_without_slow_weight_is_its_fast_branch(form, scale):
    gradients = randn(8, 6, 4)
    directions, _ = run_m3(gradients, alpha=0.0, form=form, scale=scale)
    keep1, gain1, keep2, gain2 = (0.9, 0.1, 0.99, 0.01) if form == "decayed" else (1.0, 0.9, 1.0, 0.99)
    fast, second = torch.zeros(6, 4, dtype=F64), torch.zeros(6, 4, dtype=F64)
    for step, (g, direction) in enumerate(zip(gradients, directions)):
        fast, second = keep1 * fast + gain1 * g, keep2 * second + gain2 * g**2
        unseen = 0.99 ** (step + 1) if form == "decayed" else 0.0
        corrected, shape = second / (1 - unseen), 1.0
        if scale == "relative":  # an average that starts from the mean over the matrix instead of zero
            corrected, shape = second / corrected.mean() + unseen, (6 / 4) ** 0.5
        expected = shape * newton_schulz(fast) / (corrected.sqrt() + 1e-8)
        torch.testing.assert_close(direction, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["decayed", "printed"])
def test_m3_is_algorithm_1_line_by_line(form):
    """Two nested loops as printed, absolute denominator."""
    f, alpha, gradients = 3, 0.5, randn(10, 5, 4)
    b1, b2, b3 = M3_OPTIONS["betas"]

    def remember(memory, value, beta):
        return beta * memory + (1 - beta) * value if form == "decayed" else memory + beta * value

    m1 = m2 = v = torch.zeros(5, 4, dtype=F64)
    expected = []
    for k in range(4):
        m2 = remember(m2, gradients[(k - 1) * f : k * f].sum(0), b3) if k > 0 else m2
        o2 = newton_schulz(m2)
        for t in range(k * f, min((k + 1) * f, len(gradients))):
            g = gradients[t]
            m1, v = remember(m1, g, b1), remember(v, g**2, b2)
            corrected = v / (1 - b2 ** (t + 1)) if form == "decayed" else v
            expected.append((newton_schulz(m1) + alpha * o2) / (corrected.sqrt() + 1e-8))
    directions, _ = run_m3(gradients, form=form, scale="absolute")
    for ours, theirs in zip(directions, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_m3_relative_scale_has_mean_square_one_and_starts_uniform():
    """The first direction is Muon's; the denominator's mean square over the matrix is 1 at every step."""
    gradients = randn(5, 4, 6)
    directions, _ = run_m3(gradients, alpha=0.0, betas=(0.9, 0.999, 0.9), eps=0.0)
    fast = torch.zeros(4, 6, dtype=F64)
    for step, (g, direction) in enumerate(zip(gradients, directions)):
        fast = 0.9 * fast + 0.1 * g
        spread = newton_schulz(fast) / direction
        torch.testing.assert_close(spread.square().mean(), torch.tensor(1.0, dtype=F64), rtol=1e-6, atol=0)
        if step == 0:
            torch.testing.assert_close(direction, newton_schulz(fast), rtol=1e-2, atol=0)


def test_m3_slow_memory_changes_only_every_frequency_steps():
    gradients = randn(7, 4, 4)
    slow = [run_m3(gradients[:n])[1].slow for n in range(1, 8)]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(slow)]
    assert changed == [False, False, True, False, False, True]


def test_m3_relative_scale_ignores_the_size_of_the_loss():
    gradients = randn(8, 4, 6)
    big, _ = run_m3(1e4 * gradients)
    small, _ = run_m3(gradients)
    torch.testing.assert_close(big[-1], small[-1], rtol=1e-6, atol=1e-9)
    absolute, _ = run_m3(1e4 * gradients, scale="absolute")
    torch.testing.assert_close(1e4 * absolute[-1], run_m3(gradients, scale="absolute")[0][-1], rtol=1e-6, atol=1e-9)


# delta gradient descent


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("eta", [0.01, 1.0, 100.0])
def test_dgd_of_one_token_is_the_closed_form_and_the_proximal_minimiser(norm, eta):
    w, x, g = randn(3, 5), randn(5), randn(3)
    x = norm * x / x.norm()
    ours = dgd_step(w, torch.outer(g, x), torch.outer(x, x), eta=eta)
    rate = eta / (1 + eta * norm**2)
    closed = w @ (torch.eye(5, dtype=F64) - rate * torch.outer(x, x)) - rate * torch.outer(g, x)
    torch.testing.assert_close(ours, closed, rtol=1e-8, atol=1e-8)
    # the stationarity condition of 1/2 |W x + g|^2 + 1/(2 eta) |W - W_t|^2, solved directly
    system = torch.outer(x, x) + torch.eye(5, dtype=F64) / eta
    solved = torch.linalg.solve(system, (w / eta - torch.outer(g, x)).mT).mT
    torch.testing.assert_close(ours, solved, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_dgd_of_a_batch_equals_least_squares(tokens):
    w, x, g = randn(3, 6), 3 * randn(tokens, 6), randn(tokens, 3)
    ours = dgd_step(w, g.mT @ x / tokens, x.mT @ x / tokens, eta=0.7)
    torch.testing.assert_close(ours, dgd_step_naive(w, x, g, eta=0.7), rtol=1e-9, atol=1e-10)


def test_dgd_minimises_the_proximal_objective():
    w, x, g, eta = randn(2, 4), randn(5, 4), randn(5, 2), 0.4

    def objective(weight):
        return 0.5 * (x @ weight.mT + g).square().sum() / 5 + (weight - w).square().sum() / (2 * eta)

    best = dgd_step(w, g.mT @ x / 5, x.mT @ x / 5, eta=eta)
    torch.testing.assert_close(grad(objective)(best), torch.zeros(2, 4, dtype=F64), rtol=0, atol=1e-12)


def test_dgd_settles_at_half_the_target_of_a_squared_error():
    x, w, target = randn(40, 4), randn(3, 4), randn(3, 4)
    gram = x.mT @ x / 40
    for _ in range(400):
        w = dgd_step(w, (w - target) @ gram, gram, eta=0.5)
    torch.testing.assert_close(w, target / 2, rtol=1e-8, atol=1e-10)


def test_dgd_tends_to_gradient_descent_at_a_small_rate():
    w, x, g = randn(3, 4), randn(4), randn(3)
    step = (dgd_step(w, torch.outer(g, x), 0 * torch.outer(x, x), eta=1e-3) - w) / -1e-3
    torch.testing.assert_close(step, torch.outer(g, x), rtol=1e-9, atol=1e-11)


# batches


@pytest.mark.parametrize("rule", ["momentum", "delta", "deep", "muon", "m3"])
def test_stacked_matrices_step_as_they_would_alone(rule):
    gradients = randn(3, 4, 6)
    steps = {
        "momentum": (lambda g, s: momentum_step(g, s, beta=0.9), MomentumState(randn(3, 4, 6))),
        "delta": (lambda g, s: delta_momentum_step(g, s, beta=0.9, eta=0.5), MomentumState(randn(3, 4, 6))),
        "deep": (lambda g, s: deep_momentum_step(g, s, beta=0.9, eta=0.1), deep_momentum_start(gradients, 2)),
        "muon": (lambda g, s: muon_step(g, s, beta=0.9), MomentumState(randn(3, 4, 6))),
        "m3": (lambda g, s: m3_step(g, s, step=4, **M3_OPTIONS), M3State(*randn(5, 3, 4, 6).square())),
    }
    step, state = steps[rule]
    direction, after = step(gradients, state)
    for i in range(3):
        alone, alone_after = step(gradients[i], type(state)(*(t[i] for t in state)))
        for ours, theirs in zip((direction, *after), (alone, *alone_after)):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-9, atol=1e-11)
