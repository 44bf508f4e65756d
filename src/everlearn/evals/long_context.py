"""Reading very long contexts in chunks through a model's cache, and greedy answers to questions about them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everlearn.evals.fitting import PeakMemory, device
from everlearn.evals.suite import Measure

__all__ = ["Costs", "Reading", "answer", "ask", "read"]


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
