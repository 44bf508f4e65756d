"""The continuum memory system (*Nested Learning*, section 7): a chain of memories, each updated on its own clock.

The same levels run in two ways. *Streaming*: the parameters of a model are stepped by one optimiser a level
(:mod:`everlearn.models.streaming`). *In context*: they are fast weights of one sequence, updated functionally, so that
an outer loss can be taken through the updates (:func:`learn_in_context`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.levels import Clock, Level, check_levels

WIRINGS = ("sequential", "nested", "independent")
MIX = "mixture_logit"

Params = Mapping[str, Tensor]
LevelParams = Mapping[str, Params]


def check_wiring(wiring: str) -> str:
    """Return ``wiring``, or raise InvalidArgument when it is not one of :data:`WIRINGS`."""
    if wiring not in WIRINGS:
        raise InvalidArgument(f"wiring: got {wiring!r}, expected one of {WIRINGS}")
    return wiring


class Continuum(nn.Module):
    """Memories M_1 ... M_k, one a level, on top of a feed-forward network ``base`` or in its place (Eq. 70-74).

    ==============================  ==========================================  ==================================
    wiring                          with ``base`` (F)                            without
    ==============================  ==========================================  ==================================
    ``sequential``, ``nested``      ``M_k(... M_1(F(x)))``                       ``M_k(... M_1(x))``
    ``independent``                 ``F(x) + sum_l (M_l(x) - x)``                ``sum_l softmax(a)_l M_l(x)``
    ==============================  ==========================================  ==================================

    ``nested`` computes what ``sequential`` does; whoever runs the clock also resets a level when its parent's period
    ends. The mixture is computed as ``M_1(x) + sum_l softmax(a)_l (M_l(x) - M_1(x))``, which is the same and is exact
    while the levels agree. The logit ``a_l`` is a parameter of level l.

    Args:
        names: the levels' names, in the order of the chain.
        memories: one module a level, [..., hidden_size] -> [..., hidden_size]; one with a method ``delta`` says by it
            what it adds to its input.
        wiring: one of :data:`WIRINGS`.
        base: the feed-forward network kept beneath the memories, or None.
        starts: for each level the state that :meth:`reset` returns to; default: a copy of the state it has now.
    """

    def __init__(
        self,
        names: Sequence[str],
        memories: Sequence[nn.Module],
        *,
        wiring: str = "sequential",
        base: nn.Module | None = None,
        starts: Sequence[Params] | None = None,
    ) -> None:
        super().__init__()
        if len(names) != len(memories) or not memories or len(set(names)) < len(names):
            raise InvalidArgument(f"names: got {list(names)} for {len(memories)} memories, expected one name for each")
        self.names = tuple(names)
        self.wiring = check_wiring(wiring)
        self.base = base
        self.memories = nn.ModuleList(memories)
        mixed = wiring == "independent" and base is None and len(memories) > 1
        like = next(memories[0].parameters(), torch.zeros(()))
        self.mix = nn.ParameterList([nn.Parameter(like.new_zeros(())) for _ in memories] if mixed else [])
        if starts is None:
            starts = [_copy(self.level_state(name)) for name in self.names]
        elif mixed:
            starts = [{**start, MIX: like.new_zeros(())} for start in starts]
        self._starts = dict(zip(self.names, starts, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., hidden_size] through the base and all levels, as the class says."""
        y = x if self.base is None else self.base(x)
        if self.wiring != "independent":
            for memory in self.memories:
                y = memory(y)
            return y
        if self.base is not None:
            for memory in self.memories:
                y = y + _delta(memory, x)
            return y
        first = self.memories[0](x)
        if not self.mix:
            return first
        weights = torch.softmax(torch.stack(list(self.mix)), dim=0).to(first.dtype)
        y = first
        for weight, memory in zip(weights[1:], list(self.memories)[1:]):
            y = y + weight * (memory(x) - first)
        return y

    def level_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of level ``name`` by their name within the level; empty when the level is not here."""
        if name not in self.names:
            return {}
        index = self.names.index(name)
        own = dict(self.memories[index].named_parameters())
        return {**own, MIX: self.mix[index]} if self.mix else own

    def level_state(self, name: str) -> dict[str, Tensor]:
        """Return all that level ``name`` holds, parameters and persistent buffers: the live tensors, detached."""
        if name not in self.names:
            return {}
        index = self.names.index(name)
        own = dict(self.memories[index].state_dict())
        return {**own, MIX: self.mix[index].detach()} if self.mix else own

    @torch.no_grad()
    def write(self, name: str, state: Params) -> None:
        """Write ``state`` into the tensors of level ``name``, in place; a memory that grows takes on its size."""
        if name not in self.names:
            return
        grow = getattr(self.memories[self.names.index(name)], "make_room", None)
        if grow is not None:
            grow(state)
        for key, tensor in self.level_state(name).items():
            tensor.copy_(state[key])

    def reset(self, name: str) -> None:
        """Write the start of level ``name`` into its tensors, in place."""
        self.write(name, self._starts.get(name, {}))

    def grows(self, name: str) -> bool:
        """Say whether the memory of level ``name`` changes its number of rows with what it holds."""
        return name in self.names and hasattr(self.memories[self.names.index(name)], "make_room")


def _delta(memory: nn.Module, x: Tensor) -> Tensor:
    own = getattr(memory, "delta", None)
    return own(x) if own is not None else memory(x) - x


def _copy(state: Params) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in state.items()}


# ---------------------------------------------------------------------------------------------- in context

InnerModel = Callable[[LevelParams, Tensor, Any], tuple[Tensor, Any]]
Update = Callable[[str, Params, Params], Params]


@dataclass(frozen=True)
class FastWeights:
    """Where a sequence stands: to be given back to :func:`learn_in_context` with the tokens that follow.

    Attributes:
        tokens: tokens seen.
        levels: the fast weights, level -> name -> tensor.
        sums: gradients of the summed loss since each level's last update.
        counts: targets those sums are over, level -> whole number in a tensor.
        model: the inner model's own state (a cache, a recurrent state, or None).
    """

    tokens: int
    levels: LevelParams
    sums: LevelParams
    counts: Mapping[str, Tensor]
    model: Any = None


def gradient_descent(rates: Mapping[str, float | Tensor]) -> Update:
    """Return the update ``w - rate_l g``; a rate may be a tensor that the outer loss learns."""
    return lambda name, params, grads: {key: value - rates[name] * grads[key] for key, value in params.items()}


def start_in_context(starts: LevelParams, levels: Sequence[Level], state: Any = None) -> FastWeights:
    """Return the fast weights of a new sequence: every level at its start, the model at ``state``."""
    names = [level.name for level in check_levels(levels)]
    if set(starts) != set(names):
        raise InvalidArgument(f"starts: got the levels {sorted(starts)}, expected {sorted(names)}")
    sums = {name: {key: torch.zeros_like(value) for key, value in starts[name].items()} for name in names}
    anywhere = next((value for params in starts.values() for value in params.values()), torch.zeros(()))
    counts = {name: torch.zeros((), dtype=torch.long, device=anywhere.device) for name in names}
    return FastWeights(0, {name: dict(starts[name]) for name in names}, sums, counts, state)


def learn_in_context(
    model: InnerModel,
    starts: LevelParams,
    inputs: Tensor,
    targets: Tensor,
    levels: Sequence[Level],
    update: Update,
    *,
    wiring: str = "sequential",
    chunk_size: int | None = None,
    state: FastWeights | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, FastWeights]:
    """Run a sequence while its levels learn from it: every C_l tokens, level l moves by their mean loss gradient.

    The tokens are cut at every boundary of the clock. In each piece the loss is taken at the weights the piece was
    computed with, so no logit depends on its own target; this inner gradient is the partial one, in which the model's
    state and the other levels' earlier updates are constants, as they are in a stream. The whole is differentiable: an
    outer loss on the logits reaches ``starts``, ``model`` and the rates through every update. Under ``torch.no_grad()``
    nothing of that is kept. ``nested`` wiring sends a level back to its start when its parent's period ends. A batch
    shares one set of fast weights; for one set a sequence use ``torch.vmap`` over this function.

    Args:
        model: (level parameters, inputs of a piece, state) -> (logits [..., piece, vocab], state).
        starts: level -> name -> tensor: where each level starts, the outer parameters.
        inputs: tokens [..., time], or whatever ``model`` reads, with time last.
        targets: the next token of each input, [..., time]; ``ignore_index`` where there is nothing to learn.
        levels: the clock's levels; one with ``every=None`` stays at its start.
        update: (level name, parameters, mean gradients) -> parameters; see :func:`gradient_descent`.
        wiring: one of :data:`WIRINGS`; only ``nested`` matters here.
        chunk_size: also cut at multiples of this many tokens.
        state: where an earlier call left off.

    Returns:
        The logits of all tokens, [..., time, vocab], and the state to go on from.
    """
    check_wiring(wiring)
    now = state or start_in_context(starts, levels)
    clock, outputs, at = Clock(levels, now.tokens), [], 0
    for size in clock.pieces(targets.shape[-1], chunk_size):
        piece = slice(at, at + size)
        logits, now = _accumulate(model, now, inputs[..., piece], targets[..., piece], clock.levels, ignore_index)
        outputs.append(logits)
        at += size
        for boundary in clock.advance(size):
            now = _step(now, starts, boundary.due, update)
            if wiring == "nested":
                now = _at_start(now, starts, [level.name for level in clock.resets(boundary.due)])
    if not outputs:
        raise InvalidArgument("inputs: got no tokens, expected at least one")
    return torch.cat(outputs, dim=-2), now


def _accumulate(
    model: InnerModel, now: FastWeights, inputs: Tensor, targets: Tensor, levels: Sequence[Level], ignore_index: int
) -> tuple[Tensor, FastWeights]:
    """Compute one piece and add its loss gradient to the sums of all levels that are ever due."""
    moving = {level.name: dict(now.levels[level.name]) for level in levels if level.every}

    def loss(moving: LevelParams) -> tuple[Tensor, tuple[Tensor, Any]]:
        logits, state = model({**now.levels, **moving}, inputs, now.model)
        flat = logits.reshape(-1, logits.shape[-1])
        total = F.cross_entropy(flat, targets.reshape(-1), ignore_index=ignore_index, reduction="sum")
        return total, (logits, state)

    grads, (logits, state) = torch.func.grad(loss, has_aux=True)(moving)
    sums = {name: {key: total + grads[name][key] for key, total in now.sums[name].items()} for name in moving}
    new = (targets != ignore_index).sum()
    counts = {name: count + new if name in moving else count for name, count in now.counts.items()}
    return logits, FastWeights(now.tokens + targets.shape[-1], now.levels, {**now.sums, **sums}, counts, state)


def _step(now: FastWeights, starts: LevelParams, due: Sequence[Level], update: Update) -> FastWeights:
    """Update the due levels by their mean gradient and empty their sums."""
    changed, sums, counts = dict(now.levels), dict(now.sums), dict(now.counts)
    for name in (level.name for level in due):
        mean = {key: total / counts[name].clamp(min=1) for key, total in sums[name].items()}
        changed[name] = update(name, changed[name], mean)
        sums[name] = {key: torch.zeros_like(value) for key, value in starts[name].items()}
        counts[name] = torch.zeros_like(counts[name])
    return FastWeights(now.tokens, changed, sums, counts, now.model)


def _at_start(now: FastWeights, starts: LevelParams, names: Sequence[str]) -> FastWeights:
    """Send the named levels back to their start, with empty sums."""
    fresh = {name: {key: torch.zeros_like(value) for key, value in starts[name].items()} for name in names}
    counts = {name: torch.zeros_like(now.counts[name]) for name in names}
    levels = {**now.levels, **{name: dict(starts[name]) for name in names}}
    return FastWeights(now.tokens, levels, {**now.sums, **fresh}, {**now.counts, **counts}, now.model)
