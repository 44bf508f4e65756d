"""The configuration of a self-modifying memory: every decision and ablation of nested-learning.md, section 4."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from everlearn.errors import InvalidArgument
from everlearn.memories.matrix import MatrixMemory, WriteRule
from everlearn.memories.mlp import MlpMemory

__all__ = ["ADAPTIVE", "SelfModifyingConfig"]

ADAPTIVE = ("q", "k", "v", "eta", "alpha")
READS = ("token", "boundary")
RETENTIONS = ("zero", "start")
FORGETTING = ("W1", "W2")
RECOMPUTE = ("parts", "chunk", "nothing")


@dataclass(frozen=True)
class SelfModifyingConfig:
    """Sizes, rules and ablations of :class:`everlearn.memories.self_modifying.SelfModifyingMemory`.

    Args:
        hidden_size: size of the layer's input and output.
        num_heads: heads; each has its own memories of size ``hidden_size / num_heads``.
        width: hidden units r of a memory; None is the head size.
        chunk_size: tokens between updates of what the main memory's gradients are taken at.
        projection_chunk_size: the same for the other memories; a multiple of ``chunk_size``; None is ``chunk_size``.
        structure: ``"mlp"``, ``x + W1 s(W2 x)``, or ``"matrix"``, ``W x``.
        activation: ``s``: ``"silu"``, ``"tanh"`` or ``"relu"``.
        adaptive: which projections are memories themselves, of ``q, k, v, eta, alpha``; the others stay as trained.
        rule: ``"dgd"`` or ``"gd"``, see :class:`everlearn.memories.matrix.WriteRule`.
        objective: ``"l2"`` or ``"dot"``.
        self_targets: memories learn towards targets of their own, ``M(v)``; otherwise towards ``v``.
        max_error: see :class:`everlearn.memories.matrix.WriteRule`.
        target_gradient: the outer gradient also flows through ``M(v)`` (the inner one never does).
        decay: memories forget at ``alpha``; otherwise ``alpha = 1``.
        forgetting: which matrices of a network decay and erase, ``alpha I - eta' x x^T``, of ``W1`` and ``W2``; one
            that does not is written by plain gradient descent and keeps all.
        retention: what a forgetting memory returns to: ``"zero"``, or its trained ``"start"``, of which a chunk's end
            gives back what the chunk's decay took.
        momentum: theta of the inner momentum, stepped once a chunk; 0 is none.
        read: ``"token"``, with the state after the token; ``"boundary"``, with that at the chunk's start (Eq. 90).
        normalize_values: give ``v`` unit length, as ``q`` and ``k`` have.
        eta_max: largest inner rate; ``eta_init`` the rate at the start of training.
        alpha_init: ``alpha`` at the start of training.
        conv_width: taps of the causal convolution on the input.
        output_norm: normalise each head's read before the output projection.
        output_gate: multiply what is read by ``silu(W_g x)`` before the output projection, as Titans does; the paper's
            equations stop at the read.
        recompute: what the backward computes again: ``"parts"``, all of a chunk but what its writes are made of;
            ``"chunk"``, everything between chunk boundaries, the least memory; ``"nothing"``. True and False are the
            first and the last.
        compile: train whole chunks with ``torch.compile``, which takes a minute or two at the first step and gives the
            same up to rounding: faster, for memory. It keeps what it finds worth keeping in place of ``"parts"``. Not
            under ``torch.func`` transforms.

    Raises:
        InvalidArgument: sizes that do not divide, unknown names, rates out of range.
    """

    hidden_size: int
    num_heads: int
    width: int | None = None
    chunk_size: int = 64
    projection_chunk_size: int | None = None
    structure: str = "mlp"
    activation: str = "silu"
    adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
    rule: str = "dgd"
    objective: str = "l2"
    self_targets: bool = True
    target_gradient: bool = True
    max_error: float | None = 2.0
    decay: bool = True
    forgetting: tuple[str, ...] = ("W1", "W2")
    retention: str = "start"
    momentum: float = 0.0
    read: str = "token"
    normalize_values: bool = True
    eta_max: float = 1.0
    eta_init: float = 0.05
    alpha_init: float = 0.99
    conv_width: int = 4
    output_norm: bool = True
    output_gate: bool = True
    recompute: str | bool = "parts"
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "adaptive", tuple(self.adaptive))
        object.__setattr__(self, "forgetting", tuple(self.forgetting))
        if isinstance(self.recompute, bool):
            object.__setattr__(self, "recompute", "parts" if self.recompute else "nothing")
        for name in ("hidden_size", "num_heads", "chunk_size", "conv_width", "head_width", "outer_chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"{name}: got {value!r}, expected a whole number of at least 1")
        if self.hidden_size % self.num_heads:
            raise InvalidArgument(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_heads = {self.num_heads}"
            )
        if self.outer_chunk_size % self.chunk_size:
            raise InvalidArgument(
                f"projection_chunk_size: got {self.projection_chunk_size}, "
                f"expected a multiple of chunk_size = {self.chunk_size}"
            )
        if unknown := set(self.adaptive) - set(ADAPTIVE):
            raise InvalidArgument(f"adaptive: got {sorted(unknown)}, expected names out of {ADAPTIVE}")
        if unknown := set(self.forgetting) - set(FORGETTING):
            raise InvalidArgument(f"forgetting: got {sorted(unknown)}, expected names out of {FORGETTING}")
        if self.structure not in ("mlp", "matrix"):
            raise InvalidArgument(f"structure: got {self.structure!r}, expected 'mlp' or 'matrix'")
        if self.read not in READS:
            raise InvalidArgument(f"read: got {self.read!r}, expected one of {READS}")
        if self.retention not in RETENTIONS:
            raise InvalidArgument(f"retention: got {self.retention!r}, expected one of {RETENTIONS}")
        if self.recompute not in RECOMPUTE:
            raise InvalidArgument(f"recompute: got {self.recompute!r}, expected one of {RECOMPUTE}")
        if not 0 <= self.momentum < 1:
            raise InvalidArgument(f"momentum: got {self.momentum}, expected a number in [0, 1)")
        if not 0 < self.eta_init < self.eta_max:
            raise InvalidArgument(f"eta_init: got {self.eta_init}, expected a number in (0, eta_max = {self.eta_max})")
        if not 0 < self.alpha_init < 1:
            raise InvalidArgument(f"alpha_init: got {self.alpha_init}, expected a number in (0, 1)")
        self.memory_structure()
        self.write_rule()

    @property
    def head_size(self) -> int:
        """Size of keys, values and queries of one head."""
        return self.hidden_size // self.num_heads

    @property
    def head_width(self) -> int:
        """Hidden units of one memory."""
        return self.head_size if self.width is None else self.width

    @property
    def outer_chunk_size(self) -> int:
        """Chunk of the projections' memories; that of the main memory when there are none."""
        given = self.projection_chunk_size
        return self.chunk_size if given is None or not self.projections else given

    @property
    def roles(self) -> tuple[str, ...]:
        """What the input is projected to; the adaptive ones come first, in the order of their memories."""
        wanted = [name for name in ADAPTIVE if name != "alpha" or self.decay]
        return tuple(sorted(wanted, key=lambda name: name not in self.adaptive))

    @property
    def projections(self) -> int:
        """How many memories are projections; the main memory comes after them."""
        return sum(name in self.adaptive for name in self.roles)

    def memory_structure(self) -> MlpMemory | MatrixMemory:
        """The structure all memories share."""
        return MlpMemory(self.activation, self.forgets) if self.structure == "mlp" else MatrixMemory()

    def write_rule(self) -> WriteRule:
        """How memories are written."""
        return WriteRule(self.rule, self.objective, self.self_targets, self.max_error, self.target_gradient)

    @property
    def forgets(self) -> tuple[bool, ...]:
        """Of each parameter of a memory, in their order, whether it decays."""
        return (True,) if self.structure == "matrix" else ("W2" in self.forgetting, "W1" in self.forgetting)

    def replace(self, **changes: object) -> SelfModifyingConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
