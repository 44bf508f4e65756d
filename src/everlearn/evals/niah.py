"""``everlearn eval niah``: needles in haystacks (synthetic-tasks.md, D), by models trained at a short length.

One training run a model and seed, on prompts of the budget's tasks; then each is asked at every length, the context
read in chunks through the model's cache. HOPE takes part with several numbers of levels and lowest frequencies.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everlearn.evals.contestants import Size
from everlearn.evals.language import encode, sentences, tokenizer
from everlearn.evals.long_context import Asked, Lesson, learn_and_ask, lesson
from everlearn.evals.niah_prompts import (
    ADJECTIVES,
    NIAH_TASKS,
    NOUNS,
    Prompt,
    draw,
    make_drill,
    make_prompt,
    names,
    share_found,
)
from everlearn.evals.sources import Sources
from everlearn.evals.suite import Job, Outcome, Suite

__all__ = ["LEVELS", "NIAH", "Budget"]


@dataclass(frozen=True)
class Budget:
    """Numbers of the protocol.

    ``lengths``: tokens of a prompt -> prompts a task; ``tasks``: trained on, and asked; ``few``: how many keys there
    are, all one word (0: adjective and noun, thousands); ``digits`` of a number; ``bare``: share of the training that
    begins with bare pairs of key and value; ``drill``: share of drills (:func:`make_drill`) among the prompts after it.
    """

    size: Size
    vocab_size: int
    train_length: int
    steps: int
    batch: int
    lengths: dict[int, int]
    grid: tuple[dict[str, Any], ...]
    tasks: tuple[str, ...] = tuple(NIAH_TASKS)
    few: int = 0
    digits: int = 7
    bare: float = 0.1
    drill: float = 0.5
    instruct: bool = True
    answer_tokens: int = 128
    tune_each: bool = False
    batch_tokens: int = 1 << 16


HOPE = {"chunk_size": 64, "width": 32, "recompute": False}
BUDGETS = {
    "tiny": Budget(
        Size(16, 1, 2, 16, {"chunk_size": 16}, (1, 512)), 320, 600, 2, 2, {600: 1, 700: 1}, ({"lr": 3e-3},),
        answer_tokens=2,
    ),
    "small": Budget(
        Size(64, 2, 4, 107, {**HOPE, "chunk_size": 16}, (1, 16_384)), 1024, 256, 1200, 8,
        {256: 48, 1024: 24, 4096: 12, 16_384: 4, 65_536: 1}, ({"lr": 3e-3},),
        tasks=("S-NIAH-1", "S-NIAH-2", "MK-NIAH-1", "MQ-NIAH"), few=16, digits=2, bare=0.3, drill=0.7, instruct=False,
        answer_tokens=32,
    ),
    "paper": Budget(
        Size(1536, 20, 16, 3840, HOPE, (1, 65_536)), 32_000, 4096, 20_000, 64,
        {4096: 500, 8192: 500, 16_384: 500, 32_768: 500, 65_536: 500, 131_072: 500}, ({"lr": 3e-4}, {"lr": 1e-3}),
    ),
}  # fmt: skip

# How many levels HOPE's continuum memory has, and how seldom the slowest is updated; "hope" has the budget's own.
LEVELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hope-1-level": ("hope", {"cms_periods": [1]}),
    "hope-2-levels-slow": ("hope", {"cms_periods": [1, 131_072]}),
    "hope-3-levels": ("hope", {"cms_periods": [1, 16_384, 131_072]}),
}


@functools.lru_cache(maxsize=4)
def _words(sources: Sources, vocab_size: int, few: tuple[str, ...], digits: int) -> Any:
    """The tokenizer, which knows the prompts' words, and the books' sentences in tokens."""
    rng = random.Random(0)
    keys = few or [f"{a}-{n}" for a in ADJECTIVES for n in rng.sample(NOUNS, 40)]
    extra = [f"for {key} is: {draw('numbers', rng, digits=digits)}. {key}" for key in keys] * (200 if few else 8)
    extra += ["One of the special magic numbers for is: What is mentioned in the provided text? number "] * 400
    made = tokenizer(sources, vocab_size, tuple(extra), digits=True)
    hay = {
        part: [encode(made, f" {sentence}") for sentence in sentences([text[:1_000_000] for text in texts[:4]])]
        for part, texts in sources.books().items()
    }
    return made, hay


def run(job: Job, plan: Budget, data: Any, tell: Callable[[str, float], None]) -> Outcome:
    """Train a model at the short length and ask it at all lengths."""
    few = tuple(names(plan.few)) if plan.few else ()
    drawn = functools.partial(draw, few=few, digits=plan.digits)
    made, hay = _words(Sources.at(data), plan.vocab_size, few, plan.digits)

    def say(text: str) -> list[int]:
        return encode(made, text)

    def prompt(task: str, length: int, rng: random.Random, part: str) -> Prompt:
        return make_prompt(NIAH_TASKS[task], length, rng, say, hay[part], instruct=plan.instruct, draw=drawn)

    def batch(rng: random.Random, part: str, done: float) -> Lesson:
        first, samples = done < plan.bare, []
        for task in rng.choices(plan.tasks, k=plan.batch):
            if part == "train" and (first or rng.random() < plan.drill):
                samples.append(make_drill(plan.train_length, rng, say, bare=1.0 if first else 0.25, draw=drawn))
            else:
                found = prompt(task, plan.train_length, rng, part)
                samples.append([([*found.context, *found.question], [*say(found.answer), made.eos_token_id])])
        return lesson(samples)

    def ask(task: str, length: int, rng: random.Random) -> Asked:
        one = prompt(task, length, rng, "test")
        return Asked(one.context, one.question, lambda said: share_found(one.values, said))

    return learn_and_ask(job, plan, made, plan.tasks, batch, ask, tell)


def notes(plan: Budget) -> list[str]:
    """Say what differs from the published protocol."""
    size = plan.size
    lengths = ", ".join(f"{count} at {length}" for length, count in plan.lengths.items())
    return [
        f"models of {size.layers} layers of width {size.hidden_size} and {plan.vocab_size} tokens, trained here on"
        f" {plan.steps} batches of {plan.batch} prompts of {plan.train_length} tokens (published: language models of"
        " 760M parameters and more)",
        f"keys: {f'{plan.few} words' if plan.few else 'adjective-noun'}, numbers of {plan.digits} digits, a token each"
        " (published: adjective-noun, 7)",
        f"training begins with {plan.bare:.0%} of bare pairs of key and number, stated and stated again; then"
        f" {plan.drill:.0%} of the rows are needles without hay, stated and asked for",
        f"tasks: {', '.join(plan.tasks)} (published: {len(NIAH_TASKS)}), {'with' if plan.instruct else 'without'} the"
        " instruction before the text (published: with)",
        f"prompts a task and length: {lengths} (published: 500 at 4k to 128k)",
        f"at most {plan.answer_tokens} tokens of answer (published: 128)",
        "haystack: the books, not Paul Graham's essays; an exact number of tokens, its last piece cut",
        f"HOPE's levels: {list(size.cms_periods)} tokens between updates; variants: "
        + ", ".join(f"{name} {changes['cms_periods']}" for name, (_, changes) in LEVELS.items()),
    ]


NIAH = Suite(
    name="niah",
    version=2,
    tasks=("niah",),
    budgets=BUDGETS,
    settings=lambda plan, task: ("",),
    run=run,
    notes=notes,
    variants=LEVELS,
    digest=lambda data: Sources.at(data).digest("books"),
)
