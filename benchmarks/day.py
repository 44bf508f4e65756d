"""What the fast and the mid level give within a day: ``python -m benchmarks.day --data DIR``.

Each day of the diary is heard by an untouched memory with faster levels that step on their clocks, as it would be
before the sleep. Measured by the weights alone, nothing being in the context: how likely each message is before it is
heard, how likely all are at the end of the day, how likely the right answer is to each direct question then, how many
of these are answered, and whether the replies to neutral prompts are still the base's.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from everlearn.evals.diary_data import Diary, contains, load_diary
from everlearn.evals.diary_measures import locality, log_likelihoods, replies
from everlearn.evals.results import provenance, write_json
from everlearn.learner.chat import chat_prompt
from everlearn.learner.learner import Learner
from everlearn.levels import Level
from everlearn.models.hub import DEFAULT_MODEL, load_model

FAST, MID = 16, 64  # tokens: a day of the diary has about 200
SMALLTALK = 4
RATES = (1e-3, 1e-2, 3e-2, 1e-1)  # of AdamW
VARIANTS = [("none", (), 0.0), *(
    (name, clocks, rate)
    for rate in RATES
    for name, clocks in (("fast", ("fast",)), ("mid", ("mid",)), ("fast and mid", ("fast", "mid")))
)]  # fmt: skip


def levels(names: tuple[str, ...], rate: float) -> list[Level]:
    """Return the levels of those names, each stepping by AdamW at ``rate``."""
    clocks, optimizer = {"fast": FAST, "mid": MID}, functools.partial(AdamW, lr=rate, weight_decay=0.0)
    return [Level(name, every=clocks[name], optimizer=optimizer) for name in names]


def lived(base: Any, tokenizer: Any, diary: Diary, day: int, faster: list[Level], neutral: int) -> dict[str, float]:
    """Return what is measured of one day, in nats a token or shares, and the seconds that hearing a message takes."""
    prompts = [chat_prompt(tokenizer, prompt) for prompt in diary.neutral[:neutral]]
    said = replies(base, tokenizer, prompts)
    torch.manual_seed(day)  # the faster memories begin at random
    with (
        tempfile.TemporaryDirectory() as folder,
        Learner.from_pretrained(base, memory=Path(folder) / "memory", tokenizer=tokenizer, levels=faster) as learner,
    ):
        model, heard, before, seconds = learner.model, diary.messages(day, 0, SMALLTALK), [], 0.0
        for message in heard:
            before += log_likelihoods(model, tokenizer, ["\n"], [message])
            began = time.perf_counter()
            learner.observe(message)
            seconds += time.perf_counter() - began
        facts = diary.on(day)
        asked = [chat_prompt(tokenizer, fact.questions[0]) for fact in facts]
        answered = replies(model, tokenizer, asked)
        return {
            "before": -statistics.mean(before),
            "again": -statistics.mean(log_likelihoods(model, tokenizer, ["\n"] * len(heard), heard)),
            "answer": -statistics.mean(log_likelihoods(model, tokenizer, asked, [fact.answer() for fact in facts])),
            "recall": statistics.mean(contains(r, f.answers) for r, f in zip(answered, facts, strict=True)),
            "top1": locality(model, base, tokenizer, prompts, prompts, said).top1,
            "seconds a message": seconds / len(heard),
        }


def main() -> None:
    """Live every variant through the days and write the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--days", type=int, default=3)
    parser.add_argument("--neutral", type=int, default=20, help="of the neutral prompts, how many")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, default=Path("docs/results/day.json"))
    given = parser.parse_args()
    diary, rows = load_diary(given.data, given.split), []
    if not 1 <= given.days <= diary.days:
        parser.error(f"--days: got {given.days}, expected 1 to {diary.days}")
    base, tokenizer = load_model(given.model)
    for name, clocks, rate in VARIANTS:
        days = [
            lived(base, tokenizer, diary, day, levels(clocks, rate), given.neutral) for day in range(1, given.days + 1)
        ]
        means = {key: round(statistics.mean(day[key] for day in days), 4) for key in days[0]}
        rows.append({"levels": name, "rate": rate, **means})
        print(rows[-1], flush=True)
    write_json(given.json, {"days": given.days, "every": [FAST, MID], "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
