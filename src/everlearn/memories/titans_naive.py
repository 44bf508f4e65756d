"""The definition of Titans' neural memory, token by token: the reference of :mod:`everlearn.memories.titans`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.memories.matrix import Params
from everlearn.memories.titans import Inputs, NeuralMemory

__all__ = ["titans_naive"]

SMOOTH = {"silu": F.silu, "tanh": torch.tanh, "relu": torch.relu}


def titans_naive(memory: NeuralMemory, inputs: Inputs, chunk_size: int) -> tuple[Tensor, Params, Params]:
    """Reads ``[N, d, T]``, parameters and momentum after ``T`` tokens, from the trained starts.

    The gradients come from ``torch.func.grad`` on the loss as it is written, at the parameters of the chunk's start.
    """
    smooth, limit = SMOOTH[memory.structure.activation], memory.rule.max_error
    now = memory.init_carry(inputs.k.shape[0] // memory.w2.shape[0]).start
    momentum, start = tuple(torch.zeros_like(w) for w in now), now

    def network(params: Params, x: Tensor) -> Tensor:
        return x + (params[1] @ smooth(params[0] @ x.unsqueeze(-1))).squeeze(-1)

    def loss(params: Params, k: Tensor, v: Tensor) -> Tensor:
        squared = (network(params, k) - v).square().sum(-1)
        if limit is None:
            return 0.5 * squared.sum()
        return torch.where(squared <= limit**2, 0.5 * squared, limit * squared.sqrt() - 0.5 * limit**2).sum()

    begun, kept = now, inputs.step.new_ones(inputs.step.shape[0], 1, 1)
    reads = []
    for t in range(inputs.k.shape[-1]):
        if t % chunk_size == 0:
            start = now
        grads = torch.func.grad(loss)(start, inputs.k[..., t], inputs.v[..., t])
        step, keep, eta = (x[:, t, None, None] for x in (inputs.step, inputs.log_keep.exp(), inputs.log_momentum.exp()))
        momentum = tuple(eta * s - step * g for s, g in zip(momentum, grads))
        now = tuple(keep * w + s for w, s in zip(now, momentum))
        reads.append(network(now, inputs.q[..., t]))
        kept = kept * keep
        if (t + 1) % chunk_size == 0:
            if memory.retention == "start":
                now = tuple(w + (1 - kept) * old for w, old in zip(now, begun))
            kept = torch.ones_like(kept)
    return torch.stack(reads, dim=-1), now, momentum
