"""Titans (Behrouz, Zhong, Mirrokni 2025): a neural memory as the mixer, and as the context of attention (MAC)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.blocks.attention import rotate
from everlearn.blocks.context import Context
from everlearn.blocks.recurrent import share
from everlearn.blocks.short_conv import ShortConv
from everlearn.blocks.state import TensorState
from everlearn.memories.self_modifying_plan import Layout, Piece, Plan, make_plan
from everlearn.memories.titans import Carry, Inputs, NeuralMemory

__all__ = ["MemoryAsContext", "TitansMixer"]


class _Gates(nn.Module):
    """Rates of the memory's update from the input ``[B, T, 3 heads]``: step, keep and momentum of each head.

    ``theta = step_max sigmoid(.)``, ``1 - alpha = sigmoid(.)`` and ``eta = sigmoid(.)``, each with a bias that gives it
    the value it starts training with.
    """

    def __init__(self, num_heads: int, step_max: float, starts: tuple[float, float, float]) -> None:
        super().__init__()
        self.step_max, self.starts = step_max, (starts[0] / step_max, *starts[1:])
        self.bias = nn.Parameter(torch.empty(3, num_heads))

    def draw(self) -> dict[str, Tensor]:
        """New parameters by name."""
        biases = torch.tensor([math.log(share / (1 - share)) for share in self.starts])
        return {"bias": biases[:, None].expand(self.bias.shape)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step, log keep and log momentum ``[B heads, T]``."""
        exact = torch.promote_types(self.bias.dtype, torch.float32)
        x = x.unflatten(-1, (3, -1)).to(exact) + self.bias
        step, keep, momentum = x.permute(2, 0, 3, 1).flatten(1, 2)
        return self.step_max * torch.sigmoid(step), F.logsigmoid(keep), F.logsigmoid(momentum)


def _columns(x: Tensor, num_heads: int) -> Tensor:
    """``[B, T, heads d]`` to ``[B heads, d, T]`` in at least float32."""
    x = x.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor, num_heads: int) -> Tensor:
    """``[B heads, d, T]`` to ``[B, T, heads, d]``."""
    return x.unflatten(0, (-1, num_heads)).permute(0, 3, 1, 2)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-2, keepdim=True) + 1e-6)


class _Memorizing(nn.Module):
    """What both forms share: the memory, its gates, the plan of a call, and what is carried between calls."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        chunk_size: int,
        step_max: float,
        starts: tuple[float, float, float],
        **options: Any,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.chunk_size = hidden_size, num_heads, chunk_size
        self.memory = NeuralMemory(num_heads, share("hidden_size", hidden_size, num_heads, even=True), **options)
        self.gates = _Gates(num_heads, step_max, starts)

    def plan(self, x: Tensor, state: TensorState | None, context: Context) -> Plan:
        """The plan of a call, shared by the layers of one chunk size."""
        sizes = (self.chunk_size, self.chunk_size)
        if sizes not in context.plans:
            position = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
            position = position if state is None else state["position"]
            context.plans[sizes] = make_plan(x.shape[1], position, *sizes, mask=context.mask, starts=context.starts)
        return context.plans[sizes]

    def inputs(self, mixed: Tensor, rates: Tensor, valid: Tensor) -> Inputs:
        """Return what is written and asked, of ``mixed`` ``[B, T, 3 D]`` and ``rates`` ``[B, T, 3 heads]``."""
        q, k, v = (_columns(part, self.num_heads) for part in F.silu(mixed).chunk(3, dim=-1))
        step, keep, momentum = self.gates(rates)
        return Inputs(_unit(q), _unit(k), v, step, keep, momentum, valid.repeat_interleave(self.num_heads, dim=0))

    def carry(self, state: TensorState | None, fresh: Carry) -> Carry:
        """The memories of a state, batch rows and heads as one axis; ``fresh`` before the first token."""
        if state is None:
            return fresh
        return Carry(*(tuple(state[f"{name}.{i}"].flatten(0, 1) for i in range(2)) for name in Carry._fields))

    def carried(self, carry: Carry, plan: Plan) -> dict[str, Tensor]:
        """The tensors of a state, by name; :meth:`carry` is the way back."""
        split = carry.map(lambda x: x.unflatten(0, (-1, self.num_heads)))
        named = {f"{name}.{i}": x for name, group in zip(Carry._fields, split) for i, x in enumerate(group)}
        return {**named, "position": plan.position}


def _valid(layout: Layout | None, x: Tensor) -> Tensor:
    """Which slots hold a token, 1 or 0 ``[B, L]``, in the dtype of the memories."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.new_ones(x.shape[:2], dtype=exact) if layout is None else layout.valid.to(exact)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """``norm(x)`` in the dtype of its weight, whatever the autocast made of ``x``."""
    return norm(x.to(norm.weight.dtype))


class TitansMixer(_Memorizing):
    """The neural memory in place of attention ("LMM"), ``[B, T, hidden_size] -> [B, T, hidden_size]``.

    A short convolution and SiLU on ``q``, ``k`` and ``v``, unit length for ``q`` and ``k``; a norm for every head and a
    SiLU gate on what is read.

    Args:
        hidden_size, num_heads: as everywhere.
        chunk_size: tokens between updates of what the gradients are taken at.
        width, activation, max_error, retention, recompute: see :class:`everlearn.memories.titans.NeuralMemory`.
        step_max: the largest inner rate. A chunk's gradients are all taken at its start, so that the steps of equal
            keys add up: with 64 tokens a chunk and 64 hidden units, rates beyond 0.02 overshoot where keys repeat.
        step, keep, momentum: inner rate, ``1 - alpha`` and ``eta`` at the start of training.
        conv_width: taps of the convolution.
        eps: of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        step_max: float = 0.1,
        step: float = 0.005,
        keep: float = 0.99,
        momentum: float = 0.5,
        conv_width: int = 4,
        eps: float = 1e-6,
        width: int | None = None,
        activation: str = "silu",
        max_error: float | None = 2.0,
        retention: str = "start",
        recompute: bool = True,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, chunk_size, step_max, (step, keep, momentum),
            width=width, activation=activation, max_error=max_error, retention=retention, recompute=recompute,
        )  # fmt: skip
        self.sizes = [3 * hidden_size, hidden_size, 3 * num_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.conv = ShortConv(3 * hidden_size, conv_width)
        self.norm = nn.RMSNorm(hidden_size // num_heads, eps=eps)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``."""
        plan = self.plan(x, state, context)
        mixed, gate, rates = self.in_proj(x).split(self.sizes, dim=-1)
        mixed, history = self.conv(mixed, state["conv"] if state else self.conv.init_state(x.shape[0]), context)
        if plan.layout is not None:
            mixed, rates = plan.layout.to_slots(mixed), plan.layout.to_slots(rates)
        valid = _valid(plan.layout, mixed)
        with torch.autocast(x.device.type, enabled=False):
            y, carry = self._run(self.inputs(mixed, rates, valid), state, plan)
            y = _rows(y, self.num_heads).flatten(2)
            if plan.layout is not None:
                y = plan.layout.from_slots(y)
        y = _normed(self.norm, y.unflatten(-1, (self.num_heads, -1))).flatten(2)
        return self.out_proj(y.to(x.dtype) * F.silu(gate)), TensorState({**self.carried(carry, plan), "conv": history})

    def _run(self, inputs: Inputs, state: TensorState | None, plan: Plan) -> tuple[Tensor, Carry]:
        """All chunks in order: reads ``[N, d, L]`` and the memories after the last token."""
        fresh = self.memory.init_carry(inputs.k.shape[0] // self.num_heads)
        carry, reads = self.carry(state, fresh), []
        sizes = [piece.end - piece.begin for piece, _ in plan.pieces]
        for (piece, _), *chunk in zip(plan.pieces, *(x.split(sizes, dim=-1) for x in inputs)):
            if piece.reset is not None:
                carry = fresh.where(piece.reset, carry)
            carry, read = self.memory.write(carry, Inputs(*chunk), piece)
            reads.append(read)
        return torch.cat(reads, dim=-1) if reads else inputs.q, carry


class MemoryAsContext(_Memorizing):
    """Titans' MAC: attention within segments over persistent tokens, what the memory recalls, and the segment.

    For each segment, with ``M`` the memory at its start: ``h = M(q)`` with queries of the segment's tokens; ``y`` is
    attention over ``[persistent, h, x]``, in which a token sees its own and earlier ``h`` and ``x``; the memory is
    written with ``y``, and the output is ``y . sigmoid(norm(M_t(y)))``, ``M_t`` being the memory after that
    token. A short convolution goes over what the projections make of ``x``. The state holds the segment's keys and
    values, two for each of its places.

    Args:
        hidden_size, num_heads: as everywhere.
        chunk_size: tokens of a segment.
        persistent: tokens that are learned and in every segment.
        conv_width: taps of the convolution.
        rope_theta: base of the rotary wavelengths within a segment.
        others: see :class:`TitansMixer`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        persistent: int = 16,
        conv_width: int = 4,
        rope_theta: float = 10000.0,
        step_max: float = 0.1,
        step: float = 0.005,
        keep: float = 0.99,
        momentum: float = 0.5,
        eps: float = 1e-6,
        width: int | None = None,
        activation: str = "silu",
        max_error: float | None = 2.0,
        retention: str = "start",
        recompute: bool = True,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, chunk_size, step_max, (step, keep, momentum),
            width=width, activation=activation, max_error=max_error, retention=retention, recompute=recompute,
        )  # fmt: skip
        self.rope_theta = rope_theta
        self.persistent = nn.Embedding(persistent, hidden_size)
        self.query_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=False)  # for the attention and for the memory
        self.key_value_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.conv = ShortConv(4 * hidden_size, conv_width)
        self.recall_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.sizes = [3 * hidden_size, 3 * num_heads]
        self.memory_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.memory_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, state: TensorState | None, context: Context) -> tuple[Tensor, TensorState]:
        """Run over ``x`` ``[B, T, hidden_size]``, segment by segment."""
        plan, batch = self.plan(x, state, context), x.shape[0]
        layout = plan.layout
        projected = torch.cat((self.query_proj(x), self.key_value_proj(x)), dim=-1)
        slots, history = self.conv(projected, state["conv"] if state else self.conv.init_state(batch), context)
        slots = slots if layout is None else layout.to_slots(slots)
        queries, wanted, own = slots.split([self.hidden_size, self.hidden_size, 2 * self.hidden_size], dim=-1)
        queries = queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        place = torch.arange(slots.shape[1], device=x.device)[None]
        if layout is None and state is not None:
            place = place + state["position"][:, None]
        place = (place % self.chunk_size).expand(batch, -1)
        valid = _valid(layout, slots)
        fresh = self.memory.init_carry(batch)
        carry, outs = self.carry(state, fresh), []
        keys, values = self._cached(state, x)
        fixed = self._split(self.key_value_proj(self.persistent.weight[None]))
        for piece, _ in plan.pieces:
            here = slice(piece.begin, piece.end)
            if piece.reset is not None:
                carry = fresh.where(piece.reset, carry)
            recalled = self._recall(carry, wanted[:, here])
            key, value = self._split(torch.cat((self.key_value_proj(recalled.to(x.dtype)), own[:, here]), dim=1))
            key = rotate(key, place[:, here].repeat(1, 2), self.rope_theta)
            keys, values = (
                self._put(old, new, place[:, here], valid[:, here]) for old, new in ((keys, key), (values, value))
            )
            y = self._attend(queries[:, :, here], keys, values, fixed, place[:, here])
            carry, read = self._memorize(carry, y, valid[:, here], piece)
            outs.append(y * torch.sigmoid(_normed(self.memory_norm, read)))
        y = torch.cat(outs, dim=1) if outs else wanted
        y = y if layout is None else layout.from_slots(y)
        after = {**self.carried(carry, plan), "conv": history, "keys": keys, "values": values}
        return self.out_proj(y.to(x.dtype)), TensorState(after)

    def _cached(self, state: TensorState | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values by place, those of what was recalled first, ``[B, heads, 2 chunk_size, d]`` each."""
        if state is not None:
            return state["keys"], state["values"]
        size = self.hidden_size // self.num_heads
        empty = self.key_value_proj.weight.new_zeros(x.shape[0], self.num_heads, 2 * self.chunk_size, size)
        return empty, empty

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, heads, C, d]`` out of ``[B, C, 2 D]``."""
        key, value = x.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def _recall(self, carry: Carry, wanted: Tensor) -> Tensor:
        """What the memory recalls for each token ``[B, C, D]``."""
        with torch.autocast(wanted.device.type, enabled=False):
            read = self.memory.recall(carry, _unit(_columns(F.silu(wanted), self.num_heads)))
        return _normed(self.recall_norm, _rows(read, self.num_heads).flatten(2))

    def _put(self, held: Tensor, new: Tensor, place: Tensor, valid: Tensor) -> Tensor:
        """``held`` ``[B, heads, 2 chunk_size, d]`` with those of the tokens' ``new`` in their places."""
        index = torch.cat((place, place + self.chunk_size), dim=1)[:, None, :, None].expand_as(new)
        held, kept = held.to(new.dtype), valid.repeat(1, 2)[:, None, :, None] > 0
        return held.scatter(2, index, torch.where(kept, new, held.gather(2, index)))

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, fixed: tuple[Tensor, Tensor], place: Tensor
    ) -> Tensor:
        """Attention ``[B, C, D]`` over persistent tokens and places up to the query's own."""
        query = rotate(query, place, self.rope_theta)
        index = torch.arange(2 * self.chunk_size, device=place.device) % self.chunk_size
        seen = F.pad(index <= place.unsqueeze(-1), (fixed[0].shape[-2], 0), value=True).unsqueeze(1)
        batch = query.shape[0]
        key, value = (
            torch.cat((own.expand(batch, -1, -1, -1), cached), dim=-2) for own, cached in zip(fixed, (keys, values))
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)

    def _memorize(self, carry: Carry, y: Tensor, valid: Tensor, piece: Piece) -> tuple[Carry, Tensor]:
        """Write ``y`` into the memory and read it with ``y`` ``[B, C, D]``."""
        mixed, rates = self.memory_proj(y).split(self.sizes, dim=-1)
        with torch.autocast(y.device.type, enabled=False):
            carry, read = self.memory.write(carry, self.inputs(mixed, rates, valid), piece)
        return carry, _rows(read, self.num_heads).flatten(2)
