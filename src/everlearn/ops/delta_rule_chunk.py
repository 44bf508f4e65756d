r"""Chunk form of the delta rule: matrix products within a chunk, a short loop over chunks, backward written by hand.

Inside a chunk of C tokens (counted from 1), with ``F[t, s] = prod_{s < j <= t} alpha_j`` (:func:`decay_ratios`) and
``u_t = w_t - beta_t S_{t-1} k_t``:

    (I + diag(beta) (D . K K^T)) U = W - diag(beta c_prev) K S_0^T         D = F[:-1, 1:],  c_prev = F[:-1, 0]
    O   = diag(c) Q S_0^T + (E . Q K^T) U                                  E = F[1:, 1:],   c = F[1:, 0]
    S_C = c_C S_0 + (diag(f) U)^T K                                        f = F[C, 1:],    c_C = F[C, 0]

``D`` is strictly and ``E`` weakly lower triangular because ``F`` is. Decays are only ever summed and exponentiated,
never divided or subtracted, so ``alpha -> 0`` (``log alpha = -inf``) is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F_
from torch import Tensor

__all__ = ["advance", "chunked_delta_rule", "decay_ratios", "read", "solve_writes"]


def decay_ratios(log_decay: Tensor) -> Tensor:
    """``F[t, s] = prod_{s < j <= t} alpha_j`` for ``t >= s``, else 0; ``[..., C]`` to ``[..., C + 1, C + 1]``."""
    steps = F_.pad(log_decay, (1, 0)).unsqueeze(-1)
    size = steps.shape[-2]
    index = torch.arange(size, device=log_decay.device)
    ahead = index[:, None] > index[None, :]
    sums = torch.where(ahead, steps, steps.new_zeros(())).cumsum(dim=-2)
    return torch.where(index[:, None] >= index[None, :], sums.exp(), sums.new_zeros(()))


def solve_writes(gram: Tensor, beta: Tensor, ratios: Tensor, rhs: Tensor) -> Tensor:
    """Solve ``(I + diag(beta) (D . K K^T)) U = rhs``, ``gram`` is ``K K^T [..., C, C]``, ``rhs`` ``[..., C, V]``."""
    system = beta.unsqueeze(-1) * (ratios[..., :-1, 1:] * gram)
    return torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)


def advance(state: Tensor, k: Tensor, u: Tensor, ratios: Tensor) -> Tensor:
    """``S_C = c_C S_0 + (diag(f) U)^T K``: the state ``[..., V, K]`` after a chunk."""
    weighted = ratios[..., -1, 1:].unsqueeze(-1) * k  # keys are shorter than writes where memories are stacked
    return ratios[..., -1:, :1] * state + u.mT @ weighted


def read(q: Tensor, k: Tensor, u: Tensor, ratios: Tensor, from_start: Tensor) -> Tensor:
    """``O = diag(c) Q S_0^T + (E . Q K^T) U`` with ``from_start = Q S_0^T`` ``[..., C, V]`` given."""
    return ratios[..., 1:, :1] * from_start + (ratios[..., 1:, 1:] * (q @ k.mT)) @ u


def chunked_delta_rule(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    *,
    chunk_size: int,
) -> tuple[Tensor | None, Tensor]:
    """Chunk form on checked inputs of one dtype; arguments and returns of ``delta_rule``."""
    lead, (length, k_dim), v_dim = k.shape[:-2], k.shape[-2:], w.shape[-1]
    chunks = -(-length // chunk_size)
    missing = chunks * chunk_size - length

    def vectors(x: Tensor) -> Tensor:
        return F_.pad(x, (0, 0, 0, missing)).reshape(-1, chunks, chunk_size, x.shape[-1])

    def scalars(x: Tensor) -> Tensor:
        return F_.pad(x, (0, missing)).reshape(-1, chunks, chunk_size)

    if log_decay is None:
        log_decay = k.new_zeros(*lead, length)
    if state is None:
        state = k.new_zeros(*lead, v_dim, k_dim)
    out: Tensor | None
    out, last, _ = _DeltaRule.apply(  # type: ignore[assignment]
        None if q is None else vectors(q),
        vectors(k),
        vectors(w),
        scalars(log_decay),
        None if beta is None else scalars(beta),
        state.reshape(-1, v_dim, k_dim),
    )
    if out is not None:
        out = out.reshape(*lead, chunks * chunk_size, v_dim)[..., :length, :]
    return out, last.reshape(*lead, v_dim, k_dim)


def _forward(
    q: Tensor | None, k: Tensor, w: Tensor, log_decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Outputs, last state and the states ``[N, n, V, K]`` at the starts of the ``n`` chunks, all differentiable."""
    ratios = decay_ratios(log_decay)
    free = w  # what each token writes beyond what it erases of the chunk's start
    erase = None  # rows that meet the chunk's start: U = free - erase S_0^T
    if beta is not None:
        decayed = (beta * ratios[..., :-1, 0]).unsqueeze(-1) * k
        both = solve_writes(k @ k.mT, beta, ratios, torch.cat((w, decayed), dim=-1))
        free, erase = both.split((w.shape[-1], k.shape[-1]), dim=-1)
    starts, writes = [], []
    for i in range(k.shape[1]):
        starts.append(state)
        u = free[:, i] if erase is None else free[:, i] - erase[:, i] @ state.mT
        writes.append(u)
        state = advance(state, k[:, i], u, ratios[:, i])
    start = torch.stack(starts, dim=1)
    out = None if q is None else read(q, k, torch.stack(writes, dim=1), ratios, q @ start.mT)
    return out, state, start


class _DeltaRule(torch.autograd.Function):
    """Keeps its inputs and the state at chunk starts; everything inside a chunk is computed again in the backward.

    The backward is made of differentiable operations, so second derivatives, ``torch.func.grad`` and ``vmap`` work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor | None, k: Tensor, w: Tensor, log_decay: Tensor, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        return _forward(q, k, w, log_decay, beta, state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, w, log_decay, beta, state, start = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            if torch.is_grad_enabled():  # to be differentiated again: the starts depend on the inputs
                start = _forward(None, k, w, log_decay, beta, state)[2]
            return _chunk_backward(q, k, w, log_decay, beta, start, grads[0], grads[1])


def _chunk_backward(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    start: Tensor,
    d_out: Tensor | None,
    d_last: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Reverse of :func:`_forward`; ``d_x`` is the gradient of the loss by ``x``, shapes as there."""
    ratios = decay_ratios(log_decay)
    gram = k @ k.mT
    k_start = k @ start.mT  # K S_0^T [N, n, C, V]
    keep_prev, keep, to_end = ratios[..., :-1, 0], ratios[..., 1:, 0], ratios[..., -1, 1:]
    u = w
    if beta is not None:
        u = solve_writes(gram, beta, ratios, w - (beta * keep_prev).unsqueeze(-1) * k_start)

    d_q = None
    d_ratios, d_k = torch.zeros_like(ratios), torch.zeros_like(k)
    d_u, d_start = torch.zeros_like(w), torch.zeros_like(start)  # from the reads only, for now
    if q is not None and d_out is not None:
        attention = ratios[..., 1:, 1:]
        scores = q @ k.mT
        d_weights = d_out @ u.mT
        d_scores = attention * d_weights
        from_start = d_out @ start  # (dO S_0) [N, n, C, K]
        d_q = d_scores @ k + keep.unsqueeze(-1) * from_start
        d_k = d_scores.mT @ q
        d_u = (attention * scores).mT @ d_out
        d_start = (keep.unsqueeze(-1) * d_out).mT @ q
        d_rows = torch.cat(((q * from_start).sum(-1, keepdim=True), scores * d_weights), dim=-1)
        d_ratios = F_.pad(d_rows, (0, 0, 1, 0))

    d_rhs, d_ends, d_state = _backward_over_chunks(k, gram, beta, ratios, d_u, d_start, d_last)
    # S_C = c_C S_0 + (diag(f) U)^T K
    k_ends = k @ d_ends.mT
    d_rows = torch.cat(((d_ends * start).sum((-1, -2)).unsqueeze(-1), (u * k_ends).sum(-1)), dim=-1)
    d_ratios = d_ratios + F_.pad(d_rows.unsqueeze(-2), (0, 0, k.shape[-2], 0))
    d_k = d_k + (to_end.unsqueeze(-1) * u) @ d_ends
    d_beta = None
    if beta is not None:
        # (I + diag(beta) D . K K^T) U = W - diag(beta c_prev) K S_0^T
        d_system = -(d_rhs @ u.mT)
        decayed = ratios[..., :-1, 1:]
        d_erased = -(d_rhs * k_start).sum(-1)
        d_beta = (d_system * decayed * gram).sum(-1) + keep_prev * d_erased
        d_rows = torch.cat(((beta * d_erased).unsqueeze(-1), beta.unsqueeze(-1) * d_system * gram), dim=-1)
        d_ratios = d_ratios + F_.pad(d_rows, (0, 0, 0, 1))
        d_gram = beta.unsqueeze(-1) * d_system * decayed
        d_k = d_k + (d_gram + d_gram.mT) @ k - (beta * keep_prev).unsqueeze(-1) * (d_rhs @ start)
    return d_q, d_k, d_rhs, _log_decay_gradient(ratios * d_ratios), d_beta, d_state


def _backward_over_chunks(
    k: Tensor,
    gram: Tensor,
    beta: Tensor | None,
    ratios: Tensor,
    d_u: Tensor,
    d_start: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by right-hand sides ``[N, n, C, V]``, by every chunk's end state ``[N, n, V, K]``, and by ``S_0``."""
    weighted = ratios[..., -1, 1:].unsqueeze(-1) * k
    decayed = None
    if beta is not None:
        decayed = (beta * ratios[..., :-1, 0]).unsqueeze(-1) * k
        system = beta.unsqueeze(-1) * (ratios[..., :-1, 1:] * gram)
        both = torch.linalg.solve_triangular(
            system.mT, torch.cat((d_u, weighted), dim=-1), upper=True, unitriangular=True
        )
        d_u, weighted = both.split((d_u.shape[-1], k.shape[-1]), dim=-1)
    d_state = torch.zeros_like(d_start[:, 0]) if d_last is None else d_last
    d_rhs, d_ends = [], []
    for i in reversed(range(k.shape[1])):
        d_ends.append(d_state)
        d_rhs.append(d_u[:, i] + weighted[:, i] @ d_state.mT)
        d_state = ratios[:, i, -1:, :1] * d_state + d_start[:, i]
        if decayed is not None:
            d_state = d_state - d_rhs[-1].mT @ decayed[:, i]
    return torch.stack(d_rhs[::-1], dim=1), torch.stack(d_ends[::-1], dim=1), d_state


def _log_decay_gradient(d_sums: Tensor) -> Tensor:
    """``d log alpha_j = sum_{t >= j > s} d_sums[t, s]`` from the gradient by the exponents of :func:`decay_ratios`."""
    from_end = d_sums.flip(-2).cumsum(-2).flip(-2)
    return from_end.tril(-1).sum(-1)[..., 1:]
