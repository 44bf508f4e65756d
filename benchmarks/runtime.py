"""What a memory costs while chatting, as ratios within one run: ``python -m benchmarks.runtime``.

Decode tokens a second with a memory whose gate is open, against the bare model, in turn; and the seconds it takes to
put another user's memory into the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from everlearn.learner.weights import Layout, Weights
from everlearn.memories.slots import SlotMemory
from everlearn.models.hub import DEFAULT_MODEL, load_model


def decode(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Return greedy tokens a second of ``generate`` after ``ids``."""
    began = time.perf_counter()
    model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens / (time.perf_counter() - began)


def fill(user: Weights, slots: int = 1000) -> None:
    """Give a memory the slots of some fifty facts."""
    memory = user.split.learning[-1].memories[-1]
    assert isinstance(memory, SlotMemory)
    keys, values = torch.randn(2, slots, memory.keys.shape[1])
    memory.add(keys, 1e-3 * values, torch.arange(slots) % 10 == 0, torch.arange(slots) // 20)


def measure(model: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the medians over ``rounds`` pairs."""
    base, tokenizer = load_model(model)
    users = [Weights(base, tokenizer, (), Layout(), None, lambda stage, share: None) for _ in range(2)]
    for seed, user in enumerate(users):
        torch.manual_seed(seed)
        fill(user)
        user.gate.set_(torch.zeros_like(user.gate.weight), torch.ones_like(user.gate.bias))
    ids = torch.randint(0, 1000, (1, 64), generator=torch.Generator().manual_seed(0))
    decode(base, ids, 4), decode(users[0].model, ids, 4)
    bare, with_memory = [], []
    for _ in range(rounds):
        bare.append(decode(base, ids, tokens))
        with_memory.append(decode(users[0].model, ids, tokens))
    swaps = []
    with tempfile.TemporaryDirectory() as folder:
        states = [Path(folder) / str(index) for index in range(len(users))]
        for state, user in zip(states, users, strict=True):
            state.write_bytes(user.dump())
        for index in range(2 * rounds):
            began = time.perf_counter()
            users[0].load(states[index % 2].read_bytes())
            swaps.append(time.perf_counter() - began)
    return {
        "bare_tokens_per_second": statistics.median(bare),
        "memory_tokens_per_second": statistics.median(with_memory),
        "ratio": statistics.median(m / b for m, b in zip(with_memory, bare, strict=True)),
        "swap_seconds": statistics.median(swaps),
        "bytes_per_user": users[0].bytes,
        "rounds": rounds,
        "tokens": tokens,
        "model": model,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": "python -m benchmarks.runtime",
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("docs/results/runtime_speed.json"))
    asked = parser.parse_args()
    result = measure(asked.model, asked.tokens, asked.rounds)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
