"""Update rules as pure steps: optimisers are associative memories of gradients (*Nested Learning*, section 4).

Every step takes a gradient and a state and returns a direction and the next state; the caller moves the weight by
``W <- W - lr * direction``. Gradients are ``[*batch, out, in]``: many matrices of one shape step in one call.

Legend: G gradient, m momentum, b retention (beta), eta the memory's own rate, x the input of a linear map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.ops.newton_schulz import MUON_STEPS, newton_schulz

if TYPE_CHECKING:
    from jaxtyping import Float

M3_FORMS = ("decayed", "printed")
M3_SCALES = ("relative", "absolute")


class MomentumState(NamedTuple):
    """``momentum`` ``[*batch, out, in]``: a linear memory of gradients."""

    momentum: Tensor


class AdamState(NamedTuple):
    """``first`` and ``second`` moments, and ``step``, the number of gradients seen."""

    first: Tensor
    second: Tensor
    step: int


class DeepMomentumState(NamedTuple):
    """A two-layer memory: ``output`` ``[*batch, r, out, in]`` and the factors ``left`` ``[*batch, r, out]``,
    ``right`` ``[*batch, r, in]`` of its first layer."""

    output: Tensor
    left: Tensor
    right: Tensor


class M3State(NamedTuple):
    """``fast`` and ``slow`` momentum, ``second`` moment, gradients ``pending`` for the slow memory, and its last
    orthogonalised ``slow_direction``; all ``[*batch, out, in]``."""

    fast: Tensor
    slow: Tensor
    second: Tensor
    pending: Tensor
    slow_direction: Tensor


def momentum_step(
    gradient: Float[Tensor, "*batch out in"], state: MomentumState, *, beta: float, eta: float = 1.0
) -> tuple[Tensor, MomentumState]:
    """Linear momentum, the memory with a dot-product objective (Eq. 33-34).

    ``m' = b m - eta d/dm (-<m, G>) = b m + eta G``.
    """
    momentum = beta * state.momentum + eta * gradient
    return momentum, MomentumState(momentum)


def adam_step(
    gradient: Float[Tensor, "*batch out in"], state: AdamState, *, beta1: float, beta2: float, eps: float
) -> tuple[Tensor, AdamState]:
    """Adam, the optimal element-wise L2 memory of gradients (App. B).

    The memory maps each past gradient ``g_i`` to the root mean square ``p`` of them all, with weights that fade:
    ``argmin_m  1/2 m^2 E2[g^2] - m p E1[g]`` is ``m = E1[g] / p``; ``E1, E2`` are the bias-corrected averages and
    ``p = sqrt(E2[g^2])``. With ``beta1 = beta2`` this is the weighted regression ``E[(m g_i - p)^2]``.
    """
    step = state.step + 1
    first = torch.lerp(state.first, gradient, 1 - beta1)
    second = torch.lerp(state.second, gradient.square(), 1 - beta2)
    p = (second / (1 - beta2**step)).sqrt()
    return first / (1 - beta1**step) / (p + eps), AdamState(first, second, step)


def delta_momentum_step(
    gradient: Float[Tensor, "*batch out in"],
    state: MomentumState,
    *,
    beta: float,
    eta: float,
    unit_keys: bool = True,
    eps: float = 1e-12,
) -> tuple[Tensor, MomentumState]:
    """Delta momentum, the memory with an L2 objective (Eq. 48-49): its decay depends on the gradient.

    The key K is the gradient and the target P is the identity, times ``p``:

        m' = b m - eta' (m K^T - p I) K = m (b I - eta' K^T K) + eta' p K,     eta' = eta / (1 + eta |K|^2)

    As in delta gradient descent the norm stays in ``eta'``: for a gradient of rank one and ``b = 1`` this is the exact
    proximal minimiser, and the decay is a contraction for a gradient of any size.

    Args:
        gradient: G.
        state: the momentum.
        beta: retention b.
        eta: the memory's rate.
        unit_keys: ``K = G / |G|`` and ``p = |G|``, so that the momentum has the scale of gradients and the rule none of
            its own; otherwise ``K = G`` and ``p = 1``, the equation to the letter.
        eps: norms below this are raised to it.
    """
    square = gradient.square().sum(dim=(-2, -1), keepdim=True)
    norm = square.sqrt().clamp(min=eps)
    key = gradient / norm if unit_keys else gradient
    rate = eta / (1 + eta) if unit_keys else eta / (1 + eta * square)
    recalled = _times_gram(state.momentum, key)
    momentum = beta * state.momentum + rate * (gradient - recalled)
    return momentum, MomentumState(momentum)


def deep_momentum_step(
    gradient: Float[Tensor, "*batch out in"], state: DeepMomentumState, *, beta: float, eta: float, eps: float = 1e-12
) -> tuple[Tensor, DeepMomentumState]:
    """Deep momentum (DMGD, Eq. 50): momentum is a two-layer memory trained on gradients by a dot-product objective.

        z_i = sqrt(out in) <a_i b_i^T, G / |G|>,   h = s(z) / |s(z)|,   M(G) = sum_i h_i W_i,    s = softplus
        loss(M) = -<M(G), G>;   W' = b W - d loss / dW;   (a, b)' = unit(a, b - eta d loss / d(a, b) / |G|^2)

    Unrolled, the direction is ``sum_s b^(t-s) <h_s, h_t> G_s``: momentum whose weights depend on how much the past
    gradient resembles the present one. One hidden unit is linear momentum. Unit factors keep the memory bounded.

    Args:
        gradient: G.
        state: the memory before the write; see :func:`deep_momentum_start`.
        beta: retention b of the output layer.
        eta: rate of the first layer.
        eps: norms below this are raised to it.

    Returns:
        The memory's answer to G after the write, and the next state.
    """
    norm = gradient.square().sum(dim=(-2, -1), keepdim=True).sqrt().clamp(min=eps)
    key = gradient / norm
    hidden, slope = _hidden(key, state)
    write = torch.einsum("...r,...oi->...roi", hidden, gradient)
    output = beta * state.output + write
    # d(-loss)/dz, in units of |G|^2, through the normalised activation
    recall = torch.einsum("...roi,...oi->...r", state.output, key) / norm.squeeze(-1)
    error = (recall - hidden * (recall * hidden).sum(-1, keepdim=True)) * slope
    scale = eta * (gradient.shape[-2] * gradient.shape[-1]) ** 0.5
    left = state.left + scale * error.unsqueeze(-1) * torch.einsum("...oi,...ri->...ro", key, state.right)
    right = state.right + scale * error.unsqueeze(-1) * torch.einsum("...oi,...ro->...ri", key, state.left)
    after = DeepMomentumState(output, F.normalize(left, dim=-1), F.normalize(right, dim=-1))
    return torch.einsum("...r,...roi->...oi", _hidden(key, after)[0], output), after


def deep_momentum_start(like: Float[Tensor, "*batch out in"], hidden_size: int) -> DeepMomentumState:
    """Return an empty deep memory for gradients like ``like``: zero output, fixed random unit factors."""
    *batch, rows, columns = like.shape
    generator = torch.Generator().manual_seed(hidden_size)
    left = torch.randn(hidden_size, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(hidden_size, columns, generator=generator, dtype=torch.float64)
    left, right = (F.normalize(factor, dim=-1).to(like).expand(*batch, -1, -1) for factor in (left, right))
    return DeepMomentumState(like.new_zeros(*batch, hidden_size, rows, columns), left.clone(), right.clone())


def muon_step(
    gradient: Float[Tensor, "*batch out in"],
    state: MomentumState,
    *,
    beta: float,
    nesterov: bool = True,
    steps: int = MUON_STEPS,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, MomentumState]:
    """Muon: the Newton-Schulz output of linear momentum, scaled by ``sqrt(max(1, out / in))`` (Jordan et al. 2024).

    ``m' = b m + (1 - b) G``; orthogonalise ``b m' + (1 - b) G`` with Nesterov's look-ahead, else ``m'``.
    ``steps`` and ``dtype`` are those of :func:`everlearn.ops.newton_schulz.newton_schulz`.
    """
    momentum = torch.lerp(state.momentum, gradient, 1 - beta)
    ahead = torch.lerp(gradient, momentum, beta) if nesterov else momentum
    scale = max(1.0, gradient.shape[-2] / gradient.shape[-1]) ** 0.5
    return scale * newton_schulz(ahead, steps=steps, dtype=dtype), MomentumState(momentum)


def m3_step(
    gradient: Float[Tensor, "*batch out in"],
    state: M3State,
    *,
    step: int,
    betas: tuple[float, float, float],
    alpha: float,
    frequency: int,
    eps: float,
    form: str = "decayed",
    scale: str = "relative",
    steps: int = MUON_STEPS,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, M3State]:
    """Multi-scale momentum Muon (Algorithm 1): a fast memory each step, a slow one every ``frequency`` steps.

        M1 <- b1 M1 + (1 - b1) G        V <- b2 V + (1 - b2) G^2        pending <- pending + G
        every f steps, before the above: M2 <- b3 M2 + (1 - b3) pending;  O2 = NS(M2);  pending <- 0
        direction = (NS(M1) + alpha O2) / (D + eps)

    Args:
        gradient: G.
        state: the five tensors.
        step: gradients seen before this one.
        betas: b1 (fast), b2 (second moment), b3 (slow).
        alpha: weight of the slow memory.
        frequency: f.
        eps: added to the denominator.
        form: ``"decayed"`` as above, or ``"printed"``: ``M + b G`` as Algorithm 1 prints it, without decay.
        scale: ``"absolute"``: ``D = sqrt(V)`` as printed (bias-corrected where V decays): the step grows as gradients
            shrink. ``"relative"``: ``D^2 = V / mean(V) + b2^t``, with the bias-corrected mean over the matrix, so that
            an empty V counts as uniform; times ``sqrt(max(1, out / in))``, so that a rate means what it means to Muon.
        steps: Newton-Schulz iterations.
        dtype: their precision; by default that of the gradient.
    """
    fast_beta, second_beta, slow_beta = betas
    slow, pending, slow_direction = state.slow, state.pending, state.slow_direction
    if step > 0 and step % frequency == 0:
        slow = _remember(slow, pending, slow_beta, form)
        slow_direction = newton_schulz(slow, steps=steps, dtype=dtype)
        pending = torch.zeros_like(pending)
    fast = _remember(state.fast, gradient, fast_beta, form)
    second = _remember(state.second, gradient.square(), second_beta, form)
    direction = torch.add(newton_schulz(fast, steps=steps, dtype=dtype), slow_direction, alpha=alpha)
    unseen = second_beta ** (step + 1) if form == "decayed" else 0.0
    if scale == "absolute":
        spread = (second / (1 - unseen)).sqrt()
    else:
        mean = second.mean(dim=(-2, -1), keepdim=True) / (1 - unseen)
        spread = (second / mean.clamp(min=torch.finfo(mean.dtype).tiny) + unseen).sqrt()
        direction = direction * max(1.0, gradient.shape[-2] / gradient.shape[-1]) ** 0.5
    return direction / (spread + eps), M3State(fast, slow, second, pending + gradient, slow_direction)


def dgd_step(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    eta: float,
) -> Float[Tensor, "out in"]:
    """Delta gradient descent (Eq. 56-57, App. C) for the tokens of one batch: the next weight of a linear map.

        W' = argmin_W  1/2 E|W x + g|^2 + 1/(2 eta) |W - W_t|^2 = (W_t - eta E[g x^T]) (I + eta E[x x^T])^-1

    For one token this is ``W_t (I - eta' x x^T) - eta' g x^T`` with ``eta' = eta / (1 + eta |x|^2)``, exact for any
    ``|x|``; no rate makes it diverge. It settles where ``E[g x^T] = -W E[x x^T]``, at a minimum of
    ``loss + 1/2 E|W x|^2``: of a squared error, with ``W x`` at half the target.

    Args:
        weight: W_t.
        gradient: ``E[g x^T]``, the gradient of the mean loss.
        gram: ``E[x x^T]``.
        eta: the rate.
    """
    system = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).add(gram, alpha=eta)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(torch.sub(weight, gradient, alpha=eta).mT.to(gram.dtype), factor).mT.to(weight.dtype)


def dgd_step_naive(
    weight: Float[Tensor, "out in"], inputs: Float[Tensor, "n in"], errors: Float[Tensor, "n out"], *, eta: float
) -> Float[Tensor, "out in"]:
    """The twin of :func:`dgd_step`: its least-squares problem written out row by row and solved directly.

    ``errors`` are ``g = d loss_n / d y_n`` of each token's own loss.
    """
    count, size = inputs.shape
    identity = torch.eye(size, dtype=weight.dtype, device=weight.device)
    rows = torch.cat([inputs * count**-0.5, identity * eta**-0.5])
    values = torch.cat([-errors * count**-0.5, weight.mT * eta**-0.5])
    return torch.linalg.lstsq(rows, values).solution.mT


def _times_gram(momentum: Tensor, key: Tensor) -> Tensor:
    """``m K^T K`` in the cheaper order."""
    if key.shape[-2] <= key.shape[-1]:
        return (momentum @ key.mT) @ key
    return momentum @ (key.mT @ key)


def _hidden(key: Tensor, state: DeepMomentumState) -> tuple[Tensor, Tensor]:
    """The normalised activations ``h`` and the derivative of ``softplus`` over its norm; both ``[*batch, r]``."""
    projected = torch.einsum("...oi,...ri->...ro", key, state.right)
    z = (key.shape[-2] * key.shape[-1]) ** 0.5 * (projected * state.left).sum(-1)
    activation = F.softplus(z)
    norm = torch.linalg.vector_norm(activation, dim=-1, keepdim=True)
    return activation / norm, torch.sigmoid(z) / norm


def _remember(memory: Tensor, value: Tensor, beta: float, form: str) -> Tensor:
    return torch.lerp(memory, value, 1 - beta) if form == "decayed" else torch.add(memory, value, alpha=beta)
