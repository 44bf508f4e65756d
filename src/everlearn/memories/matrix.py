r"""A matrix as an associative memory, ``M(x) = W x``, and the write and read that every matrix in a memory is made of.

Tokens run along the last axis here: vectors of a chunk are ``[..., d, C]``. Legend: ``N`` batch rows times heads, ``n``
memories stacked, ``d`` size of keys and values, ``C`` tokens of the chunk, ``ratios`` the table of ``decay_ratios``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everlearn.errors import InvalidArgument
from everlearn.ops.delta_gradient import clip_length, delta_gradient_write
from everlearn.ops.delta_rule_chunk import advance, read
from everlearn.ops.recompute import Call

__all__ = ["Chunk", "MatrixMemory", "Params", "Trace", "WriteRule", "read_matrix", "write_matrix"]

Params = tuple[Tensor, ...]

RULES = ("dgd", "gd")
OBJECTIVES = ("l2", "dot")


@dataclass(frozen=True)
class WriteRule:
    """How a memory is written.

    Args:
        rule: ``"dgd"``, delta gradient descent (Eq. 56-57): the write erases what the key held, at the step
            ``eta / (1 + eta |x|^2)``; ``"gd"``, plain gradient descent at the step ``eta``.
        objective: ``"l2"``, ``1/2 |M(k) - target|^2``; ``"dot"``, ``-<M(k), target>``.
        self_targets: the target is ``M(v)`` of the memory itself (Eq. 84); otherwise ``v``.
        max_error: longest gradient by a memory's output: beyond it the objective is Huber's (``l2``), or the target is
            cut to that length (``dot``). None is no bound: targets that a memory makes can then feed on themselves.
        target_gradient: whether the outer gradient flows through targets.
    """

    rule: str = "dgd"
    objective: str = "l2"
    self_targets: bool = True
    max_error: float | None = 2.0
    target_gradient: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InvalidArgument(f"rule: got {self.rule!r}, expected one of {RULES}")
        if self.objective not in OBJECTIVES:
            raise InvalidArgument(f"objective: got {self.objective!r}, expected one of {OBJECTIVES}")
        if self.max_error is not None and not self.max_error > 0:
            raise InvalidArgument(f"max_error: got {self.max_error}, expected a positive number or None")

    def gradient(self, out: Tensor, target: Tensor) -> Tensor:
        """Gradient of the objective by the memory's output; both ``[..., d, C]``."""
        target = target if self.target_gradient else target.detach()
        return self.bounded(-target if self.objective == "dot" else out - target)

    def bounded(self, grad: Tensor) -> Tensor:
        """``grad`` ``[..., d, C]``, cut to the length ``max_error``."""
        return grad if self.max_error is None else clip_length(grad, self.max_error)


class Chunk(NamedTuple):
    """What a chunk writes with: keys, values ``[N, d, C]``, rate ``eta`` ``[N, C]``, ratios ``[N, C + 1, C + 1]``."""

    k: Tensor
    v: Tensor
    rate: Tensor
    ratios: Tensor


def write_matrix(
    now: Tensor,
    key: Tensor,
    grad: Tensor,
    held: Tensor,
    rate: Tensor,
    ratios: Tensor,
    rule: WriteRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write a chunk of output-gradients into a matrix: ``W_t = W_{t-1} (alpha_t I - beta_t x x^T) - step_t g x^T``.

    Args:
        now: the matrix ``[N, ..., out, in]`` before the chunk.
        key: its inputs ``x`` ``[N, ..., in, C]``.
        grad: the gradients ``g`` by its outputs ``[N, ..., out, C]``.
        held: ``now @ key`` ``[N, ..., out, C]``; see :func:`delta_gradient_write`.
        rate: ``eta`` ``[N, C]``.
        ratios: decay ratios ``[N, C + 1, C + 1]``.
        rule: ``dgd``: ``beta = step = eta / (1 + eta |x|^2)``; ``gd``: ``beta = 0``, ``step = eta``.

    Returns:
        what each token writes ``[N, ..., out, C]``, before it is multiplied by its strength ``[N, ..., C]``, and the
        matrix after the chunk.
    """
    if rule.rule == "dgd":
        return delta_gradient_write(now, key, grad, held, rate, ratios)
    between = (1,) * (now.dim() - 3)
    rate = rate.view(rate.shape[0], *between, rate.shape[-1])
    ratios = ratios.view(ratios.shape[0], *between, *ratios.shape[-2:])
    u = -rate.unsqueeze(-2) * grad
    return -grad, rate.expand(*now.shape[:-2], -1), advance(now, key.mT, u.mT, ratios)


class Trace(NamedTuple):
    """What a chunk wrote into a matrix: inputs ``[N, in, C]``, writes ``[N, out, C]`` and their strength ``[N, C]``."""

    key: Tensor
    write: Tensor
    strength: Tensor


def read_matrix(now: Tensor, query: Tensor, trace: Trace, ratios: Tensor, extra: Tensor | None) -> Tensor:
    """Each token's read ``W_t x`` ``[N, out, C]`` in the chunk of ``trace``; ``extra`` is added to every ``W_t``."""
    u = trace.write * trace.strength.unsqueeze(-2)
    out = read(query.mT, trace.key.mT, u.mT, ratios, (now @ query).mT).mT
    return out if extra is None else out + extra @ query


@dataclass(frozen=True)
class MatrixMemory:
    """``M(x) = W x``; its one parameter is ``W`` ``[..., d, d]``."""

    def shapes(self, size: int, width: int) -> tuple[tuple[int, int], ...]:
        """The shapes of the parameters of one memory (``width`` is not used)."""
        return ((size, size),)

    def start(self, count: int, heads: int, size: int, width: int) -> Params:
        """Starts ``[heads, count, d, d]``: the identity for projections, zero for the last memory, which is read."""
        weight = torch.eye(size).repeat(heads, count, 1, 1)
        weight[:, -1] = 0
        return (weight,)

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """``M(x)`` for every memory's own input ``[..., n, d, C]``."""
        return params[0] @ x

    def write(
        self, start: Params, now: Params | None, chunk: Chunk, rule: WriteRule, again: Call
    ) -> tuple[Params, tuple[Trace, ...]]:
        """Write a chunk with gradients taken at ``start`` into ``now`` (``None``: the same as ``start``).

        Returns the parameters after the chunk, and what was written into the last memory, for :meth:`read`. ``again``:
        see :func:`everlearn.memories.self_modifying_chunk.memorize`.
        """
        (weight,) = start
        k, v = chunk.k, chunk.v
        stacked = weight.flatten(-3, -2)
        held = stacked @ k
        target = v.repeat(1, weight.shape[-3], 1) if not rule.self_targets else stacked @ v
        rows = weight.shape[-3:-1]
        grad = rule.gradient(held.unflatten(-2, rows), target.unflatten(-2, rows)).flatten(-3, -2)
        before = stacked if now is None else now[0].flatten(-3, -2)
        held_now = held if now is None else before @ k
        p, strength, after = write_matrix(before, k, grad, held_now, chunk.rate, chunk.ratios, rule)
        return (after.unflatten(-2, rows),), (Trace(k, p.unflatten(-2, rows)[:, -1], strength),)

    def read(self, now: Params, q: Tensor, traces: Sequence[Trace], ratios: Tensor, extra: Params | None) -> Tensor:
        """Read one memory with ``q`` ``[N, d, C]`` after every token of the chunk; see :func:`read_matrix`."""
        return read_matrix(now[0], q, traces[0], ratios, None if extra is None else extra[0])
