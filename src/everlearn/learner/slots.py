"""Consolidation in closed form: each thing to be said becomes a slot of its own, and nothing is trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.learner.anchor import ASKING_SLOPE, RIDGES, Anchor, fit_asking_gate, pair, read_pairs, within_scatter
from everlearn.learner.consolidation import Check, Progress, Report, Schedule, hold_back
from everlearn.learner.dreams import Dream
from everlearn.learner.examples import Examples, encode_examples, run_trunk
from everlearn.learner.metric import whitener
from everlearn.learner.words import read_gists
from everlearn.memories.gated import Gate
from everlearn.memories.slots import ANYBODY, ASKED, ASSISTANT, SlotMemory
from everlearn.models.trunk import Activations, SplitModel

MARGIN = 12.0  # logits by which a slot alone makes its token the likeliest
STEPS = 8  # of Newton's method towards it
LONGEST = 20.0  # of a value, in lengths of the state that it is added to: some heads cannot give the margin at all
SPOKEN_ROWS = 3  # dreams with one reply, from which its later words are learned
LOOKED_AT = 3  # dreams of an observation that are checked beside one held back: one of them must be answered
BACK_OFF = 0.5  # in log odds, by which a failed check shuts the gate a little


@dataclass(frozen=True)
class _Read:
    """Dreams behind the trunk: what is read at each, and where the reply begins and goes on.

    Attributes:
        examples: the dreams, some without their reply.
        acts: the trunk's activations.
        both: what the gate and the memory read, each scaled to mean square 1, [n, T, 2 d].
    """

    examples: Examples
    acts: Activations
    both: Tensor

    @property
    def above(self) -> Tensor:
        """What the memory reads, [n, T, d]."""
        return self.both.chunk(2, -1)[1]

    def asked(self, read: Tensor) -> Tensor:
        """Return what ``read`` [n, T, d] is where the replies begin, [n, d]."""
        return read[torch.arange(len(self.examples)), self.examples.asked]


class SlotConsolidator:
    """Writes the slow level of a model that is stacked with :class:`~everlearn.memories.slots.SlotMemory`.

    For each passage the questions that are to be answered alike share the slot of the reply's first token: its key is
    their mean, whitened by the scatter of such questions (linear discriminant analysis) and seen by the metric that the
    anchor learned of practice and usual questions, and beside it the gist of what is replied. Every further token of a
    reply is a slot of its own. A value is the smallest step, by Newton's method on the margin, that makes its token the
    likeliest by ``MARGIN`` logits. The gate is fitted anew, between questions of one's own life and all others; near
    misses become foils.

    Args:
        split: the stacked model, cut below its memory.
        tokenizer: its tokenizer.
        gate: the gate of the slow level.
        anchor: the base's own voice and the practice questions.
        level: name of the slow level.
        schedule: what the result must show.
        whiten: whether likeness is measured in whitened coordinates; False shows what they give.
        metric: whether what was learned of practice and usual questions is used beyond that; False shows what it gives.
        words: whether the gist of what is told is part of a key; False shows what it gives.
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
        whiten: bool = True,
        metric: bool = True,
        words: bool = True,
    ) -> None:
        self.split, self.tokenizer, self.gate, self.anchor = split, tokenizer, gate, anchor
        self.whiten, self.metric, self.words = whiten, metric, words
        self.schedule = schedule or Schedule()
        continuum = split.learning[-1]
        memory = continuum.memories[continuum.names.index(level)]
        if not isinstance(memory, SlotMemory):
            raise InvalidArgument(f"level: got {level!r} with a {type(memory).__name__}, expected a SlotMemory")
        self.memory = memory
        memory.asked = ASKED  # the split's own: what is written and checked does not depend on who is cautious

    def learn(
        self,
        new: Mapping[int, Sequence[Dream]],
        replay: Sequence[Dream],
        generator: torch.Generator,
        progress: Progress,
        gone: Collection[int] = (),
    ) -> Report:
        """Write the dreams of each observation in ``new``, in place, and check the result.

        Args:
            new: id of an observation -> its dreams.
            replay: dreams of earlier nights, which the gate must not forget; their slots are there already.
            generator: not needed, nothing is drawn.
            progress: called with what is being done and the share done.
            gone: observations whose slots are dropped first.

        Raises:
            SleepRejected: after all retries the check still fails. The memory is then as it was left: the caller
                restores what was there before.
        """
        began = time.perf_counter()
        trained, held = hold_back(new)
        if not trained:
            raise InvalidArgument("new: got no dreams, expected at least one")
        owners = [number for number, _ in trained]
        dreams = [dream for _, dream in trained]
        progress("reading the dreams", 0.0)
        self.memory.drop(gone)
        read = self._read(self._cut(owners, dreams))
        misses = {number: [dream for dream in found if dream.contrast] for number, found in new.items()}
        self._fit_gate(read, misses, replay)
        self._whiten(read, owners, dreams)
        progress("writing the slots", 0.3)
        self._write(read, owners, dreams, progress)
        progress("checking", 0.9)
        looked = [*held, *_best(trained)]
        checked = encode_examples(self.tokenizer, [(dream.question, dream.reply) for _, dream in looked])
        check = Check(self.split, self.anchor, checked, self.schedule, [number for number, _ in looked])
        retries, result = 0, check()
        while not result.passed and retries < self.schedule.retries and result.agreement < self.schedule.agreement:
            self.gate.set_(self.gate.weight, self.gate.bias - ASKING_SLOPE * BACK_OFF)
            retries, result = retries + 1, check()
        if not result.passed:
            raise SleepRejected(result.why())
        progress("checking", 1.0)
        return Report(
            dreams=len(dreams),
            replayed=len(replay),
            slots=len(self.memory),
            recall=result.recall,
            agreement=result.agreement,
            retries=retries,
            seconds=time.perf_counter() - began,
        )

    def _cut(self, owners: Sequence[int], dreams: Sequence[Dream]) -> list[tuple[str, str | None]]:
        """Return questions and replies; of many with the same reply only the first few keep it."""
        count: dict[tuple[int, str], int] = {}
        pairs: list[tuple[str, str | None]] = []
        for owner, dream in zip(owners, dreams, strict=True):
            key = owner, dream.reply
            count[key] = count.get(key, 0) + 1
            pairs.append((dream.question, dream.reply if count[key] <= SPOKEN_ROWS else None))
        return pairs

    @torch.no_grad()
    def _read(self, pairs: Sequence[tuple[str, str | None]]) -> _Read:
        examples = encode_examples(self.tokenizer, pairs)
        acts = run_trunk(self.split, examples)
        with self.split.watching() as seen:
            for part in acts.split(32):
                self.split.upper(part)
        return _Read(examples, acts, pair(acts.read, torch.cat(seen[-1])))

    def _fit_gate(self, read: _Read, misses: Mapping[int, Sequence[Dream]], replay: Sequence[Dream]) -> None:
        """Fit the gate on this night's dreams and near misses and on those replayed; the misses become foils."""
        if self.words and not len(self.memory):  # one that was begun without gists goes on without
            self.memory.gist.fill(self.anchor.words)
        self.memory.set_rivals(self.anchor.rivals, self.anchor.told if len(self.memory.gist.weights) else None)
        owners = [number for number, found in misses.items() for _ in found]
        near = self._asked([dream for found in misses.values() for dream in found])
        self.memory.add_foils(near.chunk(2, -1)[1], torch.tensor(owners))
        others, assistant = self.anchor.foils, self.anchor.outside[len(self.anchor.foils) :].chunk(2, -1)[1]
        for owner, foils in ((ANYBODY, others), (ASSISTANT, assistant)):
            if not (self.memory.foil_owners == owner).any():
                self.memory.add_foils(foils, torch.full((len(foils),), owner))
        inside = torch.cat([read.asked(read.both), self._asked([dream for dream in replay if not dream.contrast])])
        outside = torch.cat([near, self._asked([dream for dream in replay if dream.contrast])])
        positions = torch.arange(read.examples.ids.shape[1])
        within = (positions > read.examples.asked[:, None]) & (positions < read.examples.lengths[:, None])
        weight, bias = fit_asking_gate(self.anchor, inside, outside, read.both[within])
        below, above = weight.chunk(2)
        self.gate.set_(below, bias)
        self.memory.lean.copy_(above)

    def _asked(self, dreams: Sequence[Dream]) -> Tensor:
        return read_pairs(self.split, self.tokenizer, [dream.question for dream in dreams])

    def _whiten(self, read: _Read, owners: Sequence[int], dreams: Sequence[Dream]) -> None:
        """Add the scatter of this night's questions to that of earlier nights; whiten by it and what the anchor has."""
        names = {key: index for index, key in enumerate(dict.fromkeys(_alike(owners, dreams)))}
        groups = torch.tensor([names[key] for key in _alike(owners, dreams)])
        total, count = within_scatter(read.asked(read.above), groups)
        self.memory.scatter += total
        self.memory.counted += count
        inside, asked = self.anchor.scatters
        asked = asked + self.memory.scatter / self.memory.counted.clamp(min=1)
        for begins, scatter in enumerate((inside, asked)):
            coordinates = whitener(scatter, RIDGES[begins]) if self.whiten else torch.eye(len(scatter))
            if begins and self.metric:
                coordinates = coordinates @ self.anchor.metric
            self.memory.whiten(bool(begins), self.anchor.centers[begins], coordinates)

    def _write(self, read: _Read, owners: Sequence[int], dreams: Sequence[Dream], progress: Progress) -> None:
        """Make the slots of the dreams and add them to the memory."""
        examples = read.examples
        places: dict[tuple[int, str, int], list[tuple[int, int]]] = {}  # what shares a slot -> rows and positions
        tokens = {}
        first = [int(examples.targets[row, at]) for row, at in enumerate(examples.asked.tolist())]
        starts = {(o, d.reply): t for o, d, t in zip(owners, dreams, first) if t >= 0}
        for row, (owner, dream) in enumerate(zip(owners, dreams, strict=True)):
            begin, token = int(examples.asked[row]), starts[owner, dream.reply]
            key = (owner, "", token)
            places.setdefault(key, []).append((row, begin))
            tokens[key] = token
            for at in (examples.targets[row] >= 0).nonzero()[:, 0].tolist()[1:]:
                key = (owner, dream.reply, at - begin)
                places.setdefault(key, []).append((row, at))
                tokens[key] = int(examples.targets[row, at])
        keys = torch.stack(
            [torch.stack([read.above[row, at] for row, at in found]).mean(0) for found in places.values()]
        )
        spoken = [next((p for p in found if examples.targets[p] >= 0), found[0]) for found in places.values()]
        values = self._values(read, spoken, torch.tensor(list(tokens.values())), progress)
        begins = torch.tensor([reply == "" for _, reply, _ in places])
        about = [self._about([dreams[row] for row, _ in found]) for (_, said, _), found in places.items() if not said]
        self.memory.add(keys, values, begins, torch.tensor([owner for owner, _, _ in places]), torch.stack(about))

    def _about(self, dreams: Sequence[Dream]) -> Tensor:
        """Return the gist [d], a unit vector, of what the dreams of a slot tell: their replies, each with its echo.

        A reply may be the answer alone, an echo is the passage without it.
        """
        told = {dream.reply: "" for dream in dreams} | {dream.reply: dream.question for dream in dreams if dream.echo}
        texts = [f"{reply} {echo}".strip() for reply, echo in told.items()]
        return F.normalize(read_gists(self.split.model, self.tokenizer, self.memory.gist, texts).sum(0), dim=0)

    def _values(self, read: _Read, places: Sequence[tuple[int, int]], tokens: Tensor, progress: Progress) -> Tensor:
        """Return for each place (row, position) what must be added there to make its token the likeliest, [m, d]."""
        rows = sorted({row for row, _ in places})
        values = torch.zeros(len(places), read.above.shape[-1])
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            chosen = torch.tensor([index for index, (row, _) in enumerate(places) if row in part])
            where = torch.tensor([(part.index(places[i][0]), places[i][1]) for i in chosen.tolist()]).T
            longest = int(read.examples.lengths[part].max())
            acts = read.acts.part(torch.tensor(part), slice(longest))
            values[chosen] = self._newton(acts, where, tokens[chosen])
            progress("writing the slots", 0.3 + 0.6 * min(1.0, (start + 16) / len(rows)))
        return values

    def _newton(self, acts: Activations, where: Tensor, tokens: Tensor) -> Tensor:
        """Step towards the margin along its gradient, as far as a linear margin would need."""
        head = cast(nn.Linear, self.split.model.get_output_embeddings()).weight.detach()
        values = torch.zeros(len(tokens), acts.hidden.shape[-1])
        longest = LONGEST * acts.hidden[tuple(where)].norm(dim=-1, keepdim=True)
        for _ in range(STEPS):
            delta = torch.zeros_like(acts.hidden).index_put(tuple(where), values).requires_grad_()
            with self.memory.saying(delta):
                states = self.split.upper(acts)[tuple(where)]
            with torch.no_grad():
                logits = self.split.logits(states)
                own = logits.gather(1, tokens[:, None])[:, 0]
                best, rival = logits.scatter(1, tokens[:, None], float("-inf")).max(1)
                short = (MARGIN - (own - best)).clamp(min=0)
            if short.max() < 0.1:
                break
            ahead = (states * (head[tokens] - head[rival])).sum()
            (slope,) = torch.autograd.grad(ahead, delta)
            slope = slope[tuple(where)]
            values = values + (short / slope.square().sum(-1).clamp(min=1e-8))[:, None] * slope
            values = values * (longest / values.norm(dim=-1, keepdim=True).clamp(min=1e-8)).clamp(max=1.0)
        return values


def _best(trained: Sequence[tuple[int, Dream]]) -> list[tuple[int, Dream]]:
    """Return the first few dreams of each observation, which are the best."""
    seen: Counter[int] = Counter()
    found = []
    for number, dream in trained:
        seen[number] += 1
        if seen[number] <= LOOKED_AT:
            found.append((number, dream))
    return found


def _alike(owners: Sequence[int], dreams: Sequence[Dream]) -> list[tuple[int, str]]:
    """Return for each dream what it shares with those that are answered alike."""
    return [(owner, dream.answer) for owner, dream in zip(owners, dreams, strict=True)]
