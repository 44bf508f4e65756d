"""transformers' Trainer with one clock a level of the continuum memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer

from everlearn.levels import Level
from everlearn.models.backbone import BackboneForCausalLM
from everlearn.optim.multi_frequency import MultiFrequency
from everlearn.train.data import PackedRows

__all__ = ["LevelTrainer", "make_optimizer"]

BETAS = (0.9, 0.95)


def make_optimizer(
    model: BackboneForCausalLM,
    lr: float,
    weight_decay: float,
    tokens_per_step: int,
    *,
    betas: tuple[float, float] = BETAS,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW for everything; where there are levels, each steps on its own clock (Eq. 71).

    Matrices outside the embedding and the memories' trained starts decay, nothing else does. A level that waits for
    several steps gets the mean of their gradients.
    """
    held = model.level_parameters()
    where = {id(p): name for name, parameters in held.items() for p in parameters}
    embedding = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embedding
    sorted_out: dict[tuple[str, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            key = where.get(id(p), "every step"), weight_decay if id(p) in decaying else 0.0
            sorted_out.setdefault(key, []).append(p)
    if not held:
        groups = [{"params": found, "weight_decay": decay} for (_, decay), found in sorted_out.items()]
        return AdamW(groups, lr=lr, betas=betas, eps=eps)

    periods = {level.name: level.every for level in model.levels()}
    groups: list[dict[str, Any]] = []
    for i, ((name, decay), found) in enumerate(sorted_out.items()):

        def adamw(params: Any, decay: float = decay) -> Optimizer:
            return AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=decay)

        groups.append({"params": found, "level": Level(f"group{i}", periods.get(name, 1), optimizer=adamw)})
    return MultiFrequency(groups, tokens_per_step=tokens_per_step, reduction="mean")


class LevelTrainer(Trainer):
    """A Trainer whose optimiser is :func:`make_optimizer`'s, and which measures held-out loss exactly."""

    def __init__(self, *args: Any, tokens_per_step: int, **kwargs: Any) -> None:
        self.tokens_per_step = tokens_per_step
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Make the optimiser once."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            target = getattr(target, "module", target)
            args = self.args
            self.optimizer = make_optimizer(target, args.learning_rate, args.weight_decay, self.tokens_per_step)
        return self.optimizer

    @torch.no_grad()
    def held_out_loss(self, rows: PackedRows) -> float:
        """Mean loss a predicted token in nats over all ``rows``, the same for any number of processes."""
        model: Any = self.model
        training, model = model.training, model.eval()
        rank, world, size = self.accelerator.process_index, self.accelerator.num_processes, self.args.eval_batch_size
        mine = list(range(rank, len(rows), world))
        totals = torch.zeros(2, dtype=torch.float64)
        for i in range(0, len(mine), size):
            ids = rows.tokens[mine[i : i + size]]
            documents = rows.documents[mine[i : i + size]]
            inputs = {"input_ids": ids, "labels": ids, "document_ids": documents}
            inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
            with self.compute_loss_context_manager():
                loss = model(**inputs, use_cache=False, num_items_in_batch=1).loss  # the sum
            counted = (documents[:, 1:] == documents[:, :-1]).sum()
            totals += torch.tensor([loss.item(), counted.item()], dtype=torch.float64)
        model.train(training)
        device = "cpu" if self.args.device.type == "mps" else self.args.device  # no float64 there
        summed: Any = self.accelerator.reduce(totals.to(device), reduction="sum")
        return (summed[0] / summed[1]).item()
