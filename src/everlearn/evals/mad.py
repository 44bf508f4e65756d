"""``everlearn eval mad``: the six synthetic tasks of MAD (synthetic-tasks.md, A).

A task's score is the mean over its settings, the MAD score the mean over tasks, both of the macro accuracy (the mean
over classes); the micro accuracy stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.evals.contestants import Size, make
from everlearn.evals.fitting import Batch, Recipe, cross_entropy, fit, parameters, score
from everlearn.evals.mad_tasks import TASKS, examples, settings
from everlearn.evals.suite import Job, Measure, Outcome, Suite

__all__ = ["MAD", "AutoEncoder", "Budget"]


@dataclass(frozen=True)
class Budget:
    """Numbers of the protocol; ``settings`` is how many of a task's settings are trained in, None for all."""

    size: Size
    settings: int | None
    train: int | None
    test: int
    validation: int
    epochs: int
    batch: int
    grid: tuple[dict[str, Any], ...]
    steps: int | None = None
    tune_each: bool = False


HOPE = {"chunk_size": 32, "recompute": False}
OTHERS = {"titans": {"chunk_size": 32}}
SWEEP = tuple({"lr": lr, "weight_decay": decay} for lr in (1e-4, 5e-4, 1e-3) for decay in (0.0, 0.1))
BUDGETS = {
    "tiny": Budget(Size(16, 1, 2, 16, HOPE), 2, 16, 8, 8, 1, 8, ({"lr": 1e-3, "weight_decay": 0.0},), steps=2),
    "small": Budget(
        Size(64, 2, 4, 106, HOPE, others=OTHERS),
        1,
        None,
        320,
        320,
        1,
        32,
        ({"lr": 3e-3, "weight_decay": 0.0},),
        steps=400,
    ),
    "paper": Budget(Size(128, 2, 4, 214, HOPE, others=OTHERS), None, None, 1280, 1280, 200, 128, SWEEP, tune_each=True),
}


class AutoEncoder(nn.Module):
    """The compression task's model: a decoder's last output, which each position is read off from by a small network.

    Args:
        decoder: one of ours; its embedding and its output layer are used.
        length: positions.
    """

    def __init__(self, decoder: Any, length: int) -> None:
        super().__init__()
        self.decoder = decoder
        width = decoder.config.hidden_size
        self.register_buffer("positions", _sin_cos(length, width), persistent=False)
        self.reader = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, length, V]`` for tokens ``[B, T]``."""
        last = self.decoder.model(input_ids=inputs, use_cache=False).last_hidden_state[:, -1:]
        positions: Tensor = self.positions  # pyright: ignore[reportAssignmentType]
        return self.decoder.lm_head(self.reader(last + positions))

    def levels(self) -> Any:
        """The decoder's."""
        return self.decoder.levels()

    def level_parameters(self) -> Any:
        """The decoder's."""
        return self.decoder.level_parameters()


def _sin_cos(length: int, width: int) -> Tensor:
    """Fixed positions ``[length, width]``: sines in the first half, cosines in the second (He et al. 2022)."""
    frequency = 10_000.0 ** (-torch.arange(width // 2) / (width / 2))
    angles = torch.arange(length)[:, None] * frequency
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(batch.inputs)


def _auto_loss(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(_logits(model, batch).flatten(0, 1), batch.targets.flatten())


def _epochs(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end, every epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data.inputs), generator=generator).split(size):
            yield Batch(data.inputs[rows], data.targets[rows])


def run(job: Job, plan: Budget, data: Any, tell: Callable[[str, float], None]) -> Outcome:
    """Train a model on a task in one setting and measure it on the test examples."""
    setting, options = settings(job.task)[job.setting], dict(job.options)
    count = min(setting.examples, plan.train or setting.examples)
    train = examples(job.task, setting, count, 0, testing=False)
    held = [
        [Batch(*parts) for parts in zip(*(x.split(64) for x in examples(job.task, setting, n, i, testing=True)))]
        for i, n in ((1, plan.validation), (2, plan.test))
    ]
    model: Any = make(job.contestant, plan.size, setting.vocab, tied=False)
    loss, predict = cross_entropy, None
    if job.task == "compression":
        model, loss, predict = AutoEncoder(model, setting.length), _auto_loss, _logits
    epoch = math.ceil(count / plan.batch)
    steps = plan.epochs * epoch if plan.steps is None else plan.steps
    recipe = Recipe(
        steps,
        options["lr"],
        options["weight_decay"],
        lr_end=1e-6,
        clip=None,
        checks=10,
        every=min(epoch, steps // 10 + 1),
    )
    batches = _epochs(train, plan.batch, job.seed)
    fitted = fit(model, lambda step: next(batches), recipe, loss=loss, tell=lambda share: tell("training", share))
    found = None if fitted.loss is None else [score(model, part, predict) for part in held]
    measures = [
        Measure(name, None if found is None else getattr(found[1], part))
        for name, part in (("macro", "macro"), ("micro", "accuracy"), ("loss", "loss"))
    ]
    validation = None if found is None else found[0].macro
    return Outcome(measures, validation, parameters(model), fitted.tokens, fitted.steps, fitted.seconds)


def notes(plan: Budget) -> list[str]:
    """Say what differs from the published protocol."""
    size = plan.size
    steps = f"{plan.epochs} epochs" if plan.steps is None else f"{plan.steps} steps"
    all_settings = sum(len(settings(task)) for task in TASKS)
    used = all_settings if plan.settings is None else sum(min(len(settings(t)), plan.settings) for t in TASKS)
    return [
        f"{used} of {all_settings} settings (a task's score is the mean over all)",
        f"{steps} of batch {plan.batch} (published: 200 epochs of batch 128), {plan.test} test examples (1,280)",
        f"hyper-parameters tried: {len(plan.grid)} (published: 6, the best on test data; here on validation data)",
        f"{2 * size.layers} blocks of width {size.hidden_size}, {size.heads} heads (published: 4 of 128; attention 16)",
        f"fp32 (published: bf16); HOPE's memory: {dict(size.memory)}, one level; others: {dict(size.others)}",
    ]


MAD = Suite(
    name="mad",
    version=1,
    tasks=tuple(TASKS),
    budgets=BUDGETS,
    settings=lambda plan, task: list(itertools.islice(settings(task), plan.settings)),
    run=run,
    notes=notes,
)
