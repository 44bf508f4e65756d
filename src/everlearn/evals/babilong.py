"""``everlearn eval babilong``: bAbI facts hidden in the text of books (synthetic-tasks.md, E), lengths without bound.

One training run a model and seed, on all tasks at short lengths; then every task is asked at every length, the context
read in chunks through the model's cache, whose size is measured.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from everlearn.errors import InvalidArgument
from everlearn.evals.contestants import Size
from everlearn.evals.language import encode, sentences, tokenizer
from everlearn.evals.long_context import Asked, Lesson, learn_and_ask, lesson
from everlearn.evals.niah import LEVELS
from everlearn.evals.sources import BABI_TASKS, Babi, Sources
from everlearn.evals.suite import Job, Outcome, Suite

__all__ = ["BABILONG", "LABELS", "Budget", "context", "is_right", "stories"]

PROMPT_ALLOWANCE = 300
"""Tokens of the target length that are kept for the prompt."""
TRIES = 10_000
PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
LABELS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": frozenset({"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"}),
}
"""The answers a task can have."""

INSTRUCTION = (
    "I will give you a context with facts hidden in some unrelated text. Answer the question by the facts only: if a"
    " person or thing was in different places, the latest counts.\n"
)
FORMAT = "Always answer with the {kind} alone.\n"
KINDS = {"qa1": "place", "qa2": "place", "qa3": "place", "qa4": "place", "qa5": "name"}


@dataclass(frozen=True)
class Budget:
    """Numbers of the protocol.

    ``lengths``: target length T -> samples a task; T = 0 is the facts alone. ``allowance``: tokens of T that are kept
    for the prompt. ``examples``: solved examples in the prompt. ``bare``: share of the training, its beginning, that is
    stories with all their questions alone; ``drill``: share of the samples that are afterwards.
    """

    size: Size
    vocab_size: int
    train_lengths: tuple[int, ...]
    steps: int
    batch: int
    lengths: dict[int, int]
    grid: tuple[dict[str, Any], ...]
    allowance: int = PROMPT_ALLOWANCE
    examples: int = 2
    answer_tokens: int = 8
    tune_each: bool = False
    batch_tokens: int = 1 << 16
    bare: float = 0.0
    drill: float = 0.0


HOPE = {"chunk_size": 64, "width": 32, "recompute": False}
BUDGETS = {
    "tiny": Budget(
        Size(16, 1, 2, 16, {"chunk_size": 16}, (1, 512)), 320, (0, 400), 2, 2, {0: 1, 500: 2}, ({"lr": 3e-3},),
        allowance=20, examples=0, answer_tokens=2, bare=0.5, drill=0.5,
    ),
    "small": Budget(
        Size(64, 2, 4, 107, {**HOPE, "chunk_size": 16}, (1, 16_384)), 1024, (0, 256), 2000, 16,
        {0: 100, 256: 100, 1024: 50, 4096: 20, 16_384: 5, 65_536: 1}, ({"lr": 5e-3},), allowance=20, examples=0,
        bare=0.6, drill=0.5,
    ),
    "paper": Budget(
        Size(1024, 24, 16, 2474, HOPE, (1, 65_536)), 32_000, (0, 1024, 2048, 4096), 20_000, 64,
        dict.fromkeys((0, *(1024 << i for i in range(11))), 100), ({"lr": 3e-4}, {"lr": 1e-3}),
    ),
}  # fmt: skip


def context(
    facts: Sequence[list[int]], length: int, rng: random.Random, books: Sequence[Sequence[list[int]]]
) -> list[int]:
    """Return tokens of the facts, hidden in order among sentences of a book; exactly ``length`` tokens, or the facts.

    The sentences follow each other from a random place on (and go round); the last is cut. Every fact gets a gap
    between them at random, with replacement.

    Args:
        facts: tokens of each fact.
        length: tokens in all; 0 is the facts alone.
        rng: all randomness.
        books: tokens of each sentence of each book.

    Raises:
        InvalidArgument: the facts alone are longer.
    """
    room = length - sum(map(len, facts))
    if length == 0:
        return [token for fact in facts for token in fact]
    if room < 0:
        raise InvalidArgument(f"length: got {length} tokens, expected at least {length - room} for these facts")
    book = rng.choice(books)
    at, background = rng.randrange(len(book)), []
    while room > 0:
        background.append(book[at % len(book)][:room])
        room -= len(background[-1])
        at += 1
    gaps = sorted(rng.choices(range(len(background) + 1), k=len(facts)))
    made, left = [], list(zip(gaps, facts))
    for gap, sentence in enumerate([*background, []]):
        while left and left[0][0] == gap:
            made += left.pop(0)[1]
        made += sentence
    return made


def is_right(said: str, question: str, target: str, labels: frozenset[str]) -> bool:
    """Return whether the first sentence of what was said names the target and no other label.

    Labels that the question mentions do not count; several targets are parted by commas.
    """
    first = re.split(r"\.|<context>|<example>|question", said.lower(), maxsplit=1)[0]
    named = {label.lower() for label in labels if label.lower() in first}
    named -= {label.lower() for label in labels if label.lower() in question.lower()}
    return named == {part.strip().lower() for part in target.split(",")}


@functools.lru_cache(maxsize=4)
def _words(sources: Sources, vocab_size: int) -> Any:
    """The tokenizer, which knows the facts' words, and each book's sentences of at least ten tokens, by part."""
    facts = [" ".join(item.facts) for task in BABI_TASKS for item in sources.babi(task, "train")[::10]]
    made = tokenizer(sources, vocab_size, tuple(facts))

    def tokens(text: str) -> list[list[int]]:
        found = [encode(made, f" {sentence}") for sentence in sentences([text[:500_000]])[1:-1]]
        return [sentence for sentence in found if len(sentence) >= 10]

    books = {part: [tokens(text) for text in texts[:6]] for part, texts in sources.books().items()}
    return made, books


class _Maker:
    """Makes samples."""

    def __init__(self, sources: Sources, plan: Budget) -> None:
        self.plan = plan
        self.tokenizer, self.books = _words(sources, plan.vocab_size)
        self.items = {(task, part): sources.babi(task, part) for task in BABI_TASKS for part in ("train", "test")}
        self.stories = {task: stories(self.items[task, "train"]) for task in BABI_TASKS}

    def say(self, text: str) -> list[int]:
        """Tokens of a text."""
        return encode(self.tokenizer, text)

    def prompt(self, task: str) -> str:
        """What stands before the context: the instruction, solved examples, the form of the answer."""
        if not self.plan.examples:
            return ""
        shown = [
            f"<example>\n{' '.join(item.facts)} {item.question} Answer: {item.answer}\n</example>\n"
            for item in self.items[task, "train"][: self.plan.examples]
        ]
        return "".join((INSTRUCTION, *shown, FORMAT.format(kind=KINDS[task]), "<context>\n"))

    def draw(self, task: str, length: int, rng: random.Random, part: str) -> tuple[list[int], list[int], Babi]:
        """Return the tokens up to the end of the context, those of the question, and the question itself.

        Only questions of at most ``length / 8`` facts are used, where a length is given, and only facts that fit; facts
        alone (``length`` 0) are never longer in training than the longest of the training lengths.

        Raises:
            InvalidArgument: none fits.
        """
        items, room = self.items[task, part], max(0, length - self.plan.allowance)
        most = room if length else max(self.plan.train_lengths) if part == "train" else None
        for _ in range(TRIES):
            item = rng.choice(items)
            if length and len(item.facts) > max(2, length // 8):
                continue
            facts = [self.say(f" {fact}") for fact in item.facts]
            if most is None or sum(map(len, facts)) <= most:
                break
        else:
            raise InvalidArgument(f"lengths: got {length} tokens, in which no question of {task} and its facts fits")
        books = self.books["train" if part == "train" else "test"]
        made = [*self.say(self.prompt(task)), *context(facts, room, rng, books)]
        end = "\n</context>\n" if self.plan.examples else "\n"
        return made, self.say(f"{end}Question: {item.question} Answer:"), item

    def drill(self, task: str, rng: random.Random) -> list[tuple[list[int], list[int]]]:
        """Return a story of the training part, its questions answered where they are asked: (tokens, answer) of each.

        It is cut where it gets longer than the longest of the training lengths.

        Raises:
            InvalidArgument: no story's first question fits.
        """
        longest = max(self.plan.train_lengths)
        for _ in range(TRIES):
            turns: list[tuple[list[int], list[int]]] = []
            told, left = 0, longest
            for item in rng.choice(self.stories[task]):
                new = "".join(f" {fact}" for fact in item.facts[told:])
                turn = self.say(f"{new}\nQuestion: {item.question} Answer:"), self.answer(item)
                left -= sum(map(len, turn))
                if left < 0:
                    break
                turns.append(turn)
                told = len(item.facts)
            if turns:
                return turns
        raise InvalidArgument(f"train_lengths: got {longest} tokens at most, in which no question of {task} fits")

    def answer(self, item: Babi) -> list[int]:
        """Tokens of the answer, with the end of text."""
        return [*self.say(f" {item.answer}."), self.tokenizer.eos_token_id]


def stories(items: Sequence[Babi]) -> list[list[Babi]]:
    """Return the questions by story: one belongs to that of the question before if it begins with its facts."""
    found: list[list[Babi]] = []
    for item in items:
        last = found[-1][-1].facts if found else ()
        if found and len(item.facts) > len(last) and item.facts[: len(last)] == last:
            found[-1].append(item)
        else:
            found.append([item])
    return found


def run(job: Job, plan: Budget, data: Any, tell: Callable[[str, float], None]) -> Outcome:
    """Train a model at the short lengths and ask it at all lengths."""
    maker = _Maker(Sources.at(data), plan)

    def batch(rng: random.Random, part: str, done: float) -> Lesson:
        length, samples = rng.choice(plan.train_lengths), []
        for task in rng.choices(BABI_TASKS, k=plan.batch):
            if part == "train" and (done < plan.bare or rng.random() < plan.drill):
                samples.append(maker.drill(task, rng))
            else:
                begin, question, item = maker.draw(task, length, rng, "train")
                samples.append([([*begin, *question], maker.answer(item))])
        return lesson(samples)

    def ask(task: str, length: int, rng: random.Random) -> Asked:
        begin, question, item = maker.draw(task, length, rng, "test")
        return Asked(begin, question, lambda said: is_right(said, item.question, item.answer, LABELS[task]))

    return learn_and_ask(job, plan, maker.tokenizer, BABI_TASKS, batch, ask, tell)


def notes(plan: Budget) -> list[str]:
    """Say what differs from the published protocol."""
    size = plan.size
    lengths = ", ".join(f"{count} at {length}" for length, count in plan.lengths.items())
    return [
        f"models of {size.layers} layers of width {size.hidden_size} and {plan.vocab_size} tokens (their own tokenizer,"
        f" not GPT-2's), trained here on {plan.steps} batches of {plan.batch} samples of lengths {plan.train_lengths}"
        " from bAbI's training split (published: language models that are only prompted)",
        f"training begins with {plan.bare:.0%} of stories alone, each with all its questions answered where they are"
        f" asked; then {plan.drill:.0%} of the samples are such",
        f"samples a task and length, from the test split: {lengths} (published: 100 or 1,000 at 0 to 1M and more, from"
        " the training split)",
        f"{plan.allowance} tokens of a length are kept for the prompt, {plan.examples} solved examples in it"
        f" (published: {PROMPT_ALLOWANCE}, 2)",
        "background: the books of the data folder, not PG-19; qa3 trains on the 1k version where there is no other",
        f"HOPE's levels: {list(size.cms_periods)} tokens between updates",
    ]


BABILONG = Suite(
    name="babilong",
    version=3,
    tasks=("babilong",),
    budgets=BUDGETS,
    settings=lambda plan, task: ("",),
    run=run,
    notes=notes,
    variants=LEVELS,
    digest=lambda data: Sources.at(data).digest("books", "babi"),
)
