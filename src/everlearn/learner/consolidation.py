"""Consolidation: the slow level learns the night's dreams beside old ones, in agreement with the base's own voice."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.learner.anchor import Anchor, fit_gate, reply_positions, shared_start
from everlearn.learner.dreams import Dream
from everlearn.learner.examples import Examples, encode_examples, run_trunk
from everlearn.learner.whitening import Whitened
from everlearn.memories.gated import Gate, GatedMemory
from everlearn.models.stacking import continua
from everlearn.models.trunk import Activations, Past, SplitModel

Progress = Callable[[str, float], None]
Optimizer = Callable[[list[Tensor], float], torch.optim.Optimizer]

WARMUP = 5  # steps
FINAL_RATE = 0.1  # of the rate, at the last step
BACK_OFF = 0.5  # by which a failed check lowers the gate's bias
MATCH = 0.8  # share of a reply's tokens that must be the likeliest for it to count as answered


def adamw(params: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """The slow level's default optimiser."""
    return torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)


@dataclass(frozen=True)
class Schedule:
    """How long and how hard a sleep learns, and what it must show.

    A memory of slots is written, not trained: for it only ``replay``, ``agreement``, ``recall`` and ``retries`` count.

    Attributes:
        passes: over the dreams, at most, unless they make fewer than ``steps`` steps.
        steps: least number of steps, however few the dreams.
        rate: peak learning rate; falls linearly to a tenth.
        batch: dreams in a step.
        anchors: replies of the base's voice in a step.
        anchor_tokens: tokens of each of them that are held to the base: where a reply turns personal, it does early.
        enough: mean loss of a pass at which learning ends early.
        replay: old dreams for each new one, at most.
        agreement: least top-1 agreement with the base on replies of its own voice that were never trained on.
        recall: least share of held-back dreams answered; of slots, of observations of which a dream is.
        retries: how often a sleep that fails the check is mended before it is given up.
    """

    passes: int = 10
    steps: int = 80
    rate: float = 3e-3
    batch: int = 8
    anchors: int = 8
    anchor_tokens: int = 8
    enough: float = 0.05
    replay: float = 1.0
    agreement: float = 0.93
    recall: float = 0.3
    retries: int = 2

    def __post_init__(self) -> None:
        for name in ("passes", "batch", "rate", "anchor_tokens"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name}: got {getattr(self, name)}, expected a number above 0")
        for name in ("steps", "anchors", "enough", "replay", "retries", "agreement", "recall"):
            if not getattr(self, name) >= 0:
                raise InvalidArgument(f"{name}: got {getattr(self, name)}, expected at least 0")


class Objective(Protocol):
    """What is minimised: of the memory's logits on dreams, and of its logits and the base's on the anchor."""

    def dreams(self, logits: Tensor, targets: Tensor) -> Tensor: ...

    def anchor(self, logits: Tensor, base: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SelfStudyObjective:
    """Next-token loss on the dreamt replies plus ``anchor_weight`` KL(base || memory) on the base's own replies."""

    anchor_weight: float = 1.0

    def dreams(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``logits`` [n, vocab] against ``targets`` [n]."""
        return F.cross_entropy(logits, targets)

    def anchor(self, logits: Tensor, base: Tensor) -> Tensor:
        """Return the weighted mean KL divergence of ``logits`` from ``base``, both [n, vocab]."""
        return self.anchor_weight * F.kl_div(
            logits.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="batchmean"
        )


@dataclass(frozen=True)
class Report:
    """What a consolidation did and what the check found; of training by gradient also passes and the last's loss."""

    dreams: int
    replayed: int
    recall: float
    agreement: float
    retries: int
    seconds: float
    slots: int = 0
    passes: int = 0
    loss: float = 0.0

    def metrics(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)


class Check:
    """What a night must show before it is committed.

    Args:
        split: the stacked model, cut below its memories.
        anchor: the base's own voice; its near misses, if any, are not looked at.
        dreams: what should be answered.
        schedule: how much of it, and how much of the voice must be kept.
        owners: to which observation each dream belongs: it is answered when one of its dreams is; default: each dream
            counts by itself.
    """

    def __init__(
        self,
        split: SplitModel,
        anchor: Anchor,
        dreams: Examples,
        schedule: Schedule,
        owners: Sequence[int] | None = None,
    ) -> None:
        self.split, self.anchor, self.dreams, self.schedule = split, anchor, dreams, schedule
        self.owners = range(len(dreams)) if owners is None else owners
        self._acts = run_trunk(split, dreams)

    def __call__(self) -> Result:
        """Check the memory as it is now."""
        recall, agreement = self._recall(), self._agreement()
        passed = recall >= self.schedule.recall and agreement >= self.schedule.agreement
        return Result(recall, agreement, passed, self.schedule)

    @torch.no_grad()
    def _recall(self) -> float:
        """Return the share of the owners with a dream whose reply is, token by token, mostly the likeliest."""
        answered: list[bool] = []
        for rows in torch.arange(len(self.dreams)).split(32):
            part = self.dreams.rows(rows)
            replies = reply_positions(part)
            best = self._likeliest(self._acts.part(rows, slice(part.ids.shape[1])), replies)
            right = torch.zeros(replies.shape).masked_scatter_(replies, (best == part.targets[replies]).float())
            answered += (right.sum(1) >= MATCH * replies.sum(1)).tolist()
        known = {owner for owner, well in zip(self.owners, answered, strict=True) if well}
        return len(known) / len(set(self.owners))

    @torch.no_grad()
    def _agreement(self) -> float:
        """Return the top-1 agreement with the base on the replies of its voice that are never trained on."""
        same, count = 0, 0
        for rows in self.anchor.held_out().split(16):
            part = self.anchor.replies.rows(rows)
            replies, longest = reply_positions(part), part.ids.shape[1]
            best = self._likeliest(self.anchor.activations.part(rows, slice(longest)), replies)
            base = self.split.logits(self.anchor.teacher[rows, :longest][replies]).argmax(-1)
            same += int((best == base).sum())
            count += int(replies.sum())
        return same / max(count, 1)

    def _likeliest(self, acts: Activations, where: Tensor) -> Tensor:
        return self.split.logits(self.split.upper(acts)[where]).argmax(-1)


@dataclass(frozen=True)
class Result:
    """What a check found: shares of what was dreamt that is answered and of the base's own words that are kept."""

    recall: float
    agreement: float
    passed: bool
    schedule: Schedule

    def why(self) -> str:
        """Say why it did not pass."""
        return (
            f"the sleep was given up: {self.recall:.0%} of what was dreamt was answered (at least"
            f" {self.schedule.recall:.0%} wanted) and {self.agreement:.1%} of the base's own words were kept (at least"
            f" {self.schedule.agreement:.1%} wanted); nothing was changed"
        )


class Consolidator:
    """Trains the slow level of a stacked model on dreams.

    Args:
        split: the stacked model, cut below its lowest memory.
        tokenizer: its tokenizer.
        gate: the gate of the slow level.
        anchor: the base's own voice.
        level: name of the slow level.
        schedule, objective, optimizer: replaceable parts.
    """

    def __init__(
        self,
        split: SplitModel,
        tokenizer: PreTrainedTokenizerBase,
        gate: Gate,
        anchor: Anchor,
        *,
        level: str = "slow",
        schedule: Schedule | None = None,
        objective: Objective | None = None,
        optimizer: Optimizer = adamw,
    ) -> None:
        self.split, self.tokenizer, self.gate, self.anchor = split, tokenizer, gate, anchor
        self.schedule = schedule or Schedule()
        self.objective: Objective = objective or SelfStudyObjective()
        self.optimizer = optimizer
        self._start = 0
        self._past: Past | None = None
        self._memories = [memory for memory in level_memories(split.model, level) if memory.b.numel()]

    def learn(
        self,
        new: Mapping[int, Sequence[Dream]],
        replay: Sequence[Dream],
        generator: torch.Generator,
        progress: Progress,
        gone: Collection[int] = (),
    ) -> Report:
        """Learn the dreams of each observation in ``new`` beside ``replay``, in place, and check the result.

        What is ``gone`` is not replayed and is overwritten by what is new.

        Raises:
            SleepRejected: after all retries the check still fails. The memory is then as training left it: the caller
                restores what was there before.
        """
        began = time.perf_counter()
        trained, held = hold_back(new)
        everything = [*(dream for _, dream in trained), *(dream for dream in replay if not dream.contrast)]
        if not everything:
            raise InvalidArgument("new: got no dreams, expected at least one")
        progress("reading the dreams", 0.0)
        examples = encode_examples(self.tokenizer, [(dream.question, dream.reply) for dream in everything])
        acts = run_trunk(self.split, examples)
        self.anchor = self._contrasted(
            [dream for found in [*new.values(), replay] for dream in found if dream.contrast]
        )
        fit_gate(self.gate, self.anchor, examples, acts.read)
        asked = [(dream.question, dream.reply) for _, dream in held or trained]
        check = Check(self.split, self.anchor, encode_examples(self.tokenizer, asked), self.schedule)
        self._share_start(examples, acts)
        anchored = self._open_anchors()
        wanted = max(self.schedule.passes, -(-self.schedule.steps // -(-len(examples) // self.schedule.batch)))
        passes, loss = self._train(examples, acts, anchored, wanted, generator, progress)
        progress("checking", 1.0)
        retries, result = 0, check()
        while not result.passed and retries < self.schedule.retries:
            retries += 1
            if result.agreement < self.schedule.agreement:
                self._back_off()
            more = max(2, self.schedule.passes // 4)
            done, loss = self._train(examples, acts, anchored, more, generator, progress)
            passes, result = passes + done, check()
        if not result.passed:
            raise SleepRejected(result.why())
        return Report(
            dreams=len(trained),
            replayed=len(everything) - len(trained),
            passes=passes,
            loss=loss,
            recall=result.recall,
            agreement=result.agreement,
            retries=retries,
            seconds=time.perf_counter() - began,
        )

    def _train(
        self,
        examples: Examples,
        acts: Activations,
        anchored: Tensor,
        passes: int,
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[int, float]:
        """Train for at most ``passes`` passes; return how many were needed and the mean loss of the last."""
        whitened = Whitened(self._memories, self.anchor.moments)
        optimizer = self.optimizer(whitened.params, self.schedule.rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        size = self.schedule.batch
        steps = -(-len(examples) // size)
        step, loss = 0, float("inf")
        for done in range(passes):
            order = torch.randperm(len(examples), generator=generator)
            total = 0.0
            for rows in order.split(size):
                left = 1 - (1 - FINAL_RATE) * step / (passes * steps)
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * left
                optimizer.zero_grad(set_to_none=True)
                total += self._dream_step(examples, acts, rows) * len(rows)
                if len(anchored) and self.schedule.anchors:
                    pick = torch.randint(0, len(anchored), (self.schedule.anchors,), generator=generator)
                    self._anchor_step(anchored[pick])
                whitened.collect()
                torch.nn.utils.clip_grad_norm_(whitened.params, 1.0)
                optimizer.step()
                whitened.write()
                step += 1
                progress("learning the dreams", step / (passes * steps))
            loss = total / len(examples)
            if loss < self.schedule.enough:
                return done + 1, loss
        return passes, loss

    @torch.no_grad()
    def _contrasted(self, contrasts: Sequence[Dream]) -> Anchor:
        """Return the anchor with the near misses of these dreams, taught by the base: the model with its gate shut."""
        if not contrasts:
            return self.anchor
        examples = encode_examples(self.tokenizer, [(dream.question, dream.reply) for dream in contrasts])
        acts = run_trunk(self.split, examples)
        self.gate.set_(torch.zeros_like(self.gate.weight), torch.full_like(self.gate.bias, -1.0))
        teacher = torch.cat([self.split.upper(part) for part in acts.split(32)])
        return self.anchor.joined(examples, acts, teacher)

    def _share_start(self, examples: Examples, acts: Activations) -> None:
        """Run the beginning that all texts share once, if the gate is closed in it: it is then always the base's."""
        start = min(shared_start(examples), shared_start(self.anchor.replies), int(examples.asked.min()))
        same = start > 0 and torch.equal(examples.ids[0, :start], self.anchor.replies.ids[0, :start])
        closed = same and not bool(self.gate(acts.read[:1, :start]).any())
        self._start = start if closed else 0
        self._past = self.split.past(acts.part(slice(1), slice(start))) if closed else None

    def _states(self, acts: Activations, rows: Tensor, part: Examples) -> Tensor:
        """Return the last hidden states [n, d] at the positions of ``part``, the ``rows``, that predict its replies."""
        states = self.split.upper(acts.part(rows, slice(self._start, part.ids.shape[1])), self._past)
        return states[reply_positions(part)[:, self._start :]]

    def _dream_step(self, examples: Examples, acts: Activations, rows: Tensor) -> float:
        part = examples.rows(rows)
        replies = reply_positions(part)
        states = self._states(acts, rows, part)
        loss = self.objective.dreams(self.split.logits(states), part.targets[replies])
        loss.backward()
        return loss.item()

    def _anchor_step(self, rows: Tensor) -> None:
        part = self.anchor.replies.rows(rows).first(self.schedule.anchor_tokens)
        replies = reply_positions(part)
        states = self._states(self.anchor.activations, rows, part)
        with torch.no_grad():
            base = self.split.logits(self.anchor.teacher[rows, : part.ids.shape[1]][replies])
        self.objective.anchor(self.split.logits(states), base).backward()

    @torch.no_grad()
    def _open_anchors(self) -> Tensor:
        """Return the replies of the voice, out of those to train on, that the gate lets anything into."""
        rows = self.anchor.trained()
        opened = self.gate(self.anchor.activations.read[rows])[..., 0] > 0
        inside = torch.arange(opened.shape[1])[None] < self.anchor.replies.lengths[rows, None]
        return rows[(opened & inside).any(1)]

    @torch.no_grad()
    def _back_off(self) -> None:
        """Close the gate a little: less of what is ordinary gets in."""
        self.gate.set_(self.gate.weight, self.gate.bias - BACK_OFF)


def level_memories(model: PreTrainedModel, level: str) -> list[GatedMemory]:
    """Return the gated memories of a level, lowest layer first."""
    found = [own.memories[own.names.index(level)] for own in continua(model).values() if level in own.names]
    return [memory for memory in found if isinstance(memory, GatedMemory)]


def hold_back(new: Mapping[int, Sequence[Dream]]) -> tuple[list[tuple[int, Dream]], list[tuple[int, Dream]]]:
    """Split the dreams, near misses left out, with their ids: to learn, and one of each four or more, to check with."""
    trained: list[tuple[int, Dream]] = []
    held: list[tuple[int, Dream]] = []
    for number, found in new.items():
        dreams = [dream for dream in found if not dream.contrast]
        middle = len(dreams) // 2
        for index, dream in enumerate(dreams):
            if len(dreams) >= 4 and index == middle:
                held.append((number, dream))
            else:
                trained.append((number, dream))
    return trained, held
