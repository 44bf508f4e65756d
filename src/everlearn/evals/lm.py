"""``everlearn eval lm``: language modelling on books, at equal parameters and tokens.

Perplexity on held-out books, WikiText-2 and LAMBADA's last words, and BLiMP's choice between two sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.evals.contestants import Size, make
from everlearn.evals.fitting import IGNORED, Batch, Recipe, device, fit, parameters
from everlearn.evals.language import books_tokens, encode, tokenizer
from everlearn.evals.sources import Sources
from everlearn.evals.suite import Job, Measure, Outcome, Suite
from everlearn.models.registry import FAMILIES

__all__ = ["LM", "Budget", "log_likelihoods", "negative_log_likelihood", "run"]


@dataclass(frozen=True)
class Budget:
    """Numbers of the protocol; ``tests``: what is measured beside the held-out books; ``test_tokens`` of each text at
    most, ``test_items`` of LAMBADA and of BLiMP at most (evenly over their order); ``warmup``: share of the steps."""

    size: Size
    vocab_size: int
    length: int
    batch: int
    steps: int
    grid: tuple[dict[str, Any], ...]
    test_tokens: int | None = None
    test_items: int | None = None
    tests: tuple[str, ...] = ("wikitext2", "lambada", "blimp")
    warmup: float = 0.05
    tune_each: bool = False


HOPE = {"chunk_size": 64, "width": 32, "recompute": False}
RATES = ({"lr": 3e-3}, {"lr": 1e-2})
BUDGETS = {
    "tiny": Budget(
        Size(16, 1, 2, 16, {"chunk_size": 16}, (1, 64)), 300, 32, 2, 2, ({"lr": 3e-3},), test_tokens=200, test_items=4
    ),
    "small": Budget(
        Size(128, 3, 4, 214, HOPE, (1, 16_384)),
        2048,
        256,
        8,
        500,
        RATES,
        test_tokens=50_000,
        test_items=500,
        warmup=0.2,
    ),
    "paper": Budget(
        Size(1536, 20, 16, 3840, {}, (1, 1 << 20)), 32_000, 4096, 128, 57_000, ({"lr": 4e-4}, {"lr": 1e-3})
    ),
}


def run(job: Job, plan: Budget, data: Any, tell: Callable[[str, float], None]) -> Outcome:
    """Train a model on random windows of the training books and measure it."""
    sources, options = Sources.at(data), dict(job.options)
    made = tokenizer(sources, plan.vocab_size)
    stream, generator = books_tokens(sources, "train", made), torch.Generator().manual_seed(job.seed)
    if len(stream) <= plan.length:
        raise InvalidArgument(f"data: got {len(stream)} tokens of training books, expected more than {plan.length}")

    def batch(step: int) -> Batch:
        starts = torch.randint(len(stream) - plan.length, (plan.batch, 1), generator=generator)
        windows = stream[starts + torch.arange(plan.length + 1)]
        return Batch(windows[:, :-1], windows[:, 1:])

    model = make(job.contestant, plan.size, len(made))
    recipe = Recipe(plan.steps, options["lr"], 0.1, warmup=plan.warmup, betas=(0.9, 0.95), checks=20)
    fitted = fit(model, batch, recipe, tell=lambda share: tell("training", share))
    measured = _Measured(model, made, plan) if fitted.loss is not None else None
    validation = None
    measures: list[Measure] = []
    if measured is not None:
        held = books_tokens(sources, "validation", made)[: plan.test_tokens]
        validation = -negative_log_likelihood(model, held, plan.length) / len(held)
    measures += _books(measured, sources)
    for test in plan.tests:
        measures += TESTS[test](measured, sources)
    return Outcome(measures, validation, parameters(model), fitted.tokens, fitted.steps, fitted.seconds)


@dataclass(frozen=True)
class _Measured:
    """A trained model with its tokenizer."""

    model: Any
    tokenizer: Any
    plan: Budget

    def text(self, ids: Tensor) -> tuple[float, int]:
        """Return the nats of a text's tokens, and its bytes."""
        ids = ids[: self.plan.test_tokens]
        nats = negative_log_likelihood(self.model, ids, self.plan.length)
        return nats, len(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())

    def some(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return as many items as are to be asked, evenly over their order."""
        count = min(self.plan.test_items or len(items), len(items))
        return [items[i * len(items) // count] for i in range(count)]


def _books(measured: _Measured | None, sources: Sources) -> list[Measure]:
    if measured is None:
        return [Measure(metric, None, "books") for metric in ("perplexity", "bits_per_byte")]
    ids = books_tokens(sources, "test", measured.tokenizer)[: measured.plan.test_tokens]
    nats, size = measured.text(ids)
    return [
        Measure("perplexity", math.exp(nats / len(ids)), "books"),
        Measure("bits_per_byte", nats / math.log(2) / size, "books"),
    ]


def _wikitext2(measured: _Measured | None, sources: Sources) -> list[Measure]:
    """Perplexity a word, a line's end being one (as published), and bits a byte."""
    if measured is None:
        return [Measure(metric, None, "wikitext2") for metric in ("word_perplexity", "bits_per_byte")]
    ids = torch.tensor(encode(measured.tokenizer, sources.wikitext()))[: measured.plan.test_tokens]
    nats, size = measured.text(ids)
    text = measured.tokenizer.decode(ids.tolist())
    words = len(text.split()) + text.count("\n")
    return [
        Measure("word_perplexity", math.exp(nats / words), "wikitext2"),
        Measure("bits_per_byte", nats / math.log(2) / size, "wikitext2"),
    ]


def _lambada(measured: _Measured | None, sources: Sources) -> list[Measure]:
    """The last word of a passage, given the rest: its perplexity, and whether it is the likeliest, token by token."""
    if measured is None:
        return [Measure(metric, None, "lambada") for metric in ("perplexity", "accuracy")]
    pairs = []
    for text in measured.some(sources.lambada()):
        before, _, word = text.rpartition(" ")
        pairs.append((encode(measured.tokenizer, before), encode(measured.tokenizer, f" {word}")))
    found = log_likelihoods(measured.model, pairs, measured.tokenizer.eos_token_id)
    return [
        Measure("perplexity", math.exp(-sum(value for value, _ in found) / len(found)), "lambada"),
        Measure("accuracy", sum(greedy for _, greedy in found) / len(found), "lambada"),
    ]


def _blimp(measured: _Measured | None, sources: Sources) -> list[Measure]:
    """How often the good sentence is likelier than the bad one."""
    if measured is None:
        return [Measure("accuracy", None, "blimp")]
    pairs = measured.some(sources.blimp())
    rows = [([], encode(measured.tokenizer, text)) for _, good, bad in pairs for text in (good, bad)]
    found = [value for value, _ in log_likelihoods(measured.model, rows, measured.tokenizer.eos_token_id)]
    right = sum(good > bad for good, bad in zip(found[::2], found[1::2]))
    return [Measure("accuracy", right / len(pairs), "blimp")]


# name in a budget -> the measures
TESTS: dict[str, Callable[[_Measured | None, Sources], list[Measure]]] = {
    "wikitext2": _wikitext2,
    "lambada": _lambada,
    "blimp": _blimp,
}


@torch.no_grad()
def negative_log_likelihood(model: Any, ids: Tensor, length: int, rows: int = 16) -> float:
    """Return the nats of a text's tokens, read in windows of ``length`` that know nothing of each other.

    A window's first token is predicted from the last one of the window before; the text's first counts as predicted
    from itself, which is one token in all.
    """
    ids = torch.cat((ids[:1], ids)).to(device())
    nats = 0.0
    whole = (len(ids) - 1) // length * length
    inputs, targets = ids[:whole].view(-1, length), ids[1 : whole + 1].view(-1, length)
    parts = list(zip(inputs.split(rows), targets.split(rows))) if whole else []
    if whole < len(ids) - 1:
        parts.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    for given, wanted in parts:
        logits = model(input_ids=given, use_cache=False).logits.float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    return nats


@torch.no_grad()
def log_likelihoods(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], start: int, rows: int = 32
) -> list[tuple[float, bool]]:
    """Return, for each (context, continuation) in tokens, the log-likelihood and whether every token is the likeliest.

    Every context begins with the token ``start``.
    """
    found: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    for begin in range(0, len(order), rows):
        numbers = order[begin : begin + rows]
        longest = max(sum(map(len, pairs[i])) for i in numbers)
        inputs = torch.full((len(numbers), longest), start)
        targets = torch.full((len(numbers), longest), IGNORED)
        for row, number in enumerate(numbers):
            context, said = pairs[number]
            whole = torch.tensor([start, *context, *said])
            inputs[row, : len(whole) - 1] = whole[:-1]
            targets[row, len(context) : len(whole) - 1] = whole[len(context) + 1 :]
        inputs, targets = inputs.to(device()), targets.to(device())
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        greedy = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1)
        for row, number in enumerate(numbers):
            found[number] = -float(each.view(targets.shape)[row].sum()), bool(greedy[row])
    return [found[i] for i in range(len(pairs))]


def notes(plan: Budget) -> list[str]:
    """Say what differs from the published protocol."""
    size, tokens = plan.size, plan.steps * plan.batch * plan.length
    other = FAMILIES["hope-attention"]().cms_periods
    tested = "all" if plan.test_tokens is None else f"{plan.test_tokens:,} tokens at most of every"
    return [
        f"{size.layers} layers of width {size.hidden_size}, vocabulary {plan.vocab_size}, {tokens / 1e6:.2f}M tokens in"
        f" windows of {plan.length} (published: 760M parameters on 30B tokens, 1.3B on 100B, vocabulary 32,000)",
        f"rates tried: {[options['lr'] for options in plan.grid]}, chosen by the loss on the validation books, reached"
        f" after {plan.warmup:.0%} of the steps",
        f"{tested} test text, in windows that know nothing of each other;"
        f" {'all' if plan.test_items is None else plan.test_items} passages of LAMBADA and pairs of BLiMP",
        f"HOPE's levels: {list(size.cms_periods)} tokens between updates (HOPE-Attention's: {other}), memory"
        f" {dict(size.memory)}",
    ]


LM = Suite(
    name="lm",
    version=1,
    tasks=("lm",),
    budgets=BUDGETS,
    settings=lambda plan, task: ("",),
    run=run,
    notes=notes,
    digest=lambda data: Sources.at(data).digest("books", "wikitext2", "lambada", "blimp"),
)
