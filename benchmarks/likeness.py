"""In which coordinates a question is like the same one in other words: ``python -m benchmarks.likeness --data DIR``.

Of each diary the plain question of every fact that was not replaced is a key, as a slot's would be; found are the
paraphrased and the indirect questions to which their own is the nearest. No diary has a part in the coordinates: they
are whitened by, and learned of, the practice facts that come with the package.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from everlearn.evals.diary_data import Diary, load_diary
from everlearn.evals.results import provenance, write_json
from everlearn.learner import metric
from everlearn.learner.anchor import RIDGES, VOICE_SHARE, read_pairs, within_scatter
from everlearn.learner.learner import Learner
from everlearn.learner.metric import whitener
from everlearn.learner.practice import load_practice
from everlearn.learner.voice import load_voice
from everlearn.models.hub import DEFAULT_MODEL

OWN = Path(__file__).parent  # where the diaries of this project are
FACTS = (64, 255)  # of practice
SETTINGS: dict[str, dict[str, Any] | None] = {  # what is changed of the module's numbers
    "none": None,
    "as it is": {},
    "decay 0.02": {"DECAY": 0.02},
    "decay 0.005": {"DECAY": 0.005},
    "60 steps, decay 0.1, no dropout": {"STEPS": 60, "DECAY": 0.1, "DROPOUT": 0.0},
}


def found(diary: Diary, read: Callable[[list[str]], Tensor], center: Tensor, coordinates: Tensor) -> dict[str, float]:
    """Return the share of the questions of each further kind to which their own plain one is the nearest."""
    replaced = {fact.updates for fact in diary.facts}
    facts = [fact for fact in diary.facts if fact.id not in replaced]

    def seen(kind: int) -> Tensor:
        return F.normalize((read([fact.questions[kind] for fact in facts]) - center) @ coordinates, dim=-1)

    keys, own = seen(0), torch.arange(len(facts))
    right = [((seen(kind) @ keys.T).argmax(-1) == own).float().mean().item() for kind in (1, 2)]
    return {"facts": len(facts), "paraphrase": right[0], "indirect": right[1]}


def main() -> None:
    """Learn the metric of so many facts and in so many ways, and put the diaries' questions to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds diary/dev.jsonl")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", type=Path, default=Path("docs/results/likeness.json"))
    given = parser.parse_args()
    diaries = {"dev": load_diary(given.data, "dev")}
    diaries |= {split: load_diary(OWN, split) for split in ("letters", "plain", "chats")}
    with tempfile.TemporaryDirectory() as folder, Learner.from_pretrained(given.model, memory=folder) as learner:
        split, tokenizer, known = learner._weights.split, learner.tokenizer, dict[str, Tensor]()
        voice = load_voice(learner._weights.base, tokenizer)

        def read(questions: list[str]) -> Tensor:
            new = [question for question in dict.fromkeys(questions) if question not in known]
            known.update(zip(new, read_pairs(split, tokenizer, new).chunk(2, -1)[1], strict=True))
            return torch.stack([known[question] for question in questions])

        rows: list[dict[str, Any]] = []
        heard = read([prompt for prompt, _ in (*voice.general, *voice.others)])
        for count in FACTS:
            groups = [record.questions for record in load_practice()[:count]]
            which = torch.tensor([index for index, group in enumerate(groups) for _ in group])
            practised = read([question for group in groups for question in group])
            scatter, n = within_scatter(practised, which)
            white = whitener(scatter / n + VOICE_SHARE * torch.cov(heard.T), RIDGES[1])
            for name, changes in SETTINGS.items():
                x = (practised - heard.mean(0)) @ white
                learned = torch.eye(len(white)) if changes is None else learn(x, which, changes)
                for one, diary in diaries.items():
                    right = found(diary, read, heard.mean(0), white @ learned)
                    rows.append({"practice": count, "metric": name, "diary": one, **right})
                    print(rows[-1], flush=True)
                write_json(given.json, {"rows": rows, "provenance": provenance()})


def learn(x: Tensor, groups: Tensor, changes: dict[str, Any]) -> Tensor:
    """Return the metric that is learned with some of its module's numbers changed."""
    with patch.multiple(metric, **changes) if changes else nullcontext():
        return metric.learn_metric(x, groups)


if __name__ == "__main__":
    main()
