"""What tests of the learner look at: the logits where its gate is open, its slots, its journal."""

from __future__ import annotations

import torch

from everlearn.learner.learner import Learner
from everlearn.models.stacking import memory_state

SAID = "My parrot is Otto."
STUDIED = "user: What was said now?<end>assistant: The sea is blue.<end>"  # the form of what is learned at night


def ids(tokenizer) -> torch.Tensor:
    return tokenizer(STUDIED, return_tensors="pt").input_ids


@torch.no_grad()
def logits(one: Learner) -> torch.Tensor:
    """Return the logits where the gate is open after any night, [1, T, vocab]."""
    return one.model(input_ids=ids(one.tokenizer)).logits


def owners(one: Learner) -> set[int]:
    """Return the observations that have slots."""
    state = memory_state(one.model, "slow").items()
    return set(next(tensor for key, tensor in state if key.endswith("slow.owners")).tolist())


def states(one: Learner) -> list[str]:
    return [item.state for item in one.history()]
