"""The problems of ``everlearn eval optim``: two constructions of *Nested Learning*, an image and a language task.

The paper describes the surface of its section 4.4 and the orthogonal tasks of section 4.3 in words and a figure; the
constructions here are ours, written down in :class:`OscillatingSurface` and :class:`OrthogonalTasks`.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.models.hope import HopeConfig
from everlearn.models.registry import build, family_config
from everlearn.optim import param_groups
from everlearn.train.data import load_corpus

LENGTH = 128
"""Bytes a row of the language task."""


class Problem:
    """A model to train: ``loss(step)`` on that step's batch, ``measure()`` on held-out data, ``final()`` at the end.

    The same seed gives the same start and the same batches to every optimiser. ``measure()["loss"]`` is what rates are
    tuned by; ``final()`` is measured on data that tuning never saw.
    """

    tokens_per_step = 1
    model: nn.Module

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups."""
        return param_groups(self.model)

    def loss(self, step: int) -> Tensor:
        """Return the training loss of ``step``."""
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        """Return validation metrics; ``loss`` among them."""
        raise NotImplementedError

    def final(self) -> dict[str, float]:
        """Return test metrics; by default the validation metrics."""
        return self.measure()


class OscillatingSurface(Problem):
    """A valley whose walls' curvature oscillates along its floor (after section 4.4), with noisy gradients.

        f(x, y) = 0.05 x^2 + k(x) y^2 / 2,     k(x) = 4 (1 + 0.9 sin(3 x))

    from about (-4, 0.8), gradient noise of standard deviation 0.05. A momentum that averages over one period of the
    curvature is too fast where it is high and too slow where it is low; one that forgets by what it sees need not be.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        start = torch.tensor([-4.0, 0.8]) + 0.1 * torch.randn(2, generator=self.generator)
        self.model = nn.ParameterDict({"point": nn.Parameter(start)})
        self.path: list[list[float]] = [start.tolist()]

    @staticmethod
    def height(x: Tensor, y: Tensor) -> Tensor:
        """Return ``f(x, y)``."""
        return 0.05 * x**2 + 2 * (1 + 0.9 * torch.sin(3 * x)) * y**2

    def groups(self) -> list[dict[str, Any]]:
        """Return the point as one row for the matrix rule."""
        return [{"params": list(self.model.parameters()), "rule": "matrix"}]

    def loss(self, step: int) -> Tensor:
        """Return the height, tilted at random; records the path."""
        point: Tensor = self.model["point"]  # pyright: ignore[reportIndexIssue]
        if step:
            self.path.append(point.tolist())
        noise = 0.05 * torch.randn(2, generator=self.generator)
        return self.height(point[0], point[1]) + noise @ point

    def measure(self) -> dict[str, float]:
        """Return the height without noise."""
        point: Tensor = self.model["point"].detach()  # pyright: ignore[reportIndexIssue]
        return {"loss": float(self.height(point[0], point[1]))}

    def final(self) -> dict[str, float]:
        """Return the last height, the mean height along the path, and how far the point swung across the valley."""
        path = torch.tensor(self.path)
        swing = float(path[:, 1].diff().abs().sum())
        return {**self.measure(), "mean_loss": float(self.height(path[:, 0], path[:, 1]).mean()), "swing": swing}


class OrthogonalTasks(Problem):
    """Two linear regressions with orthogonal inputs, one after the other (after section 4.3).

    A matrix W ``[16, 32]`` first learns ``y = A x + noise`` for x in a random 16-dimensional subspace, then ``y = B x +
    noise`` for x in its orthogonal complement. The gradients of the second task are zero on the subspace of the first:
    plain gradient descent forgets nothing, and whatever is lost is the optimiser's doing. ``destroyed`` is the share of
    what was learned on the first task that the second task took away, negative where it went on improving.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(32, 32, generator=self.generator))[0]
        self.bases = rotation[:, :16], rotation[:, 16:]
        self.targets = [torch.randn(16, 32, generator=self.generator) / 4 for _ in range(2)]
        self.linear = self.model = nn.Linear(32, 16, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(16, 32, generator=self.generator) / 32)
        self.switch, self.second = steps // 2, False
        self.learned = [self.error(0), self.error(0)]

    def error(self, task: int) -> float:
        """Return the expected squared error of ``task`` without its noise."""
        difference = (self.linear.weight.detach() - self.targets[task]) @ self.bases[task]
        return 0.5 * float(difference.square().sum())

    def loss(self, step: int) -> Tensor:
        """Return half the squared error of a batch of 8 of the task at hand."""
        task = int(step >= self.switch)
        if task and not self.second:
            self.learned[1], self.second = self.error(0), True
        x = torch.randn(8, 16, generator=self.generator) @ self.bases[task].mT
        y = x @ self.targets[task].mT + 0.3 * torch.randn(8, 16, generator=self.generator)
        return 0.5 * (self.linear(x) - y).square().sum(-1).mean()

    def measure(self) -> dict[str, float]:
        """Return how well each task was learned when its turn ended; forgetting is not part of it."""
        return {"loss": (self.learned[1] if self.second else self.error(0)) + self.error(1)}

    def final(self) -> dict[str, float]:
        """Return the errors and the share of the first task that was destroyed."""
        before, learned = self.learned
        destroyed = (self.error(0) - learned) / (before - learned) if learned < before else math.nan
        return {
            "loss": self.error(1),
            "first_task_learned": learned,
            "first_task": self.error(0),
            "destroyed": destroyed,
        }


class Digits(Problem):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, by a network of two hidden layers; batches of 64."""

    tokens_per_step = 64

    def __init__(self, seed: int, steps: int, width: int = 64) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # one split for all seeds
        x = torch.tensor(images, dtype=torch.float32)[order] / 8 - 1
        y = torch.tensor(labels)[order]
        self.train, self.validation, self.test = zip(x.split([1197, 300, 300]), y.split([1197, 300, 300]))
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential()
        for name, rows in (("first", 64), ("second", width)):
            self.model.add_module(name, nn.Linear(rows, width))
            self.model.add_module(f"{name}_activation", nn.SiLU())
        self.model.add_module("head", nn.Linear(width, 10))

    def loss(self, step: int) -> Tensor:
        """Return the cross-entropy of a random batch."""
        rows = torch.randint(len(self.train[0]), (64,), generator=self.generator)
        return F.cross_entropy(self.model(self.train[0][rows]), self.train[1][rows])

    def measure(self) -> dict[str, float]:
        """Return loss and accuracy on the validation images."""
        return self._score(self.validation)

    def final(self) -> dict[str, float]:
        """Return loss and accuracy on the test images."""
        return self._score(self.test)

    @torch.no_grad()
    def _score(self, part: tuple[Tensor, Tensor]) -> dict[str, float]:
        logits = self.model(part[0])
        hits = (logits.argmax(-1) == part[1]).float().mean()
        return {"loss": float(F.cross_entropy(logits, part[1])), "accuracy": float(hits)}


class ByteLM(Problem):
    """Next-byte prediction on books by a small model of any family, with the parameters of a small HOPE; 4 x 128 bytes.

    Of ``data/books`` where there is such a folder, else of ``data``, the last tenth of every text is held out: its
    first half for tuning (16 windows evenly spaced), its second half for the result (64 windows).
    """

    tokens_per_step = 4 * 128

    def __init__(self, seed: int, steps: int, data: Path, family: str = "transformer") -> None:
        self.train, validation, test = _load_bytes(Path(data))
        self.validation, self.test = _windows(validation, 16), _windows(test, 64)
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        memory = {"width": 16, "recompute": False}
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 139,
        }
        hope = HopeConfig(vocab_size=256, memory=memory, **sizes)
        self.model = build(hope if family == "hope" else family_config(family, hope))

    def loss(self, step: int) -> Tensor:
        """Return the cross-entropy of random windows."""
        starts = torch.randint(len(self.train) - LENGTH, (4, 1), generator=self.generator)
        return self._loss(self.train[starts + torch.arange(LENGTH + 1)])

    def measure(self) -> dict[str, float]:
        """Return the loss on the validation text, in nats a byte."""
        return self._score(self.validation)

    def final(self) -> dict[str, float]:
        """Return the loss on the test text, in nats and in bits a byte."""
        score = self._score(self.test)
        return {**score, "bits_per_byte": score["loss"] / math.log(2)}

    @torch.no_grad()
    def _score(self, windows: Tensor) -> dict[str, float]:
        return {"loss": sum(float(self._loss(part)) * len(part) for part in windows.split(16)) / len(windows)}

    def _loss(self, windows: Tensor) -> Tensor:
        windows = windows.long()
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@functools.cache
def _load_bytes(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes to train on, of validation and of test."""
    books = data / "books"
    corpus = load_corpus(books if books.is_dir() else data, held_out=0.1)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in corpus.held_out]
    parts = ["\n".join(texts).encode() for texts in (corpus.train, *zip(*halves))]
    if sum(map(len, parts)) < 20_000:
        raise InvalidArgument(f"data: got {sum(map(len, parts))} bytes of text in {data}, expected at least 20,000")
    train, validation, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, validation, test


def _windows(text: Tensor, count: int) -> Tensor:
    """Return up to ``count`` windows ``[n, LENGTH + 1]``, evenly spaced."""
    whole = (len(text) - 1) // LENGTH
    first = torch.arange(min(count, whole)) * whole // min(count, whole) * LENGTH
    return text[first[:, None] + torch.arange(LENGTH + 1)]
