"""``everlearn eval niah``: needles in haystacks (synthetic-tasks.md, D), by models trained at a short length.

One training run a model and seed, on prompts of all eight tasks; then every task is asked at every length, the context
read in chunks through the model's cache. HOPE takes part with several numbers of levels and lowest frequencies.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.evals.contestants import Size, make
from everlearn.evals.fitting import IGNORED, Recipe, fit, parameters
from everlearn.evals.language import encode, sentences, tokenizer
from everlearn.evals.long_context import Costs, ask
from everlearn.evals.niah_prompts import ADJECTIVES, NIAH_TASKS, NOUNS, Prompt, make_prompt, share_found
from everlearn.evals.sources import Sources
from everlearn.evals.suite import Job, Measure, Outcome, Suite

__all__ = ["LEVELS", "NIAH", "Budget", "Lesson", "lesson", "two_losses"]

TEST_SEED = 42


@dataclass(frozen=True)
class Budget:
    """Numbers of the protocol; ``lengths``: tokens of a prompt -> prompts a task."""

    size: Size
    vocab_size: int
    train_length: int
    steps: int
    batch: int
    lengths: dict[int, int]
    grid: tuple[dict[str, Any], ...]
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
        Size(128, 2, 4, 256, HOPE, (1, 16_384)), 1024, 256, 550, 8,
        {256: 24, 1024: 12, 4096: 6, 16_384: 2, 65_536: 1}, ({"lr": 3e-3},), answer_tokens=64,
    ),
    "paper": Budget(
        Size(1536, 20, 16, 4352, HOPE, (1, 65_536)), 32_000, 4096, 20_000, 64,
        {4096: 500, 8192: 500, 16_384: 500, 32_768: 500, 65_536: 500, 131_072: 500}, ({"lr": 3e-4}, {"lr": 1e-3}),
    ),
}  # fmt: skip

# How many levels HOPE's continuum memory has, and how seldom the slowest is updated; "hope" has the budget's own.
LEVELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hope-1-level": ("hope", {"cms_periods": [1]}),
    "hope-2-levels-slow": ("hope", {"cms_periods": [1, 131_072]}),
    "hope-3-levels": ("hope", {"cms_periods": [1, 16_384, 131_072]}),
}


class Lesson(NamedTuple):
    """A batch of ``inputs`` and next-token ``targets`` ``[B, T]``, and which targets are part of an ``answer``."""

    inputs: Tensor
    targets: Tensor
    answer: Tensor


def lesson(samples: Sequence[tuple[list[int], list[int]]]) -> Lesson:
    """Return prompts with their answers, padded on the right."""
    longest = max(len(prompt) + len(said) for prompt, said in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.long)
    targets = torch.full((len(samples), longest), IGNORED)
    said_here = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, (prompt, said) in enumerate(samples):
        whole = torch.tensor([*prompt, *said])
        tokens[row, : len(whole)] = targets[row, : len(whole)] = whole
        said_here[row, len(prompt) : len(whole)] = True
    return Lesson(tokens[:, :-1], targets[:, 1:], said_here[:, 1:])


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


@functools.lru_cache(maxsize=4)
def _words(sources: Sources, vocab_size: int) -> Any:
    """The tokenizer, which knows the prompts' words, and the books' sentences in tokens."""
    rng = random.Random(0)
    extra = [f"{a}-{n} {rng.randint(10**6, 10**7)}" for a in ADJECTIVES for n in NOUNS[::10]]
    extra += ["One of the special magic numbers for is: What is mentioned in the provided text? "] * 400
    made = tokenizer(sources, vocab_size, tuple(extra))
    hay = {
        part: [encode(made, f" {sentence}") for sentence in sentences([text[:1_000_000] for text in texts[:4]])]
        for part, texts in sources.books().items()
    }
    return made, hay


def run(job: Job, plan: Budget, data: Any, tell: Callable[[str, float], None]) -> Outcome:
    """Train a model at the short length and ask it at all lengths."""
    made, hay = _words(Sources.at(data), plan.vocab_size)
    rng, options = random.Random(job.seed), dict(job.options)

    def say(text: str) -> list[int]:
        return encode(made, text)

    def prompt(task: str, length: int, rng: random.Random, part: str) -> Prompt:
        return make_prompt(NIAH_TASKS[task], length, rng, say, hay[part], instruct=plan.instruct)

    def batch(rng: random.Random, part: str) -> Lesson:
        tasks = rng.choices(list(NIAH_TASKS), k=plan.batch)
        found = [prompt(task, plan.train_length, rng, part) for task in tasks]
        return lesson([([*p.context, *p.question], [*say(p.answer), made.eos_token_id]) for p in found])

    model = make(job.contestant, plan.size, len(made))
    recipe = Recipe(plan.steps, options["lr"], 0.1, warmup=0.05, betas=(0.9, 0.95), checks=20)
    fitted = fit(
        model, lambda step: batch(rng, "train"), recipe, loss=teach, tell=lambda share: tell("training", 0.5 * share)
    )
    if fitted.loss is None:
        measures = [
            Measure("accuracy", None, task, f"length={length}") for length in plan.lengths for task in NIAH_TASKS
        ]
        return Outcome(measures, None, parameters(model), fitted.tokens, fitted.steps, fitted.seconds)
    trial = random.Random(TEST_SEED + 1)
    with torch.no_grad():
        losses = [float(two_losses(model, batch(trial, "validation"))[1]) for _ in range(4)]
    measures = []
    for number, (length, count) in enumerate(plan.lengths.items()):
        tell(f"asking at {length} tokens", 0.5 + 0.5 * number / len(plan.lengths))
        asked = random.Random(TEST_SEED)
        prompts = {task: [prompt(task, length, asked, "test") for _ in range(count)] for task in NIAH_TASKS}
        measures += _ask(model, prompts, length, made, plan)
    validation = -sum(losses) / len(losses)
    return Outcome(measures, validation, parameters(model), fitted.tokens, fitted.steps, fitted.seconds)


def _ask(model: Any, prompts: dict[str, list[Prompt]], length: int, made: Any, plan: Budget) -> list[Measure]:
    setting, costs, measures = f"length={length}", Costs(), []
    for task, asked in prompts.items():
        pairs = [(one.context, one.question) for one in asked]
        said = ask(model, pairs, made, costs, limit=plan.answer_tokens, batch_tokens=plan.batch_tokens)
        found = [share_found(one.values, text) for one, text in zip(asked, said)]
        measures.append(Measure("accuracy", sum(found) / len(found), task, setting))
    return [*measures, *costs.measures(setting)]


def notes(plan: Budget) -> list[str]:
    """Say what differs from the published protocol."""
    size = plan.size
    lengths = ", ".join(f"{count} at {length}" for length, count in plan.lengths.items())
    return [
        f"models of {size.layers} layers of width {size.hidden_size} and {plan.vocab_size} tokens, trained here on"
        f" {plan.steps} batches of {plan.batch} prompts of {plan.train_length} tokens (published: language models of"
        " 760M parameters and more)",
        f"prompts a task and length: {lengths} (published: 500 at 4k to 128k)",
        f"at most {plan.answer_tokens} tokens of answer (published: 128)",
        "haystack: the books, not Paul Graham's essays; an exact number of tokens, its last piece cut",
        f"HOPE's levels: {list(size.cms_periods)} tokens between updates; variants: "
        + ", ".join(f"{name} {changes['cms_periods']}" for name, (_, changes) in LEVELS.items()),
    ]


NIAH = Suite(
    name="niah",
    version=1,
    tasks=("niah",),
    budgets=BUDGETS,
    settings=lambda plan, task: ("",),
    run=run,
    notes=notes,
    variants=LEVELS,
    digest=lambda data: Sources.at(data).digest("books"),
)
