"""One trainer for all models that evaluations train from scratch, and what a run cost."""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.evals.results import compute_clock
from everlearn.train.trainer import make_optimizer

__all__ = ["Batch", "Fitted", "PeakMemory", "Recipe", "cross_entropy", "device", "fit", "parameters", "score"]

IGNORED = -100
"""A target that is not scored."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        steps: of the optimiser.
        lr: highest rate, reached after ``warmup`` (a share of the steps), then falling along a cosine to ``lr_end``;
            ``schedule="constant"`` stays there.
        weight_decay: of matrices; see :func:`everlearn.train.trainer.make_optimizer`.
        betas, eps: of Adam.
        clip: longest gradient over all parameters, None for no bound.
        checks: how often the validation score is taken, evenly over the steps.
        every: steps between changes of the rate.
    """

    steps: int
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: str = "cosine"
    lr_end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    checks: int = 1
    every: int = 1

    def rate(self, step: int) -> float:
        """Return the rate of ``step``, as a share of ``lr``."""
        step, warm = step - step % self.every, self.warmup * self.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        share = (step - warm) / max(self.steps - warm, 1)
        end = self.lr_end / self.lr
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * share))


class Batch(NamedTuple):
    """``inputs`` and ``targets`` ``[B, T]``: the target at a position is what its own output is scored by, or -100."""

    inputs: Tensor
    targets: Tensor


class Fitted(NamedTuple):
    """What training made; ``seconds`` are of computing, without checks; ``loss`` is None where it diverged, ``score``
    is that of the best check (None: it diverged, or there was none)."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None
    score: tuple[float, ...] | None


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the scored positions of a batch."""
    logits = model(input_ids=batch.inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)


def fit(
    model: Any,
    batches: Callable[[int], Any],
    recipe: Recipe,
    *,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    validate: Callable[[], tuple[float, ...]] | None = None,
    enough: Callable[[tuple[float, ...]], bool] = lambda score: False,
    tell: Callable[[float], None] = lambda share: None,
) -> Fitted:
    """Train ``model`` and leave it in evaluation mode, as it was at the check with the best score.

    Levels of a continuum memory step on their own clocks. A loss that is not finite ends the run.

    Args:
        model: one of our decoders, or a module with its ``levels`` and ``level_parameters``.
        batches: step -> batch; a :class:`Batch`, or whatever ``loss`` takes (``inputs`` is counted).
        recipe: see :class:`Recipe`.
        loss: ``(model, batch)`` -> a scalar.
        validate: returns the score, compared as a tuple, highest first; of equal ones the later counts.
        enough: a score that ends the training.
        tell: called with the share of the training that is done.
    """
    where, clock = device(), compute_clock()
    model.to(where).train()
    optimizer, steps, tokens, seconds, last = None, 0, 0, 0.0, None
    best: tuple[tuple[float, ...], dict[str, Tensor]] | None = None
    marks = {round(recipe.steps * (i + 1) / recipe.checks) for i in range(recipe.checks)}
    for step in range(recipe.steps):
        began = clock()
        batch = batches(step)
        batch = type(batch)(*(part.to(where) for part in batch))
        if optimizer is None:
            optimizer = make_optimizer(
                model, recipe.lr, recipe.weight_decay, batch.inputs.numel(), betas=recipe.betas, eps=recipe.eps
            )
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.rate(step)
        value = loss(model, batch)
        value.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        last = value.item()
        if not math.isfinite(last):
            return Fitted(steps, tokens, seconds, None, None)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens = step + 1, tokens + batch.inputs.numel()
        seconds += clock() - began
        if steps in marks:
            tell(steps / recipe.steps)
        if validate is not None and steps in marks:
            model.eval()
            found = validate()
            if best is None or found >= best[0]:
                best = found, copy.deepcopy(model.state_dict())
            if enough(found):
                break
            model.train()
    if best is not None:
        model.load_state_dict(best[1])
    model.eval()
    return Fitted(steps, tokens, seconds, last, best[0] if best is not None else None)


class Score(NamedTuple):
    """How right the scored positions are: by position, over whole rows, and by class (the mean over classes)."""

    accuracy: float
    sequences: float
    macro: float
    loss: float


@torch.no_grad()
def score(model: Any, batches: Any, predict: Callable[[Any, Batch], Tensor] | None = None) -> Score:
    """Score a model over batches.

    Args:
        model: one of our decoders.
        batches: :class:`Batch` objects.
        predict: ``(model, batch)`` -> logits ``[B, T, classes]``; by default the decoder's own.

    Returns:
        a :class:`Score`; ``macro`` is torchmetrics' default for classes: the mean of the accuracies of all classes that
        occur among targets or predictions (0 for one that is predicted only).
    """
    hits = total = rows = whole = 0
    loss, counts = 0.0, torch.zeros(3, 1)
    for batch in batches:
        batch = type(batch)(*(part.to(device()) for part in batch))
        logits = predict(model, batch) if predict is not None else model(input_ids=batch.inputs, use_cache=False).logits
        scored = batch.targets != IGNORED
        correct = (logits.argmax(-1) == batch.targets) & scored
        hits, total = hits + int(correct.sum()), total + int(scored.sum())
        rows, whole = rows + len(scored), whole + int((correct | ~scored).all(1).sum())
        loss += float(
            F.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        )
        found = [batch.targets[correct], batch.targets[scored], logits.argmax(-1)[scored]]
        counts = counts + torch.stack([torch.bincount(x.cpu(), minlength=logits.shape[-1]) for x in found])
    right, wanted, predicted = counts
    macro = float((right / wanted.clamp(min=1))[wanted + predicted > 0].mean())
    return Score(hits / total, whole / rows, macro, loss / total)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def device() -> torch.device:
    """Return where evaluations run: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PeakMemory:
    """The most memory this process held since this was made (on a GPU: that of its tensors); they may be nested."""

    _live: weakref.WeakSet[PeakMemory] = weakref.WeakSet()

    def __init__(self) -> None:
        self._before = 0
        for other in PeakMemory._live:  # what they have seen so far is about to be reset
            other._before = other.bytes()
        PeakMemory._live.add(self)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # not Linux: the peak is that of the whole process
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Return the peak."""
        return max(self._before, _peak())


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
