"""Self-modifying Titans (*Nested Learning*, section 8.1-8.2, Eq. 83-93): every projection is itself a memory.

Per head, memories ``k, v, eta, alpha, mem`` of one structure and size live in one stacked tensor. For the tokens of a
chunk, with the parameters at its start (subscript 0), ``x~`` the convolved input and ``W_*`` static projections:

    q = l2norm(W_q x~)      k = l2norm(M_k0(W_k x~))      v = l2norm(M_v0(W_v x~))
    eta = eta_max sigmoid(w_eta . M_eta0(W_e x~) + b_eta)      alpha = sigmoid(w_alpha . M_alpha0(W_a x~) + b_alpha)
    every memory m learns  M_m0(k) -> M_m0(v), a write a token       y_t = M_mem,t(q)

The layer's output is ``W_o (norm(y) . silu(W_g x))``, with a norm for each head.

:func:`everlearn.memories.self_modifying_naive.self_modifying_naive` is the same thing token by token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.memories.matrix import Params
from everlearn.memories.self_modifying_chunk import Gates, Inputs, flattened, joint_chunk, main_chunk, outer_chunk
from everlearn.memories.self_modifying_config import SelfModifyingConfig
from everlearn.memories.self_modifying_plan import Piece, Plan, make_plan
from everlearn.memories.self_modifying_state import SelfModifyingState
from everlearn.ops.causal_conv import causal_conv
from everlearn.ops.recompute import recompute, run

__all__ = ["SelfModifyingConfig", "SelfModifyingMemory", "SelfModifyingState"]


class _Carry(NamedTuple):
    """The state of a group of memories with one chunk size, batch rows and heads as one axis."""

    start: Params
    now: Params
    momentum: Params
    log_keep: Tensor
    base: Params  # the trained starts

    def map(self, change: Callable[[Tensor], Tensor]) -> _Carry:
        """Apply ``change`` to every tensor."""
        groups = (self.start, self.now, self.momentum, self.base)
        start, now, momentum, base = (tuple(change(x) for x in group) for group in groups)
        return _Carry(start, now, momentum, change(self.log_keep), base)

    def zip(self, other: _Carry, join: Callable[[Tensor, Tensor], Tensor]) -> _Carry:
        """Apply ``join`` to every pair of tensors."""
        pairs = zip(
            (self.start, self.now, self.momentum, self.base), (other.start, other.now, other.momentum, other.base)
        )
        start, now, momentum, base = (tuple(join(a, b) for a, b in zip(*pair)) for pair in pairs)
        return _Carry(start, now, momentum, join(self.log_keep, other.log_keep), base)


class SelfModifyingMemory(nn.Module):
    """A sequence layer ``[B, T, hidden_size] -> [B, T, hidden_size]`` whose projections learn in context.

    The memories compute in float32 (float64 in a float64 model) whatever the autocast.
    """

    row_vectors = ("conv_weight", "eta_weight", "alpha_weight")
    """Parameters whose rows are vectors of their own, no maps: see :func:`everlearn.optim.param_groups`."""
    fused_linears = ("in_proj",)
    """Linear layers whose weights are used without calling them: see :class:`everlearn.optim.DGD`."""

    def __init__(self, config: SelfModifyingConfig) -> None:
        super().__init__()
        self.config = config
        heads, size, hidden = config.num_heads, config.head_size, config.hidden_size
        self.conv_weight = nn.Parameter(torch.empty(config.conv_width, hidden))
        self.in_proj = nn.Linear(hidden, heads * len(config.roles) * size, bias=False)
        shapes = config.memory_structure().shapes(size, config.head_width)
        self.starts = nn.ParameterList(
            [nn.Parameter(torch.empty(heads, config.projections + 1, *shape)) for shape in shapes]
        )
        self.eta_weight = nn.Parameter(torch.empty(heads, size))
        self.eta_bias = nn.Parameter(torch.empty(heads))
        self.alpha_weight = nn.Parameter(torch.empty(heads, size), requires_grad=config.decay)
        self.alpha_bias = nn.Parameter(torch.empty(heads), requires_grad=config.decay)
        self.norm_weight = nn.Parameter(torch.empty(hidden)) if config.output_norm else None
        self.gate_proj = nn.Linear(hidden, hidden, bias=False) if config.output_gate else None
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw new parameters; ``std`` is that of the static projections."""
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=std)
        parameters = dict(self.named_parameters())
        for name, value in self.draw().items():
            parameters[name].copy_(value)

    def draw(self) -> dict[str, Tensor]:
        """New values for all parameters but the static projections, by name."""
        config = self.config
        heads, size, count = config.num_heads, config.head_size, config.projections + 1
        starts = config.memory_structure().start(count, heads, size, config.head_width)
        rate = config.eta_init / config.eta_max
        values = {f"starts.{i}": value for i, value in enumerate(starts)}
        values["conv_weight"] = (2 * torch.rand(self.conv_weight.shape) - 1) * config.conv_width**-0.5
        values["eta_weight"] = torch.randn(heads, size) * size**-0.5
        values["alpha_weight"] = torch.randn(heads, size) * size**-0.5
        values["eta_bias"] = torch.full((heads,), math.log(rate / (1 - rate)))
        values["alpha_bias"] = torch.full((heads,), math.log(config.alpha_init / (1 - config.alpha_init)))
        if config.output_norm:
            values["norm_weight"] = torch.ones(config.hidden_size)
        return values

    def init_state(self, batch_size: int) -> SelfModifyingState:
        """The state before the first token, every memory at its trained start."""
        config, weight = self.config, self.in_proj.weight
        starts = tuple(_working(p).expand(batch_size, *p.shape) for p in self.starts)
        return SelfModifyingState(
            start=starts,
            now=starts,
            momentum=tuple(torch.zeros_like(p) for p in starts) if config.momentum else (),
            log_keep=starts[0].new_zeros(batch_size, config.num_heads, config.projections + 1),
            conv=weight.new_zeros(batch_size, config.conv_width - 1, config.hidden_size),
            position=torch.zeros(batch_size, dtype=torch.long, device=weight.device),
        )

    def plan(
        self, length: int, position: Tensor, mask: Tensor | None = None, document_starts: Tensor | None = None
    ) -> Plan:
        """The plan of a call (see :func:`make_plan`); layers of one model can share it."""
        sizes = self.config.chunk_size, self.config.outer_chunk_size
        return make_plan(length, position, *sizes, mask=mask, starts=document_starts)

    def forward(
        self, x: Tensor, state: SelfModifyingState | None = None, plan: Plan | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        """Run over ``x`` ``[B, T, hidden_size]``.

        Args:
            x: the inputs.
            state: where an earlier call left off; None is the start.
            plan: see :meth:`plan`; None takes every token as part of one document a row.

        Returns:
            the outputs (zero where the plan masks tokens) and the state to go on from.

        Raises:
            InvalidArgument: on a shape that does not fit, an empty sequence, or a state of another size.
        """
        self._check(x, state)
        batch, length, _ = x.shape
        state = self.init_state(batch) if state is None else state
        plan = self.plan(length, state.position) if plan is None else plan
        mixed, conv = self._convolve(x, state, plan)
        weight = self.in_proj.weight
        features = torch.bmm(weight.to(mixed.dtype).expand(batch, *weight.shape), mixed.mT)  # [B, H roles d, L]
        with torch.autocast(x.device.type, enabled=False):
            y, state = self._run(_working(features), state, plan)
            if self.config.output_norm:
                y = F.rms_norm(y, y.shape[-1:], eps=1e-6)
            y = y.flatten(-2)
            if self.norm_weight is not None:
                y = y * self.norm_weight
            if plan.layout is not None:
                y = plan.layout.from_slots(y)
        y = y.to(x.dtype)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y), state.replace(conv=conv, position=plan.position)

    def _check(self, x: Tensor, state: SelfModifyingState | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size or x.shape[1] == 0:
            raise InvalidArgument(
                f"x: got shape {list(x.shape)}, expected [batch, time >= 1, hidden_size = {self.config.hidden_size}]"
            )
        if state is None:
            return
        expected = [(x.shape[0], *p.shape) for p in self.starts]
        found = [tuple(p.shape) for p in state.now]
        if expected != found or len(state.momentum) != (len(expected) if self.config.momentum else 0):
            raise InvalidArgument(
                f"state: got memories of shapes {found}, expected {expected} for this layer and batch"
            )

    def _convolve(self, x: Tensor, state: SelfModifyingState, plan: Plan) -> tuple[Tensor, Tensor]:
        """``x~`` in slots ``[B, L, hidden_size]`` and the convolution's next state."""
        taps, layout, history = self.config.conv_width, plan.layout, state.conv.to(x.dtype)
        if layout is None:
            padded = torch.cat((history, x), dim=1)
            return F.silu(causal_conv(padded, self.conv_weight)), padded[:, padded.shape[1] - taps + 1 :]
        padded = F.pad(layout.to_slots(x), (0, 0, taps - 1, 0))
        behind = torch.arange(taps - 1, device=x.device)
        places = (layout.offset[:, None] + behind).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        room = F.pad(padded, (0, 0, 0, max(0, int(layout.offset.max()) - plan.slots)))
        padded = room.scatter(1, places, history)
        # the last document's tail; what lies before its first token is not its own
        tail = padded.gather(1, (layout.last[:, None] + 1 + behind).unsqueeze(-1).expand_as(places))
        age = torch.full_like(layout.last, taps)
        if plan.slots:
            last_age = layout.age.gather(1, layout.last.clamp(min=0, max=plan.slots - 1)[:, None]).squeeze(1)
            age = torch.where(layout.kept.any(1), last_age, age)
        own = behind.flip(0) <= age[:, None]
        mixed = F.silu(causal_conv(padded[:, : plan.slots + taps - 1], self.conv_weight, layout.age))
        return mixed, torch.where(own.unsqueeze(-1), tail, 0.0)

    def _run(self, features: Tensor, state: SelfModifyingState, plan: Plan) -> tuple[Tensor, SelfModifyingState]:
        """All pieces of the plan in order: reads ``[B, L, H, d]`` and the memories after the last token."""
        config = self.config
        batch, heads, size = features.shape[0], config.num_heads, config.head_size
        joint = config.outer_chunk_size == config.chunk_size
        cut = 0 if joint else config.projections
        base = tuple(_working(p).expand(batch, *p.shape) for p in self.starts)
        whole = _carry(state, base)
        resets = any(piece.reset is not None for piece, _ in plan.pieces)
        fresh = _carry(self.init_state(batch), base) if resets else None
        outer, main = _part(whole, slice(0, cut)), _part(whole, slice(cut, None))
        gates = self._gates(batch)
        valid = None if plan.layout is None else plan.layout.valid.repeat_interleave(heads, dim=0)
        chunks = features.view(batch * heads, len(config.roles), size, -1).split(
            [piece.end - piece.begin for piece, _ in plan.pieces], dim=-1
        )
        reads = []
        for (piece, parts), chunk in zip(plan.pieces, chunks):
            if piece.reset is not None and fresh is not None:
                outer = _where(piece.reset, _part(fresh, slice(0, cut)), outer)
                main = _where(piece.reset, _part(fresh, slice(cut, None)), main)
            here = None if valid is None else valid[:, piece.begin : piece.end]
            if joint:
                main, read = self._joint(main, chunk, gates, here, piece)
                reads.append(read)
                continue
            outer, inputs = self._outer(outer, chunk, gates, here, piece)
            sizes = [part.end - part.begin for part in parts]
            for part, *given in zip(parts, *(x.split(sizes, dim=-1) for x in inputs)):
                main, read = self._main(main, Inputs(*given), part)
                reads.append(read)
        y = torch.cat(reads, dim=-1).view(batch, heads, size, -1).permute(0, 3, 1, 2)
        whole = main if joint else outer.zip(main, lambda a, b: torch.cat((a, b), dim=1))
        start, now, momentum, log_keep, _ = whole.map(lambda x: x.unflatten(0, (batch, heads)))
        return y, state.replace(start=start, now=now, momentum=momentum, log_keep=log_keep)

    def _gates(self, batch: int) -> Gates:
        parts = (self.eta_weight, self.eta_bias, self.alpha_weight, self.alpha_bias)
        return Gates(*(_working(p).expand(batch, *p.shape).flatten(0, 1) for p in parts))

    def _joint(
        self, carry: _Carry, features: Tensor, gates: Gates, valid: Tensor | None, piece: Piece
    ) -> tuple[_Carry, Tensor]:
        """All memories over one piece, when they share a chunk size."""
        rest = (features, *gates, *(() if valid is None else (valid,)))
        *after, read, log_keep = self._call(joint_chunk, carry, piece, rest)
        return self._turn(carry, tuple(after), log_keep, piece), read

    def _outer(
        self, carry: _Carry, features: Tensor, gates: Gates, valid: Tensor | None, piece: Piece
    ) -> tuple[_Carry, Inputs]:
        """The projections' memories over one piece, and what they make of it."""
        found = self._call(outer_chunk, carry, piece, (features, *gates, *(() if valid is None else (valid,))))
        after, inputs = found[: len(carry.start)], Inputs(*found[len(carry.start) :])
        return self._turn(carry, after, inputs.log_decay.sum(-1), piece), inputs

    def _main(self, carry: _Carry, inputs: Inputs, piece: Piece) -> tuple[_Carry, Tensor]:
        """The main memory over one piece of its own, smaller chunks."""
        *after, read = self._call(main_chunk, carry, piece, inputs)
        return self._turn(carry, tuple(after), inputs.log_decay.sum(-1), piece), read

    def _call(
        self, chunk: Callable[..., tuple[Tensor, ...]], carry: _Carry, piece: Piece, rest: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """``chunk(config, start, now, kick, rest)``, kept for the backward by its inputs only where the config says so.

        Compiled are only whole chunks in training: other lengths come in too many sizes.
        """
        config, training = self.config, torch.is_grad_enabled()
        groups = (carry.start, () if piece.fresh else carry.now, self._kick(carry), tuple(rest))
        ends = tuple(itertools.accumulate(len(group) for group in groups))
        whole = piece.end - piece.begin == (config.chunk_size if chunk is main_chunk else config.outer_chunk_size)
        flat = flattened(chunk, config, ends, config.compile and training and whole)
        again = recompute if config.recompute == "chunk" and training else run
        return again(flat, *(x for group in groups for x in group))

    def _kick(self, carry: _Carry) -> Params:
        return tuple(self.config.momentum * m for m in carry.momentum)

    def _turn(self, carry: _Carry, after: Params, log_keep: Tensor, piece: Piece) -> _Carry:
        """Take over the parameters after a piece, and pass the chunk boundary in the rows where it ends here."""
        log_keep = carry.log_keep + log_keep.unsqueeze(-1)
        carry = carry._replace(now=after, log_keep=log_keep)
        if piece.done is False:
            return carry
        start, moved, kept = after, (), log_keep.exp()[..., None, None]
        keeps = [kept if own else torch.ones_like(kept) for own in self.config.forgets]
        if carry.momentum:
            kicks = self._kick(carry)
            start = tuple(x + kick for x, kick in zip(after, kicks))
            moved = tuple(kick + x - keep * old for kick, x, keep, old in zip(kicks, after, keeps, carry.start))
        if self.config.decay and self.config.retention == "start":
            start = tuple(torch.addcmul(x, 1 - keep, base) for x, keep, base in zip(start, keeps, carry.base))
        passed = _Carry(start, start, moved, torch.zeros_like(log_keep), carry.base)
        return passed if piece.done is True else _where(piece.done, passed, carry)


def _working(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _carry(state: SelfModifyingState, base: Params) -> _Carry:
    return _Carry(state.start, state.now, state.momentum, state.log_keep, base).map(lambda x: x.flatten(0, 1))


def _part(carry: _Carry, memories: slice) -> _Carry:
    return carry.map(lambda x: x[:, memories])


def _where(rows: Tensor, yes: _Carry, no: _Carry) -> _Carry:
    """``yes`` in the given batch rows ``[B]``, ``no`` in the others."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        mask = rows.repeat_interleave(b.shape[0] // rows.shape[0])
        return torch.where(mask.view(-1, *[1] * (b.dim() - 1)), a, b)

    return yes.zip(no, choose)
