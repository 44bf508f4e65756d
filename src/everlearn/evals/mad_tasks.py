"""The data of MAD (Poli et al. 2024): six tasks that each isolate one ability; synthetic-tasks.md, A.

Tokens are 0..V-1. Every task makes examples ``(inputs, targets)``, -100 where nothing is scored; training and test
differ in what is scored where the notes say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from everlearn.evals.fitting import IGNORED, Batch

__all__ = ["MAD_SEED", "TASKS", "Setting", "examples", "settings"]

MAD_SEED = 12345
Example = tuple[Sequence[int], Sequence[int]]
Generator = np.random.Generator


@dataclass(frozen=True)
class Setting:
    """How hard a task is: ``vocab`` V, ``length`` L, ``examples`` N to train on; the rest where a task has it.

    ``noise_vocab`` ids are noise, a share ``noise`` of the slots; motifs have at most ``motif`` tokens; ``copy`` tokens
    are to be copied.
    """

    vocab: int
    length: int
    examples: int
    noise_vocab: int = 0
    noise: float = 0.0
    motif: int = 1
    copy: int = 0


def _recall(setting: Setting, rng: Generator, testing: bool) -> Example:
    """Multi-query in-context recall, with noise slots where the setting has any."""
    size, slots = setting.vocab - setting.noise_vocab, setting.length // 2
    values: dict[int, int] = {}
    sequence: list[int] = []
    repeated: list[int] = []  # places of values whose key came earlier
    sure = int(rng.integers(slots - 1))
    for slot in range(slots - 1):
        if setting.noise and slot != sure and rng.random() < setting.noise:
            sequence += rng.integers(size, setting.vocab, 2).tolist()
            continue
        key = int(rng.integers(size // 2))
        if key in values:
            repeated.append(len(sequence) + 1)
        else:
            values[key] = int(rng.integers(size // 2, size))
        sequence += [key, values[key]]
    key = list(values)[int(rng.integers(len(values)))]
    repeated.append(len(sequence) + 1)
    sequence += [key, values[key]]
    return _shifted(sequence, repeated if testing else range(len(sequence)))


def _shifted(sequence: Sequence[int], scored: Sequence[int]) -> Example:
    """Next-token prediction: the tokens at the places ``scored`` are targets."""
    wanted = set(scored)
    return sequence[:-1], [token if place in wanted else IGNORED for place, token in enumerate(sequence)][1:]


def _fuzzy(setting: Setting, rng: Generator, testing: bool) -> Example:
    """Recall of motifs of 1 to 3 distinct tokens; id V-1 pads on the left."""
    size = setting.vocab - 1
    key_ids, value_ids = np.arange(size // 2), np.arange(size // 2, size)
    values: dict[tuple[int, ...], tuple[int, ...]] = {}

    def pair() -> tuple[tuple[int, ...], tuple[int, ...]]:
        length = setting.motif if testing else int(rng.integers(1, setting.motif + 1))
        key = tuple(rng.permutation(key_ids)[:length].tolist())
        if key not in values:
            values[key] = tuple(rng.permutation(value_ids)[: int(rng.integers(1, setting.motif + 1))].tolist())
        return key, values[key]

    probe = pair()
    pairs, used, last = [], len(probe[0]) + len(probe[1]), len(probe[0]) + len(probe[1])
    while used < setting.length - last - 2 * setting.motif:
        pairs.append(pair())
        used += len(pairs[-1][0]) + len(pairs[-1][1])
    pairs.insert(int(rng.integers(len(pairs) + 1)), probe)
    sequence = [setting.vocab - 1] * (setting.length + 1 - used - last)
    start, repeated, seen = len(sequence), [], set()
    for key, value in (*pairs, probe):
        if key in seen:
            repeated += range(len(sequence) + len(key), len(sequence) + len(key) + len(value))
        seen.add(key)
        sequence += [*key, *value]
    return _shifted(sequence, repeated if testing else range(start, len(sequence)))


def _selective_copying(setting: Setting, rng: Generator, testing: bool) -> Example:
    """Content among blanks (V-2), the copy marker (V-1), then blanks at which the content is to be said in order."""
    marker, blank, count = setting.vocab - 1, setting.vocab - 2, setting.copy
    content = rng.integers(0, blank, count)
    places = rng.integers(0, count, setting.length - 2 * count - 1)
    inputs = [*np.insert(content, places, blank).tolist(), marker, *[blank] * count]
    return inputs, [*[IGNORED] * (setting.length - count), *content.tolist()]


def _compression(setting: Setting, rng: Generator, testing: bool) -> Example:
    """Uniform tokens and the compression marker (V-1); everything is to be said again from the last output."""
    inputs = [*rng.integers(0, setting.vocab - 1, setting.length - 1).tolist(), setting.vocab - 1]
    return inputs, inputs


def _memorization(setting: Setting, rng: Generator, testing: bool) -> Example:
    """Keys, each followed by the insert token (V-1), at which the key's value in :func:`fixed_map` is to be said."""
    facts = fixed_map(setting.vocab)
    keys = rng.choice(sorted(facts), setting.length // 2).tolist()
    inputs = [token for key in keys for token in (key, setting.vocab - 1)]
    return inputs, [target for key in keys for target in (IGNORED, facts[key])]


def fixed_map(vocab: int) -> dict[int, int]:
    """Return the one map of the memorization task: of all ids but the last, the first half are keys."""
    rng, half = np.random.default_rng(MAD_SEED), (vocab - 1) // 2
    keys, values = rng.permutation(half), rng.permutation(np.arange(half, vocab - 1))
    return dict(zip(keys.tolist(), values.tolist()))


# name -> how an example is made, and the baseline
TASKS: dict[str, tuple[Callable[[Setting, Generator, bool], Example], Setting]] = {
    "in-context-recall": (_recall, Setting(16, 128, 12_800)),
    "noisy-in-context-recall": (_recall, Setting(32, 128, 12_800, noise_vocab=16, noise=0.2)),
    "fuzzy-in-context-recall": (_fuzzy, Setting(16, 128, 12_800, motif=3)),
    "selective-copying": (_selective_copying, Setting(16, 256, 12_800, copy=16)),
    "compression": (_compression, Setting(16, 32, 12_800)),
    "memorization": (_memorization, Setting(256, 32, 256)),
}

_COUNTS = ("examples", (6400, 3200, 1600, 800))
CHANGES: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "in-context-recall": (("vocab", (32, 64, 128)), ("length", (256, 512, 1024)), _COUNTS),
    "noisy-in-context-recall": (
        ("vocab", (48, 80, 144)), ("length", (256, 512, 1024)), _COUNTS, ("noise", (0.4, 0.6, 0.8)),
    ),
    "fuzzy-in-context-recall": (("vocab", (32, 64, 128)), ("length", (256, 512, 1024)), _COUNTS),
    "selective-copying": (("vocab", (32, 64, 128)), ("length", (512, 1024)), _COUNTS, ("copy", (32, 64, 96))),
    "compression": (("vocab", (32, 64, 128)), ("length", (64, 128, 256)), _COUNTS),
    "memorization": (("vocab", (512, 1024, 2048, 4096, 8192)),),
}  # fmt: skip


def settings(task: str) -> dict[str, Setting]:
    """Return a task's settings by name: the baseline, then each change of one variable."""
    base = TASKS[task][1]
    found = {"baseline": base}
    for variable, values in CHANGES[task]:
        for value in values:
            found[f"{variable}={value}"] = replace(base, **{variable: value})
    return found


def examples(task: str, setting: Setting, count: int, part: int, *, testing: bool) -> Batch:
    """Return ``count`` examples of a part (0: training, 1: validation, 2: test), the same at every call."""
    rng = np.random.default_rng((MAD_SEED, part))
    made = [TASKS[task][0](setting, rng, testing) for _ in range(count)]
    inputs, targets = (torch.tensor([pair[i] for pair in made]) for i in range(2))
    return Batch(inputs, targets)
