"""Which parameters a rule for matrices gets: hidden matrices; vectors, embeddings and heads go to AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from everlearn.optim.base import ADAMW, MATRIX

HEADS = ("lm_head", "embed_out", "output_projection", "head", "classifier", "score")
"""Names of output layers, where a model does not say itself which layer that is (``get_output_embeddings``)."""


def param_groups(model: nn.Module, *, heads: Iterable[str] = HEADS) -> list[dict[str, Any]]:
    """Return parameter groups of ``model`` for the optimisers of this package, or any other.

    Args:
        model: its parameters that require a gradient are grouped; shared ones once.
        heads: modules with these names, anywhere in the model, are output layers.

    Returns:
        Up to three groups: ``rule="matrix"`` for weights of two or more dimensions; ``rule="adamw"`` for embeddings and
        heads; ``rule="adamw"`` without weight decay for vectors.
    """
    heads = set(heads)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    kept = set() if output is None else {id(p) for p in output.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or name.rpartition(".")[2] in heads:
            kept.update(id(p) for p in module.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2 and id(p) not in kept], "rule": MATRIX},
        {"params": [p for p in trained if p.ndim >= 2 and id(p) in kept], "rule": ADAMW},
        {"params": [p for p in trained if p.ndim < 2], "rule": ADAMW, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
