"""Which parameters a rule for matrices gets: hidden matrices; vectors, embeddings and heads go to AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from everlearn.optim.base import ADAMW, MATRIX

HEADS = ("lm_head", "embed_out", "output_projection", "head", "classifier", "score")
"""Names of output layers, where a model does not say itself which layer that is (``get_output_embeddings``)."""


def param_groups(model: nn.Module, *, heads: Iterable[str] = HEADS) -> list[dict[str, Any]]:
    """Return parameter groups of ``model`` for the optimisers of this package, or any other.

    Args:
        model: its parameters that require a gradient are grouped; shared ones once.
        heads: modules with these names, anywhere in the model, are output layers.

    Returns:
        Up to four groups: ``rule="matrix"`` for matrices and the weights of convolutions; the same, ``stacked``, for
        other weights of three or more dimensions, which are stacks of matrices ``[*batch, out, in]`` (the memories of
        HOPE, experts); ``rule="adamw"`` for embeddings and heads; ``rule="adamw"`` without weight decay for vectors.
        Vectors are also the filters of a depthwise convolution, and the parameters that a module names in
        ``row_vectors``: each row is a vector of its own.
    """
    heads = set(heads)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    kept = set() if output is None else {id(p) for p in output.parameters()}
    filters, vectors = set(), {id(p) for p in model.parameters() if p.ndim < 2}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or name.rpartition(".")[2] in heads:
            kept.update(id(p) for p in module.parameters())
        if isinstance(module, _ConvNd):
            (vectors if module.groups == module.in_channels > 1 else filters).add(id(module.weight))
        vectors.update(id(getattr(module, row)) for row in getattr(module, "row_vectors", ()))
    groups: list[dict[str, Any]] = [
        {"params": [], "rule": MATRIX},
        {"params": [], "rule": MATRIX, "stacked": True},
        {"params": [], "rule": ADAMW},
        {"params": [], "rule": ADAMW, "weight_decay": 0.0},
    ]
    for p in model.parameters():
        if p.requires_grad:
            stacked = p.ndim > 2 and id(p) not in filters
            place = 3 if id(p) in vectors else 2 if id(p) in kept else 1 if stacked else 0
            groups[place]["params"].append(p)
    return [group for group in groups if group["params"]]
