"""A data folder of a few kilobytes, laid out like the real one."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "the grey cat of our old house went up to a river and saw ten boats under its bridge in early light".split()  # noqa: SIM905
PEOPLE, PLACES = ("Mary", "John"), ("kitchen", "garden", "office")


def book(seed: int, sentences: int = 150) -> str:
    """Sentences of random words, twenty a paragraph."""
    rng = random.Random(seed)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(6, 14))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[i : i + 20]) for i in range(0, sentences, 20))


def story(rng: random.Random) -> str:
    """A bAbI story of six lines, two of them questions."""
    facts = [f"{rng.choice(PEOPLE)} went to the {rng.choice(PLACES)}." for _ in range(4)]
    first, second = (" ".join(fact.split()[-1:]).rstrip(".") for fact in (facts[1], facts[3]))
    lines = [facts[0], facts[1], f"Where is {facts[1].split()[0]}? \t{first}\t2"]
    lines += [facts[2], facts[3], f"Where is {facts[3].split()[0]}? \t{second}\t5"]
    return "\n".join(f"{i} {line}" for i, line in enumerate(lines, 1))


def make_sources(folder: Path) -> Path:
    """Write the folder and return it."""
    for name in ("books", "babi", "wikitext2", "lambada", "blimp"):
        (folder / name).mkdir(parents=True)
    for seed in range(4):
        (folder / "books" / f"author_{seed}.txt").write_text(book(seed))
    for task in range(1, 6):
        for part in ("train", "test"):
            rng = random.Random(f"{task}{part}")
            text = "\n".join(story(rng) for _ in range(20)) + "\n"
            (folder / "babi" / f"qa{task}_some-facts_{part}.txt").write_text(text)
    (folder / "wikitext2" / "test.txt").write_text(" \n = A title = \n \n The <unk> cat went up . \n" * 20)
    passages = [{"text": f"The cat went up to {place} and saw the {place}"} for place in ("house", "river", "bridge")]
    (folder / "lambada" / "lambada_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    pairs = [
        {"uid": "agreement", "good": "Cats go.", "bad": "Cats goes."},
        {"uid": "island", "good": "A b.", "bad": "B a."},
    ]
    (folder / "blimp" / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder
