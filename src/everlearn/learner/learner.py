"""The learner: one user's memory on a shared base model. It hears, chats, sleeps, and remembers in its weights."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import FingerprintError, InvalidArgument, SleepRejected, StoreError
from everlearn.learner.anchor import Anchor, load_anchor
from everlearn.learner.chat import Message, stream_reply
from everlearn.learner.consolidation import Consolidator, Objective, Optimizer, Report, Schedule, adamw
from everlearn.learner.dreams import Dream, Dreamer, SelfStudyDreamer
from everlearn.learner.journal import diff_nights, find_observations
from everlearn.learner.night import Kept, choose_replay, kept_dreams, superseded
from everlearn.learner.sampling import encode
from everlearn.learner.selection import Selector, SurpriseSelector
from everlearn.learner.store import MemoryStore, Night, Observation
from everlearn.learner.voice import Voice, load_voice
from everlearn.levels import Level
from everlearn.memories.gated import GatedMemory, gated_memories
from everlearn.memories.residual import ResidualMemory
from everlearn.models.hub import DEFAULT_MODEL, load_model
from everlearn.models.memory_file import fingerprint, load_memory, save_memory
from everlearn.models.stacking import continua, is_stacked, memory_state, reset_level, stack_levels
from everlearn.models.streaming import Stream
from everlearn.models.structure import find_decoder
from everlearn.models.trunk import SplitModel

SLOW = "slow"

Progress = Callable[[str, float], None]
SelectorFactory = Callable[[PreTrainedModel, PreTrainedTokenizerBase, SplitModel, Anchor], Selector]


@dataclass(frozen=True)
class Layout:
    """Where the slow level sits and how large it is.

    Attributes:
        first: depth of the lowest memory as a share of the model's layers; the trunk below runs once per text.
        last: depth at which the memories end.
        width: hidden units of each memory.
        day_width: hidden units of the memories of the levels above the slow one, if there are any.
    """

    first: float = 0.46
    last: float = 0.73
    width: int = 128
    day_width: int = 16

    def layers(self, count: int) -> list[int]:
        """Return the layers that carry memories, of a model of ``count`` layers."""
        first = min(int(self.first * count + 0.5), count - 1)
        return list(range(first, max(first + 1, int(self.last * count + 0.5))))


@dataclass(frozen=True)
class SleepReport:
    """What a sleep did.

    Attributes:
        night: number of the new night, None when there was nothing to learn.
        consolidated: ids of the observations learned.
        dismissed: ids of those judged to be small talk, or of which nothing could be dreamt.
        superseded: ids of older observations some of whose dreams gave way to what was told later.
        learning: what the consolidation measured, None when there was nothing to learn.
        seconds: of the whole sleep.
    """

    night: int | None
    consolidated: tuple[int, ...]
    dismissed: tuple[int, ...]
    superseded: tuple[int, ...]
    learning: Report | None
    seconds: float


class Learner:
    """A causal LM with one user's memory. Made by :meth:`from_pretrained`; best used as a context manager.

    Everything that is heard is on disk before the call returns. The base model is never written: any number of learners
    can share one.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: MemoryStore,
        *,
        levels: Sequence[Level] = (),
        layout: Layout | None = None,
        seed: int = 0,
        dreamer: Dreamer | None = None,
        selector: SelectorFactory = SurpriseSelector,
        schedule: Schedule | None = None,
        objective: Objective | None = None,
        optimizer: Optimizer = adamw,
        voice: Voice | None = None,
        progress: Progress | None = None,
    ) -> None:
        """See :meth:`from_pretrained`; ``store`` must be open."""
        self.base, self.tokenizer, self.store, self.seed = base, tokenizer, store, seed
        self._check_base()
        self.layout, self.schedule = layout or Layout(), schedule or Schedule()
        self._objective, self._optimizer, self._selector = objective, optimizer, selector
        self._dreamer, self._voice = dreamer, voice
        self._progress = progress or (lambda stage, share: None)
        self.model = self._stack(levels)
        self._split: SplitModel | None = None
        self._anchor: Anchor | None = None
        self._stream = Stream(self.model) if any(level.every for level in levels) else None
        self._day = [level.name for level in levels]
        self._load(store.load_state())

    @classmethod
    def from_pretrained(
        cls,
        model: str | PreTrainedModel = DEFAULT_MODEL,
        *,
        memory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        create: bool = True,
        **parts: Any,
    ) -> Learner:
        """Open the memory in the folder ``memory`` (made if there is none and ``create``) on a base model.

        Args:
            model: a name for :func:`~everlearn.models.hub.load_model`, or a loaded base model with its ``tokenizer``.
            memory: the user's folder; one process at a time.
            tokenizer: of a model given as an object.
            create: whether to make the folder.
            parts: ``levels`` (faster levels, each with a period; they live for the day), ``layout``, ``seed``,
                ``dreamer``, ``selector``, ``schedule``, ``objective``, ``optimizer``, ``voice``, ``progress``.

        Raises:
            ModelNotFound, StackingError, StoreLocked, StoreCorrupt, StoreError: see their texts.
            FingerprintError: the memory was made on another base model.
        """
        store = MemoryStore.open(memory, create=create)
        try:
            if isinstance(model, PreTrainedModel):
                if tokenizer is None:
                    raise InvalidArgument("tokenizer: got None beside a model object, expected its tokenizer")
                base = model
            else:
                base, loaded = load_model(model, progress=parts.get("progress"))
                tokenizer = tokenizer or loaded
            return cls(base, tokenizer, store, **parts)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Release the memory folder; a second call does nothing."""
        self.store.close()

    def __enter__(self) -> Learner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # awake

    def observe(self, text: str, *, remember: bool = False) -> Observation:
        """Hear ``text``: it is journalled, durably, before this returns; the faster levels read it.

        Args:
            text: what the user said.
            remember: keep it at the next sleep even if it does not seem worth it.
        """
        number = self.store.add_observation(text, meta={"remember": True} if remember else None)
        self._live(text)
        return next(item for item in self.store.history() if item.id == number)

    def chat(
        self, conversation: str | Sequence[Message], *, max_new_tokens: int = 128, **generate: Any
    ) -> Iterator[str]:
        """Hear the last message of ``conversation`` and stream the reply, greedily by default.

        A string is the first message of a new, empty conversation. The message is journalled before the first piece of
        the reply comes; the reply is not. ``generate`` goes to ``model.generate``.
        """
        said = conversation if isinstance(conversation, str) else conversation[-1]["content"]
        pieces = stream_reply(self.model, self.tokenizer, conversation, max_new_tokens=max_new_tokens, **generate)
        self.store.add_observation(said)
        yield from pieces
        self._live(said)

    def ask(self, question: str, *, max_new_tokens: int = 64, **generate: Any) -> str:
        """Return the reply to ``question`` in an empty conversation; nothing is journalled or learned."""
        return "".join(
            stream_reply(self.model, self.tokenizer, question, max_new_tokens=max_new_tokens, **generate)
        ).strip()

    # asleep

    def sleep(self) -> SleepReport:
        """Consolidate what was heard since the last sleep into the slow level; all or nothing.

        Select, dream, replay, learn, check, commit (see memory-runtime in the docs). The faster levels start anew.

        Raises:
            SleepRejected: the result did not pass its check; nothing was changed and the day is still heard.
            StoreError: the night could not be written; nothing was changed.
        """
        began = time.perf_counter()
        history = self.store.history()
        heard = [item for item in history if item.state == "heard"]
        if not heard:
            return SleepReport(None, (), (), (), None, time.perf_counter() - began)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.store.head + 1)
        self._progress("selecting what to keep", 0.0)
        judged = self._make_selector().judge([item.text for item in heard])
        wanted = [item for item, j in zip(heard, judged, strict=True) if j.keep or item.meta.get("remember")]
        dreamer = self._make_dreamer()
        dreams = dreamer.dream([item.text for item in wanted], generator, self._progress) if wanted else []
        new = {item.id: found for item, found in zip(wanted, dreams, strict=True) if found}
        dismissed = [item.id for item in heard if item.id not in new and not item.meta.get("remember")]
        old = kept_dreams(self.store)
        texts = {item.id: item.text for item in wanted}
        gone = superseded(dreamer, {key: (texts[key], found) for key, found in new.items()}, old)
        report, night = None, None
        if new:
            givers = {number for numbers in gone.values() for number in numbers}
            remaining = [item for item in old if item.id not in givers]
            replay = choose_replay(remaining, self._replay_size(new), generator)
            metrics = {"superseded": {str(key): sorted(numbers) for key, numbers in gone.items() if numbers}}
            report, night = self._consolidate(list(new.values()), replay, generator, metrics, new, dismissed)
            lost = tuple(sorted({item.observation for item in old if item.id in givers}))
        else:
            night, lost = self._dismiss(dismissed), ()
        self._wake()
        return SleepReport(night, tuple(new), tuple(dismissed), lost, report, time.perf_counter() - began)

    def forget(self, what: str | int | Sequence[int]) -> list[int]:
        """Forget observations: their text, their dreams and all that was learned from them; return their ids.

        Args:
            what: an id, several, or words: the whole text of an observation, or a part that only one contains.

        The slow level is rebuilt from the last night that had not learned them, with the dreams of what remains.

        Raises:
            InvalidArgument: nothing, or more than one observation, fits the words.
        """
        ids = self._find(what)
        if not self.store.needs_rebuild(ids):
            self.store.forget(ids)
            return ids
        parent, relearn, replay = self._without(ids)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.store.head + 1)
        before = self.store.load_state()
        self._load(self.store.load_state(parent))
        try:
            metrics: dict[str, Any] = {"rebuilt_from": parent}
            if relearn:
                metrics |= self._make_consolidator().learn(relearn, replay, generator, self._progress).metrics()
            with self._saved() as file:
                self.store.forget(ids, file, metrics=metrics)
        except BaseException:
            self._load(before)
            raise
        self._wake()
        return ids

    # the journal

    def history(self) -> list[Observation]:
        """Return every observation with its state: heard, consolidated, dismissed or forgotten."""
        return self.store.history()

    def nights(self) -> list[Night]:
        """Return every night, oldest first."""
        return self.store.nights()

    def rollback(self, night: int) -> None:
        """Return to the memory as it was after ``night`` (0: nothing learned), bit for bit; later days are heard again.

        What was heard stays in the journal, and later nights stay to be returned to.
        """
        self.store.rollback(night)
        self._load(self.store.load_state())

    def diff(self, old: int, new: int | None = None) -> dict[str, Any]:
        """Return what separates two nights: observations learned or lost, and how far the weights moved."""
        return diff_nights(self.store, old, new)

    def export(self, file: str | Path) -> dict[str, Any]:
        """Write the whole memory to one file and return its manifest."""
        return self.store.export(file)

    @classmethod
    def import_(cls, file: str | Path, *, memory: str | Path, replace: bool = False) -> None:
        """Make the memory folder ``memory`` from an exported ``file``; see ``MemoryStore.import_``."""
        MemoryStore.import_(file, memory, replace=replace)

    def status(self) -> dict[str, Any]:
        """Return the store's status and the size of the memory in the weights."""
        parameters = sum(tensor.numel() * tensor.element_size() for tensor in self._slow_tensors())
        return {**self.store.status(), "memory_bytes": parameters, "layers": sorted(continua(self.model))}

    # inside

    def _check_base(self) -> None:
        if is_stacked(self.base):
            raise InvalidArgument("model: got a stacked model, expected its base")
        own = fingerprint(self.base)
        recorded = self.store.base
        if recorded is None:
            self.store.set_base({"name": _name(self.base), "fingerprint": own})
        elif recorded.get("fingerprint") != own:
            raise FingerprintError(
                f"{self.store.path} belongs to {recorded.get('name')} (fingerprint {recorded.get('fingerprint')}), but"
                f" the model here is {_name(self.base)} (fingerprint {own}); open it on its own base model"
            )

    def _stack(self, levels: Sequence[Level]) -> PreTrainedModel:
        if any(level.every is None for level in levels):
            raise InvalidArgument("levels: got one without a period; the slow level is there by itself")
        count = len(find_decoder(self.base).mlps)
        factories: dict[str, Any] = {level.name: self._day_memory for level in levels}
        return stack_levels(
            self.base,
            [*levels, Level(SLOW)],
            wiring="independent",
            layers=self.layout.layers(count),
            memory={**factories, SLOW: gated_memories(self.layout.width)},
        )

    def _day_memory(self, hidden_size: int) -> ResidualMemory:
        return ResidualMemory(hidden_size, self.layout.day_width)

    def _load(self, state: bytes | None) -> None:
        """Put a night's snapshot, or the untouched start, into the slow level."""
        if state is None:
            reset_level(self.model, SLOW)
            return
        with tempfile.TemporaryDirectory(prefix="everlearn-") as folder:
            file = Path(folder) / "night.safetensors"
            file.write_bytes(state)
            load_memory(self.model, file)

    @contextlib.contextmanager
    def _saved(self) -> Iterator[Path]:
        """Yield a file that holds the slow level as it is now."""
        with tempfile.TemporaryDirectory(prefix="everlearn-") as folder:
            file = Path(folder) / "night.safetensors"
            save_memory(self.model, file, level=SLOW)
            yield file

    def _consolidate(
        self,
        passages: list[list[Dream]],
        replay: list[Dream],
        generator: torch.Generator,
        metrics: dict[str, Any],
        new: dict[int, list[Dream]],
        dismissed: list[int],
    ) -> tuple[Report, int]:
        before = self.store.load_state()
        try:
            report = self._make_consolidator().learn(passages, replay, generator, self._progress)
            with self._saved() as file:
                night = self.store.commit_night(
                    file,
                    consolidated=list(new),
                    dismissed=dismissed,
                    dreams={key: [dream.payload() for dream in found] for key, found in new.items()},
                    metrics={**metrics, **report.metrics()},
                )
        except BaseException:
            self._load(before)
            raise
        return report, night

    def _dismiss(self, ids: list[int]) -> int | None:
        """Commit a night in which nothing was learned, so that its small talk is not judged again."""
        if not ids:
            return None
        with self._saved() as file:
            return self.store.commit_night(file, dismissed=ids)

    def _replay_size(self, new: dict[int, list[Dream]]) -> int:
        return round(self.schedule.replay * sum(map(len, new.values())))

    def _without(self, ids: Sequence[int]) -> tuple[int, list[list[Dream]], list[Dream]]:
        """Return the last night that did not know ``ids``, the dreams to learn again from there, and some to replay."""
        gone = set(ids)
        nights = {night.n: night for night in self.store.nights()}
        number = self.store.head
        learned = {item.id: item.night for item in self.store.history() if item.state == "consolidated"}
        first = min(night for key, night in learned.items() if key in gone and night is not None)
        while number and (number >= first or nights[number].unavailable is not None):
            number = nights[number].parent
        known = {item.id for item in self.store.history(number) if item.state == "consolidated"}
        dreams = [item for item in kept_dreams(self.store, without=gone) if item.observation not in gone]
        again: dict[int, list[Dream]] = {}
        for item in dreams:
            if item.observation not in known:
                again.setdefault(item.observation, []).append(item.dream)
        replay = choose_replay(
            [item for item in dreams if item.observation in known],
            self._replay_size(again),
            torch.Generator().manual_seed(self.seed),
        )
        return number, list(again.values()), replay

    def _find(self, what: str | int | Sequence[int]) -> list[int]:
        live = [item for item in self.store.history() if item.state != "forgotten"]
        if not isinstance(what, str):
            ids = [what] if isinstance(what, int) else list(what)
            odd = [number for number in ids if number not in {item.id for item in live}]
            if odd or not ids:
                raise InvalidArgument(f"what: got {what}, expected ids of observations that are not forgotten")
            return ids
        return find_observations(live, what)

    def _live(self, text: str) -> None:
        """Let the faster levels read what the user said."""
        if self._stream is not None:
            self._stream.feed(encode(self.tokenizer, text.strip() + "\n"))

    def _wake(self) -> None:
        """A new day: the faster levels start anew."""
        for name in self._day:
            reset_level(self.model, name)
        if self._stream is not None:
            self._stream = Stream(self.model)

    def _slow_tensors(self) -> list[torch.Tensor]:
        return list(memory_state(self.model, SLOW).values())

    def _make_split(self) -> SplitModel:
        if self._split is None:
            self._split = SplitModel(self.model)
        return self._split

    def _make_anchor(self) -> Anchor:
        """Return the anchor, made on an untouched stack of the same layout."""
        if self._anchor is None:
            voice = self._voice or load_voice(self.base, self.tokenizer, progress=self._progress)
            self._progress("reading the base model's own voice", 0.0)
            fresh = SplitModel(self._stack(()))
            self._anchor = load_anchor(fresh, self.tokenizer, voice, f"{fingerprint(self.base)}-{fresh.layer}")
        return self._anchor

    def _make_selector(self) -> Selector:
        return self._selector(self.model, self.tokenizer, self._make_split(), self._make_anchor())

    def _make_dreamer(self) -> Dreamer:
        if self._dreamer is None:
            self._dreamer = SelfStudyDreamer(self.base, self.tokenizer)
        return self._dreamer

    def _make_consolidator(self) -> Consolidator:
        lowest = next(iter(continua(self.model).values()))
        memory = lowest.memories[lowest.names.index(SLOW)]
        if not isinstance(memory, GatedMemory):
            raise InvalidArgument("the slow level has no gate")
        return Consolidator(
            self._make_split(),
            self.tokenizer,
            memory.gate,
            self._make_anchor(),
            level=SLOW,
            schedule=self.schedule,
            objective=self._objective,
            optimizer=self._optimizer,
        )


def _name(model: PreTrainedModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


__all__ = ["Kept", "Layout", "Learner", "SleepRejected", "SleepReport", "StoreError", "diff_nights"]
