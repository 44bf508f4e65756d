"""What HOPE costs, as ratios within one run: ``python -m benchmarks.speed`` (benchmarks.md, suite ``speed``).

Training tokens a second and peak memory (forward and backward), and decode tokens a second against the context length,
of HOPE, as it is and with its chunks compiled, of a Transformer++ of the same size, and of a stack of titans-pytorch's
NeuralMemory where that is installed.
Every measurement runs in a process of its own, the models in turn, in several rounds; the medians are compared. With
one thread, seconds are of the processor (:func:`everlearn.evals.results.compute_clock`): what else runs does not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.blocks.feed_forward import SwiGLU
from everlearn.evals.results import compute_clock
from everlearn.models.presets import preset
from everlearn.models.registry import build as build_model

VOCAB = 256
TITANS_CHUNK = 64
OURS = ("hope", "hope-compiled")


class TitansStack(nn.Module):
    """NeuralMemory as the mixer of every layer, SwiGLU as its feed-forward network, chunk 64."""

    def __init__(self, hidden_size: int = 256, layers: int = 4, heads: int = 4, intermediate_size: int = 640) -> None:
        super().__init__()
        from titans_pytorch import NeuralMemory  # type: ignore[import-not-found]

        self.embed = nn.Embedding(VOCAB, hidden_size)
        self.memories = nn.ModuleList(
            NeuralMemory(dim=hidden_size, chunk_size=TITANS_CHUNK, heads=heads, dim_head=hidden_size // heads)
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(2 * layers))
        self.feed_forwards = nn.ModuleList(SwiGLU(hidden_size, intermediate_size) for _ in range(layers))
        self.head = nn.Linear(hidden_size, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean next-token loss."""
        x = self.embed(ids)
        for i, (memory, feed_forward) in enumerate(zip(self.memories, self.feed_forwards)):
            x = x + memory(self.norms[2 * i](x))[0]
            x = x + feed_forward(self.norms[2 * i + 1](x))
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def build(name: str) -> nn.Module:
    """A model by its name: ``hope``, ``hope-compiled``, ``transformer`` or ``titans``."""
    torch.manual_seed(0)
    if name == "titans":
        return TitansStack()
    if name in OURS:
        config = preset("hope-tiny", vocab_size=VOCAB)
        config.memory = {**(config.memory or {}), "compile": name == "hope-compiled"}
        return build_model(config)
    return build_model(preset("transformer-tiny", vocab_size=VOCAB))


def peak_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def measure_training(name: str, batch: int, length: int, steps: int) -> dict[str, float]:
    """Forward and backward passes after one to warm up."""
    model = build(name).train()
    before = peak_mib()
    ids = torch.randint(0, VOCAB, (batch, length))

    def step() -> None:
        model.zero_grad()
        loss = model(ids) if name == "titans" else model(ids, labels=ids).loss
        loss.backward()

    step()
    clock = compute_clock()
    begin = clock()
    for _ in range(steps):
        step()
    seconds = (clock() - begin) / steps
    count = sum(p.numel() for p in model.parameters())
    return {"tokens_per_s": batch * length / seconds, "peak_mib": peak_mib() - before, "parameters": count}


@torch.no_grad()
def measure_decoding(name: str, context: int, steps: int) -> dict[str, float]:
    """Single-token steps behind ``context`` tokens, batch 1."""
    model = build(name).eval()
    cache = model.new_cache()
    for part in torch.randint(0, VOCAB, (1, context)).split(2048, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(3):
        model(token, past_key_values=cache)
    clock = compute_clock()
    begin = clock()
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits.argmax(-1)
    return {"tokens_per_s": steps / (clock() - begin), "cache_mib": cache.nbytes / 2**20}


def _task(queue: Any, threads: int, kind: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    queue.put((measure_training if kind == "training" else measure_decoding)(*arguments))


def isolated(threads: int, kind: str, *arguments: Any) -> dict[str, float]:
    """One measurement in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_task, args=(queue, threads, kind, arguments))
    process.start()
    while True:
        try:
            found = queue.get(timeout=1)
            break
        except Exception:
            if not process.is_alive():
                raise RuntimeError(f"{kind} {arguments} ended with exit code {process.exitcode}") from None
    process.join()
    return found


def compare(threads: int, rounds: int, kind: str, names: list[str], *arguments: Any) -> dict[str, dict[str, float]]:
    """Medians over ``rounds`` in which the models take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(isolated(threads, kind, name, *arguments))
    return {n: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for n, runs in found.items()}


def ratios(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """Our figures over every other model's."""
    return {
        f"{key}, {name} / {other}": table[name][key] / table[other][key]
        for name in OURS
        for other in table
        if name in table and other not in OURS
        for key in table[name]
        if table[other].get(key)
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, printed as they come."""
    trained = [*OURS, "transformer", *(["titans"] if importlib.util.find_spec("titans_pytorch") else [])]
    results: dict[str, Any] = {"training": {}, "decoding": {}}
    for length in args.lengths:
        batch = max(1, args.batch * min(args.lengths) // length)
        table = compare(args.threads, args.rounds, "training", trained, batch, length, args.steps)
        results["training"][length] = {"batch": batch, "models": table, "ratios": ratios(table)}
        print(f"training, {batch} x {length}:", json.dumps(results["training"][length], indent=1), flush=True)
    for context in args.contexts:
        table = compare(args.threads, args.rounds, "decoding", ["hope", "transformer"], context, args.decode_steps)
        results["decoding"][context] = {"models": table, "ratios": ratios(table)}
        print(f"decoding behind {context}:", json.dumps(results["decoding"][context], indent=1), flush=True)
    return results


def machine() -> dict[str, str]:
    """What was measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "transformers", *(["titans-pytorch"] if importlib.util.find_spec("titans_pytorch") else []))
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "commit": commit,
        "cpu": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
        **versions,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line; the defaults are the setup of benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 16384], help="training lengths")
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[1024, 4096, 16384], help="contexts to decode behind"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows at the shortest length; tokens stay the same")
    parser.add_argument("--steps", type=int, default=2, help="training steps a measurement")
    parser.add_argument("--decode-steps", type=int, default=64, help="decoded tokens a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed.json"))
    args = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks.speed", *sys.argv[1:]])
    results = {"command": command, "machine": machine(), "threads": args.threads, **run(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
