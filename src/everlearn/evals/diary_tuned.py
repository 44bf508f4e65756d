"""Baselines that learn the runtime's own dreams without its levels, gate, anchor or replay: LoRA, full, strands."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.evals.diary_methods import Method, Setting
from everlearn.evals.results import write_json
from everlearn.learner import Schedule
from everlearn.learner.consolidation import adamw
from everlearn.learner.examples import IGNORE, encode_examples
from everlearn.levels import Level
from everlearn.models.hub import quiet_transformers, resolve_model
from everlearn.models.memory_file import load_memory, save_memory
from everlearn.models.stacking import memory_parameters, stack_levels

PART = 4  # examples run at once; their gradients are summed to the schedule's batch


class Tuned(Method):
    """Trains parameters of its own on each night's dreams, as many passes and in the same batches as the runtime.

    It has no way to forget: what was learned stays.
    """

    needs_dreams = True
    rate: float

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.nights, self.schedule = 0, Schedule()
        if setting.checkpoint is not None:
            self.nights = json.loads((setting.checkpoint / "nights.json").read_text(encoding="utf-8"))

    def parameters(self) -> list[Tensor]:
        """Return what is trained."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Learn the dreams that ``everlearn`` made of this day."""
        self.nights += 1
        pairs = recorded_dreams(self.setting, self.nights)
        if pairs:
            generator = torch.Generator().manual_seed(self.setting.seed * 1_000_003 + self.nights)
            fine_tune(self.model, self.tokenizer, pairs, self.parameters(), self.rate, self.schedule, generator)

    def bytes(self) -> int:
        """Return the bytes of what is trained."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def save(self, folder: Path) -> None:
        """Write how many nights there were."""
        write_json(folder / "nights.json", self.nights)


class LoraTuning(Tuned):
    """peft's LoRA on all linear layers, of rank 4: about as many parameters as the runtime's slow level."""

    rate, rank = 1e-3, 4

    def __init__(self, setting: Setting, rate: float | None = None) -> None:
        super().__init__(setting)
        try:
            from peft import LoraConfig, PeftModel, get_peft_model
        except ImportError as error:
            raise InvalidArgument("baselines: lora needs peft; run `pip install 'everlearn[eval]'`") from error
        self.rate = rate or self.rate
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            own = _aliased(setting.base)
            if setting.checkpoint is not None:
                adapted: Any = PeftModel.from_pretrained(own, setting.checkpoint / "adapter", is_trainable=True)
            else:
                config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
                adapted = get_peft_model(own, config)
        self.model = adapted
        self.model.eval()

    def parameters(self) -> list[Tensor]:
        """Return the adapter's matrices."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, folder: Path) -> None:
        """Write the adapter."""
        super().save(folder)
        self.model.save_pretrained(folder / "adapter")


class FullTuning(Tuned):
    """Full fine-tuning of the MLPs of the last third of the layers, on copies: the base's own are shared and stay."""

    rate = 1e-4

    def __init__(self, setting: Setting, rate: float | None = None) -> None:
        super().__init__(setting)
        self.rate = rate or self.rate
        self.model = stack_levels(setting.base, [Level("all")], init="pretrained")
        if setting.checkpoint is not None:
            load_memory(self.model, setting.checkpoint / "mlps.safetensors")

    def parameters(self) -> list[Tensor]:
        """Return the copies' weights."""
        return list(memory_parameters(self.model).values())

    def save(self, folder: Path) -> None:
        """Write the copies."""
        super().save(folder)
        save_memory(self.model, folder / "mlps.safetensors")


class Strands(Method):
    """strands-slm: a plastic LoRA that reads every message (``observe``) and is taught the night's dreams (``bind``).

    ``bind`` repeats a dream until the greedy reply holds it, so only the first ``each`` of a night's dreams for every
    message are taught. It loads a base model of its own. ``forget`` is not in its interface.
    """

    needs_dreams = True

    def __init__(self, setting: Setting, each: int = 1) -> None:
        super().__init__(setting)
        if importlib.util.find_spec("slm") is None or importlib.util.find_spec("strands") is None:
            raise InvalidArgument("baselines: strands needs strands-slm; run `pip install strands-slm`")
        slm = importlib.import_module("slm")
        self.each, self.nights = each, 0
        torch.manual_seed(setting.seed)
        self._peer: Any = slm.SLM(resolve_model(setting.name), device="cpu", max_tokens=48)
        self.model = self._peer._m.model.eval()
        if setting.checkpoint is not None:
            self.nights = json.loads((setting.checkpoint / "nights.json").read_text(encoding="utf-8"))
            self._peer.load_fast_weights(str(setting.checkpoint / "fast.pt"))

    def tell(self, text: str) -> None:
        """Let the plastic layer read ``text``."""
        self._peer.observe(text)

    def sleep(self) -> None:
        """Bind dreams that ``everlearn`` made of this day."""
        self.nights += 1
        seen: dict[str, int] = {}
        for question, reply in recorded_dreams(self.setting, self.nights):
            seen[reply] = seen.get(reply, 0) + 1
            if seen[reply] <= self.each:
                self._peer.bind(question, reply, verbose=False)

    def bytes(self) -> int:
        """Return the bytes of the fast weights."""
        return sum(p.numel() * p.element_size() for group in self._peer._m.opt.param_groups for p in group["params"])

    def save(self, folder: Path) -> None:
        """Write the fast weights."""
        write_json(folder / "nights.json", self.nights)
        self._peer.save_fast_weights(str(folder / "fast.pt"))


def recorded_dreams(setting: Setting, day: int) -> list[tuple[str, str]]:
    """Return the (question, reply) pairs that ``everlearn`` dreamt on ``day`` with the same seed."""
    path = setting.dreams / f"{setting.seed}-{day}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"out: the dreams of day {day} in {path} cannot be read ({error})") from error
    return [(row["question"], row["reply"]) for row in rows]


def fine_tune(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    parameters: Sequence[Tensor],
    rate: float,
    schedule: Schedule,
    generator: torch.Generator,
) -> float:
    """Train ``parameters`` in place on (message, reply) pairs, by the loss of the replies; return the last mean loss.

    AdamW at ``rate``, falling linearly to a tenth; ends after ``schedule.passes`` or below ``schedule.enough``.
    """
    examples = encode_examples(tokenizer, pairs)
    optimizer = adamw(list(parameters), rate)
    steps, step, loss = schedule.passes * -(-len(examples) // schedule.batch), 0, float("inf")
    for _ in range(schedule.passes):
        total = 0.0
        for rows in torch.randperm(len(examples), generator=generator).split(schedule.batch):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - 0.9 * step / steps)
            optimizer.zero_grad(set_to_none=True)
            for part in rows.split(PART):
                chosen = examples.rows(part)
                logits = model(input_ids=chosen.ids, use_cache=False).logits
                spoken = chosen.targets != IGNORE
                mean = F.cross_entropy(logits[spoken], chosen.targets[spoken])
                (mean * len(part) / len(rows)).backward()
                total += mean.item() * len(part)
            nn.utils.clip_grad_norm_(list(parameters), 1.0)
            optimizer.step()
            step += 1
        loss = total / len(examples)
        if loss < schedule.enough:
            break
    return loss


def _aliased(base: Any) -> Any:
    """Copy the module tree of ``base`` but not its weights: the copy sees them through frozen parameters of its own."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in base.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, memo)
