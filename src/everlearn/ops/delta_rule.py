r"""The delta rule: one recurrence for every matrix memory (nested-learning.md, section 2).

    S_t = S_{t-1} (alpha_t I - beta_t k_t k_t^T) + w_t k_t^T          o_t = S_t q_t

Legend: ``S`` state ``[V, K]``, ``q``, ``k`` query and key ``[K]``, ``w`` write vector ``[V]``, ``beta`` erase strength,
``alpha = exp(log_decay)`` in [0, 1]. Linear attention is ``beta = 0, alpha = 1``; RetNet a constant ``alpha``; DeltaNet
``alpha = 1, w = beta v``; Gated DeltaNet ``beta = alpha b, w = b v``; a DGD memory write ``beta = eta', w = -eta' g``.

:func:`delta_rule` is the entry point; :func:`delta_rule_naive` is the reference, a loop of :func:`delta_rule_step`. The
chunk form lives in :mod:`everlearn.ops.delta_rule_chunk`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from everlearn.errors import InvalidArgument
from everlearn.ops.delta_rule_chunk import chunked_delta_rule

__all__ = ["delta_rule", "delta_rule_naive", "delta_rule_step", "gated_delta_rule"]

DEFAULT_CHUNK_SIZE = 64


def delta_rule(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    mode: Literal["chunk", "naive"] = "chunk",
) -> tuple[Tensor | None, Tensor]:
    """Run the recurrence over a sequence and return every read and the last state.

    Args:
        q: Queries ``[..., T, K]``; ``None`` when only the final state is wanted.
        k: Keys ``[..., T, K]``.
        w: Write vectors ``[..., T, V]``.
        log_decay: ``log alpha <= 0`` ``[..., T]``; ``None`` is no decay, ``-inf`` forgets everything.
        beta: Erase strength ``[..., T]``; ``None`` is no erasing.
        initial_state: ``S_0`` ``[..., V, K]``; ``None`` is zero.
        chunk_size: Tokens a chunk; ``T`` need not be a multiple of it.
        mode: ``"chunk"`` (fast, hand-written backward) or ``"naive"`` (the token loop).

    Returns:
        ``o`` ``[..., T, V]`` in the dtype of ``w`` (``None`` without ``q``) and ``S_T`` ``[..., V, K]``. 16-bit inputs
        are computed, and their state returned, in float32.

    Raises:
        InvalidArgument: on shapes or dtypes that do not fit, an empty sequence, or a chunk size below 1.
    """
    _check(q, k, w, log_decay, beta, initial_state)
    if mode not in ("chunk", "naive"):
        raise InvalidArgument(f"mode: got {mode!r}, expected 'chunk' or 'naive'")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise InvalidArgument(f"chunk_size: got {chunk_size!r}, expected an integer of at least 1")
    if mode == "naive":
        return delta_rule_naive(q, k, w, log_decay, beta, initial_state)
    out_dtype = w.dtype
    work = _working_dtype(w.dtype)
    with torch.autocast(w.device.type, enabled=False):
        cast = [None if x is None else x.to(work) for x in (q, k, w, log_decay, beta, initial_state)]
        out, state = chunked_delta_rule(*cast, chunk_size=min(chunk_size, k.shape[-2]))  # type: ignore[arg-type]
    return (None if out is None else out.to(out_dtype)), state


def delta_rule_naive(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The recurrence as it is written, token by token; arguments and returns of :func:`delta_rule`."""
    _check(q, k, w, log_decay, beta, initial_state)
    work = _working_dtype(w.dtype)
    if initial_state is None:
        state = w.new_zeros(*w.shape[:-2], w.shape[-1], k.shape[-1], dtype=work)
    else:
        state = initial_state.to(work)
    outs = []
    for t in range(k.shape[-2]):
        out, state = delta_rule_step(
            None if q is None else q[..., t, :],
            k[..., t, :],
            w[..., t, :],
            None if log_decay is None else log_decay[..., t],
            None if beta is None else beta[..., t],
            state,
        )
        outs.append(out)
    return (None if q is None else torch.stack(outs, dim=-2)), state


def delta_rule_step(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """One token of the recurrence.

    Args:
        q: Query ``[..., K]`` or ``None``.
        k: Key ``[..., K]``.
        w: Write vector ``[..., V]``.
        log_decay: ``log alpha`` ``[...]`` or ``None``.
        beta: Erase strength ``[...]`` or ``None``.
        state: ``S_{t-1}`` ``[..., V, K]``; its dtype is the dtype of the arithmetic.

    Returns:
        ``S_t q`` ``[..., V]`` in the dtype of ``w`` (``None`` without ``q``) and ``S_t`` ``[..., V, K]``.
    """
    with torch.autocast(state.device.type, enabled=False):
        key = k.to(state.dtype).unsqueeze(-1)
        write = w.to(state.dtype).unsqueeze(-1)
        if beta is not None:
            write = write - beta.to(state.dtype)[..., None, None] * (state @ key)
        if log_decay is not None:
            state = log_decay.to(state.dtype).exp()[..., None, None] * state
        state = state + write * key.mT
        out = None if q is None else (state @ q.to(state.dtype).unsqueeze(-1)).squeeze(-1).to(w.dtype)
    return out, state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    rate: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet's ``S_t = alpha_t S_{t-1} (I - rate_t k k^T) + rate_t v k^T``; DeltaNet without ``log_decay``.

    On a CUDA device where ``flash-linear-attention`` is installed its kernel serves (same recurrence, scale 1);
    everywhere else :func:`delta_rule` does. Shapes as in :func:`delta_rule`, ``rate`` being ``[..., T]``.
    """
    from everlearn.ops import delta_rule_fla

    if delta_rule_fla.serves(q):
        return delta_rule_fla.gated_delta_rule(q, k, v, log_decay, rate, initial_state)
    beta = rate if log_decay is None else log_decay.exp() * rate
    out, state = delta_rule(q, k, rate.unsqueeze(-1) * v, log_decay, beta, initial_state, chunk_size=chunk_size)
    assert out is not None
    return out, state


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _check(
    q: Tensor | None, k: Tensor, w: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> None:
    if k.dim() < 2 or w.dim() < 2:
        raise InvalidArgument(
            f"k, w: got shapes {list(k.shape)}, {list(w.shape)}, expected [..., T, K] and [..., T, V]"
        )
    lead, length = k.shape[:-2], k.shape[-2]
    if length == 0:
        raise InvalidArgument("k: got an empty sequence, expected at least one token")
    expected = {
        "q": (q, (*lead, length, k.shape[-1])),
        "w": (w, (*lead, length, w.shape[-1])),
        "log_decay": (log_decay, (*lead, length)),
        "beta": (beta, (*lead, length)),
        "initial_state": (state, (*lead, w.shape[-1], k.shape[-1])),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise InvalidArgument(f"{name}: got shape {list(value.shape)}, expected {list(shape)} to go with k and w")
    for name, value in (("k", k), *((n, v) for n, (v, _) in expected.items())):
        if value is None:
            continue
        if not value.dtype.is_floating_point:
            raise InvalidArgument(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
        if _working_dtype(value.dtype) != _working_dtype(w.dtype):
            raise InvalidArgument(f"{name}: got dtype {value.dtype}, expected one that goes with w's {w.dtype}")
