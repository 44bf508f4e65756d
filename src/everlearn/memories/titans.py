r"""The neural memory of Titans (Behrouz, Zhong, Mirrokni 2025): a network trained in context, with momentum and decay.

    S_t = eta_t S_{t-1} - theta_t grad l(M; k_t, v_t)        M_t = keep_t M_{t-1} + S_t        y_t = M_t(q_t)

for every matrix of the residual network ``M(x) = x + W1 s(W2 x)``, with ``l = 1/2 |M(k) - v|^2`` and its gradients
taken at the start of each chunk, where they are outer products ``g x^T`` (section 3.2 of the paper). Within a chunk
both recurrences are linear, so that with ``K[t, j] = prod_{j < i <= t} keep_i`` and ``E`` the same of ``eta``

    M_t = K[t, 0] M_0 + (K E)[t, 0] S_0 - sum_{1 <= s <= t} (K E)[t, s] theta_s g_s x_s^T

where ``(K E)[t, s]`` is summed over the tokens from ``max(s, 1)`` to ``t``.

Legend: ``N`` batch rows times heads, ``d`` head size, ``r`` hidden units, ``C`` tokens of the chunk, tokens last.
:func:`everlearn.memories.titans_naive.titans_naive` is the same thing token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everlearn.errors import InvalidArgument
from everlearn.memories.matrix import Params, WriteRule
from everlearn.memories.mlp import ACTIVATIONS, MlpMemory
from everlearn.memories.self_modifying_plan import Piece
from everlearn.ops.delta_rule_chunk import decay_ratios
from everlearn.ops.recompute import recompute

__all__ = ["Carry", "Inputs", "MomentumTable", "NeuralMemory", "momentum_table"]

RETENTIONS = ("zero", "start")


class Inputs(NamedTuple):
    """What a chunk is written and read with.

    Attributes:
        q, k, v: ``[N, d, C]``.
        step: ``theta`` ``[N, C]``.
        log_keep: logarithm of ``keep``, the paper's ``1 - alpha`` ``[N, C]``.
        log_momentum: logarithm of ``eta`` ``[N, C]``.
        valid: 1 for tokens, 0 for slots that hold none, which change nothing ``[N, C]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    log_keep: Tensor
    log_momentum: Tensor
    valid: Tensor


class MomentumTable(NamedTuple):
    """How a chunk's tokens reach the states after them.

    Attributes:
        keep: share of ``M_0`` left in ``M_t`` ``[N, C]``.
        kick: share of ``S_0`` in ``M_t`` ``[N, C]``.
        mix: share of the write of token ``s`` in ``M_t`` ``[N, C, C]``, row ``t``.
        momentum: shares of ``S_0`` and of every write in the last ``S`` ``[N, 1 + C]``.
    """

    keep: Tensor
    kick: Tensor
    mix: Tensor
    momentum: Tensor


def momentum_table(log_keep: Tensor, log_momentum: Tensor, valid: Tensor) -> MomentumTable:
    """See :class:`MomentumTable`; all ``[N, C]``."""
    kept = decay_ratios(torch.where(valid > 0, log_keep, 0.0))
    carried = decay_ratios(torch.where(valid > 0, log_momentum, 0.0))
    both = (kept[..., 1:, 1:] * valid.unsqueeze(-2)) @ carried[..., 1:, :]
    return MomentumTable(kept[..., 1:, 0], both[..., 0], both[..., 1:], carried[..., -1, :])


class Carry(NamedTuple):
    """What is carried from chunk to chunk.

    Attributes:
        start: parameters at the last chunk boundary, ``W2`` and ``W1`` ``[N, ...]``.
        now: parameters after the last token.
        momentum: ``S`` of both.
        log_keep: sum of ``log keep`` since the boundary, for both, ``[N, 1, 1]``.
    """

    start: Params
    now: Params
    momentum: Params
    log_keep: Params

    def map(self, change: Callable[[Tensor], Tensor]) -> Carry:
        """Apply ``change`` to every tensor."""
        return Carry(*(tuple(change(x) for x in group) for group in self))

    def where(self, rows: Tensor, other: Carry) -> Carry:
        """This in the given batch rows ``[B]``, ``other`` in the rest."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(rows.repeat_interleave(a.shape[0] // rows.shape[0])[:, None, None], a, b)

        return Carry(*(tuple(choose(a, b) for a, b in zip(*groups)) for groups in zip(self, other)))


class NeuralMemory(nn.Module):
    """The trained starts of the memories of all heads, and how they are written and read.

    Args:
        num_heads: heads, each with a network of its own.
        size: of keys and values of a head.
        width: hidden units; None is ``size``.
        activation: ``"silu"``, ``"tanh"`` or ``"relu"``.
        max_error: longest gradient by the network's output, beyond which the loss is Huber's; None is no bound.
        retention: what a forgetting memory returns to: ``"zero"`` is the paper's equation, under which both matrices of
            a memory that forgets faster than it is written end at zero, where they have no gradient; ``"start"``, as in
            HOPE's memories, gives back at a chunk's end what its decay took of the trained start.
        recompute: keep only chunk boundaries for the backward.
    """

    def __init__(
        self,
        num_heads: int,
        size: int,
        *,
        width: int | None = None,
        activation: str = "silu",
        max_error: float | None = 2.0,
        retention: str = "start",
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if retention not in RETENTIONS:
            raise InvalidArgument(f"retention: got {retention!r}, expected one of {RETENTIONS}")
        width = size if width is None else width
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise InvalidArgument(f"width: got {width!r}, expected a whole number of at least 1")
        self.structure, self.rule = MlpMemory(activation), WriteRule("gd", max_error=max_error)
        self.retention, self.recompute = retention, recompute
        w2, w1 = self.structure.shapes(size, width)
        self.w2, self.w1 = nn.Parameter(torch.empty(num_heads, *w2)), nn.Parameter(torch.empty(num_heads, *w1))

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name."""
        heads, width, size = self.w2.shape
        w2, w1 = self.structure.start(1, heads, size, width)
        return {"w2": w2[:, 0], "w1": w1[:, 0]}

    def init_carry(self, batch_size: int) -> Carry:
        """The carry before the first token, ``N = batch_size * num_heads``."""
        exact = torch.promote_types(self.w2.dtype, torch.float32)
        start = tuple(p.to(exact).repeat(batch_size, 1, 1) for p in (self.w2, self.w1))
        nothing = start[0].new_zeros(start[0].shape[0], 1, 1)
        return Carry(start, start, tuple(torch.zeros_like(p) for p in start), (nothing, nothing))

    def recall(self, carry: Carry, q: Tensor) -> Tensor:
        """Read the memory as it stood at the last chunk boundary, ``[N, d, C]`` to the same."""
        return self.structure.apply(carry.start, q)

    def write(self, carry: Carry, inputs: Inputs, piece: Piece) -> tuple[Carry, Tensor]:
        """Write tokens of one chunk; returns the carry after them and the reads of ``q`` after each ``[N, d, C]``."""

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self._chunk(tensors[:2], tensors[2:4], tensors[4:6], Inputs(*tensors[6:]))

        tensors = (*carry.start, *carry.now, *carry.momentum, *inputs)
        out = recompute(run, *tensors) if self.recompute and torch.is_grad_enabled() else run(*tensors)
        now, momentum, read = out[:2], out[2:4], out[4]
        gone = torch.where(inputs.valid > 0, inputs.log_keep, 0.0).sum(-1)[:, None, None]
        after = Carry(carry.start, now, momentum, tuple(x + gone for x in carry.log_keep))
        if piece.done is False:
            return after, read
        if self.retention == "start":
            begun = self.init_carry(now[0].shape[0] // self.w2.shape[0]).start
            now = tuple(x + (1 - kept.exp()) * old for x, kept, old in zip(now, after.log_keep, begun))
        passed = Carry(now, now, momentum, tuple(torch.zeros_like(x) for x in carry.log_keep))
        return (passed if piece.done is True else passed.where(piece.done, after)), read

    def _chunk(self, start: Params, before: Params, moved: Params, inputs: Inputs) -> tuple[Tensor, ...]:
        """Parameters and momentum after the tokens, and the reads."""
        w2, w1 = start
        activation, slope = ACTIVATIONS[self.structure.activation]
        pre = w2 @ inputs.k
        hidden = activation(pre)
        error = self.rule.gradient(inputs.k + w1 @ hidden, inputs.v)
        step = -(inputs.step * inputs.valid).unsqueeze(-2)
        writes = (step * (w1.mT @ error) * slope(pre, hidden), step * error)
        keys = (inputs.k, hidden)
        table = momentum_table(inputs.log_keep, inputs.log_momentum, inputs.valid)
        now, momentum = [], []
        for matrix, speed, key, write in zip(before, moved, keys, writes):
            last = table.keep[:, -1, None, None] * matrix + table.kick[:, -1, None, None] * speed
            now.append(last + (write * table.mix[:, -1, None, :]) @ key.mT)
            shares = table.momentum[:, None, :]
            momentum.append(shares[..., :1] * speed + (write * shares[..., 1:]) @ key.mT)
        first, second = zip(before, moved, keys, writes)
        middle = activation(_read(inputs.q, *first, table))
        return *now, *momentum, inputs.q + _read(middle, *second, table)


def _read(query: Tensor, matrix: Tensor, speed: Tensor, key: Tensor, write: Tensor, table: MomentumTable) -> Tensor:
    """``W_t query_t`` for every token, the matrix and its momentum being those before the tokens."""
    held = table.keep.unsqueeze(-2) * (matrix @ query) + table.kick.unsqueeze(-2) * (speed @ query)
    return held + write @ (table.mix * (query.mT @ key)).mT
