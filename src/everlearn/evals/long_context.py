"""What the suites of long contexts share: learn on short prompts, read long ones through the cache, answer."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from everlearn.evals.contestants import make
from everlearn.evals.fitting import IGNORED, PeakMemory, Recipe, device, fit, parameters
from everlearn.evals.suite import Job, Measure, Outcome

__all__ = [
    "Asked",
    "Costs",
    "Lesson",
    "Reading",
    "answer",
    "ask",
    "learn_and_ask",
    "lesson",
    "read",
    "teach",
    "two_losses",
]

TEST_SEED = 42


class Reading(NamedTuple):
    """A context that has been read: the ``cache``, its ``bytes``, ``seconds``, and ``growth``: the peak of the
    process's memory over what it held before."""

    cache: Any
    bytes: int
    seconds: float
    growth: int


@torch.no_grad()
def read(model: Any, context: Tensor, piece: int = 1024) -> Reading:
    """Read contexts ``[B, T]`` by ``piece`` tokens at a time; memory does not grow with T, but for the cache."""
    context = context.to(device())
    memory, began, cache = PeakMemory(), time.perf_counter(), model.new_cache()
    before = memory.bytes()
    for part in context.split(piece, dim=1):
        model.model(input_ids=part, past_key_values=cache, use_cache=True)
    return Reading(cache, cache.nbytes, time.perf_counter() - began, max(0, memory.bytes() - before))


@torch.no_grad()
def answer(
    model: Any, cache: Any, seen: int, questions: Sequence[Sequence[int]], *, stop: int, limit: int
) -> list[list[int]]:
    """Return greedy continuations of a question a row, each until the token ``stop`` or ``limit`` tokens.

    Args:
        model: one of our decoders.
        cache: of :func:`read`, one row a question; it is used up.
        seen: tokens of the context.
        questions: tokens of each question; shorter ones are padded on the left, masked.
        stop: token that ends an answer and is not part of it.
        limit: longest answer.
    """
    where, longest = device(), max(map(len, questions))
    ids = torch.full((len(questions), longest), stop, device=where)
    mask = torch.ones(len(questions), seen + longest, dtype=torch.long, device=where)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = torch.tensor(question)
        mask[row, seen : seen + longest - len(question)] = 0
    padded = not bool(mask.all())
    answers: list[list[int]] = [[] for _ in questions]
    going = torch.ones(len(questions), dtype=torch.bool, device=where)
    for _ in range(limit):
        given = mask if padded else None
        logits = model(
            input_ids=ids, past_key_values=cache, attention_mask=given, use_cache=True, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1)
        going &= token != stop
        if not bool(going.any()):
            break
        for row in going.nonzero().flatten().tolist():
            answers[row].append(int(token[row]))
        ids = token[:, None]
        mask = torch.cat((mask, mask.new_ones(len(questions), 1)), dim=1)
    return answers


@dataclass
class Costs:
    """What reading has cost, a reading each: bytes of the cache a row, growth of the process, tokens a second."""

    cache: list[float] = field(default_factory=list)
    growth: list[int] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)

    def measures(self, setting: str) -> list[Measure]:
        """Return the largest cache and growth and the median speed, as measures of the task "memory"."""
        found = {
            "cache_bytes": max(self.cache),
            "growth_bytes": max(self.growth),
            "read_tokens_per_second": statistics.median(self.speed),
        }
        return [Measure(name, value, "memory", setting) for name, value in found.items()]


def ask(
    model: Any,
    prompts: Sequence[tuple[list[int], list[int]]],
    tokenizer: Any,
    costs: Costs,
    *,
    limit: int,
    batch_tokens: int = 1 << 16,
) -> list[str]:
    """Return the model's answer to each prompt, a context and a question in tokens; contexts of one length are batched.

    Args:
        model: one of our decoders.
        prompts: (context, question), both in tokens.
        tokenizer: to read answers with; its end-of-text token ends them.
        costs: is added to.
        limit: longest answer in tokens.
        batch_tokens: tokens of context read at a time.
    """
    said: dict[int, str] = {}
    by_length: dict[int, list[int]] = {}
    for number, (context, _) in enumerate(prompts):
        by_length.setdefault(len(context), []).append(number)
    for length, numbers in by_length.items():
        rows = max(1, batch_tokens // length)
        for i in range(0, len(numbers), rows):
            part = numbers[i : i + rows]
            reading = read(model, torch.tensor([prompts[number][0] for number in part]))
            questions = [prompts[number][1] for number in part]
            found = answer(model, reading.cache, length, questions, stop=tokenizer.eos_token_id, limit=limit)
            said.update(zip(part, map(tokenizer.decode, found)))
            costs.cache.append(reading.bytes / len(part))
            costs.growth.append(reading.growth)
            costs.speed.append(len(part) * length / reading.seconds)
    return [said[number] for number in range(len(prompts))]


class Lesson(NamedTuple):
    """A batch of ``inputs`` and next-token ``targets`` ``[B, T]``, and which targets are part of an ``answer``."""

    inputs: Tensor
    targets: Tensor
    answer: Tensor


def lesson(samples: Sequence[Sequence[tuple[list[int], list[int]]]]) -> Lesson:
    """Return samples, each of prompts with their answers one after the other, padded on the right."""
    rows = [
        [(token, part) for turn in turns for part, tokens in enumerate(turn) for token in tokens] for turns in samples
    ]
    whole = [torch.tensor(row) for row in rows]
    tokens, said = (pad_sequence([row[:, i] for row in whole], True, fill) for i, fill in ((0, IGNORED), (1, 0)))
    return Lesson(tokens[:, :-1].clamp(min=0), tokens[:, 1:], said[:, 1:] == 1)


def two_losses(model: Any, batch: Lesson) -> tuple[Tensor, Tensor]:
    """Return the mean loss of all tokens, and that of the answers' tokens."""
    logits = model(input_ids=batch.inputs, use_cache=False).logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
    each = each.view(batch.targets.shape)
    return each.sum() / (batch.targets != IGNORED).sum(), each[batch.answer].mean()


def teach(model: Any, batch: Lesson) -> Tensor:
    """Return the training loss: the text's and the answers' in equal parts."""
    text, said = two_losses(model, batch)
    return text + said


class Asked(NamedTuple):
    """A question about a long context, both in tokens, and what share of it a reply answers: ``mark(reply)``."""

    context: list[int]
    question: list[int]
    mark: Callable[[str], float]


def learn_and_ask(
    job: Job,
    plan: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    batch: Callable[[random.Random, str, float], Lesson],
    draw: Callable[[str, int, random.Random], Asked],
    tell: Callable[[str, float], None],
) -> Outcome:
    """Train a model at the short length and ask every task at all lengths.

    Args:
        job: which model, and with what.
        plan: the budget of a suite, with ``size``, ``steps``, ``lengths``, ``answer_tokens`` and ``batch_tokens``.
        tokenizer: of the prompts.
        tasks: names for ``draw``.
        batch: ``(rng, part, done)`` -> a batch of the ``"train"`` or the ``"validation"`` part, when the share
            ``done`` of the training is over.
        draw: ``(task, length, rng)`` -> a question of the test part; all models are asked the same.
        tell: as of a suite's ``run``.
    """
    rng, rate = random.Random(job.seed), dict(job.options)["lr"]
    model = make(job.contestant, plan.size, len(tokenizer), tied=False)  # tied, recall is learned later
    recipe = Recipe(plan.steps, rate, 0.1, warmup=0.05, betas=(0.9, 0.95), checks=20)
    fitted = fit(
        model,
        lambda step: batch(rng, "train", step / plan.steps),
        recipe,
        loss=teach,
        tell=lambda share: tell("training", 0.5 * share),
    )
    if fitted.loss is None:
        unknown = [Measure("accuracy", None, task, f"length={n}") for n in plan.lengths for task in tasks]
        return Outcome(unknown, None, parameters(model), fitted.tokens, fitted.steps, fitted.seconds)
    trial = random.Random(TEST_SEED + 1)
    with torch.no_grad():
        losses = [float(two_losses(model, batch(trial, "validation", 1.0))[1]) for _ in range(4)]
    measures = []
    for number, (length, count) in enumerate(plan.lengths.items()):
        setting, costs, rng = f"length={length}", Costs(), random.Random(TEST_SEED)
        tell(f"asking at {length} tokens", 0.5 + 0.5 * number / len(plan.lengths))
        for task, questions in {task: [draw(task, length, rng) for _ in range(count)] for task in tasks}.items():
            pairs = [(one.context, one.question) for one in questions]
            said = ask(model, pairs, tokenizer, costs, limit=plan.answer_tokens, batch_tokens=plan.batch_tokens)
            value = sum(one.mark(reply) for one, reply in zip(questions, said)) / count
            measures.append(Measure("accuracy", value, task, setting))
        measures += costs.measures(setting)
    validation = -sum(losses) / len(losses)
    return Outcome(measures, validation, parameters(model), fitted.tokens, fitted.steps, fitted.seconds)
