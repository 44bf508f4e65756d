"""The learner: one user's memory on a shared base model. It hears, chats, sleeps, and remembers in its weights."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import FingerprintError, InvalidArgument
from everlearn.learner.anchor import Anchor
from everlearn.learner.chat import Message, stream_reply
from everlearn.learner.consolidation import Consolidator, Objective, Optimizer, Report, Schedule, adamw
from everlearn.learner.dreams import Dream, Dreamer, SelfStudyDreamer
from everlearn.learner.journal import diff_nights, find_observations
from everlearn.learner.night import (
    Kept,
    before_knowing,
    choose_replay,
    dreamt,
    holding,
    kept_dreams,
    relearned,
)
from everlearn.learner.reports import Reminder, SleepReport
from everlearn.learner.sampling import encode
from everlearn.learner.selection import Judgement, Selector, SurpriseSelector
from everlearn.learner.slots import SlotConsolidator
from everlearn.learner.store import MemoryStore, Night, Observation
from everlearn.learner.superseding import superseded, superseding
from everlearn.learner.voice import Voice
from everlearn.learner.weights import SLOW, Layout, Weights
from everlearn.levels import Level
from everlearn.models.hub import DEFAULT_MODEL, load_model
from everlearn.models.stacking import reset_level, restore, snapshot
from everlearn.models.streaming import Stream
from everlearn.models.trunk import SplitModel

Progress = Callable[[str, float], None]
SelectorFactory = Callable[[PreTrainedModel, PreTrainedTokenizerBase, SplitModel, Anchor], Selector]


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
        caution: float | None = None,
        seed: int = 0,
        dreamer: Dreamer | None = None,
        selector: SelectorFactory = SurpriseSelector,
        schedule: Schedule | None = None,
        consolidator: Callable[..., Consolidator | SlotConsolidator] | None = None,
        objective: Objective | None = None,
        optimizer: Optimizer | None = None,
        voice: Voice | None = None,
        progress: Progress | None = None,
    ) -> None:
        """See :meth:`from_pretrained`; ``store`` must be open."""
        self.base, self.tokenizer, self.store, self.seed = base, tokenizer, store, seed
        self.schedule = schedule or Schedule()
        self._objective, self._optimizer, self._selector, self._dreamer = objective, optimizer, selector, dreamer
        self._consolidator = consolidator
        self._progress = progress or (lambda stage, share: None)
        layout = layout or Layout()
        if layout.width is None and (objective is not None or optimizer is not None):
            raise InvalidArgument(
                "objective, optimizer: got one for slots, which are written; give a layout with a width"
            )
        self._weights = Weights(base, tokenizer, levels, layout, voice, self._progress)
        self._check_base()
        self.model = self._weights.model
        self._stream = Stream(self.model) if any(level.every for level in levels) else None
        self._day = [level.name for level in levels]
        self._weights.load(store.load_state())
        if caution is not None:
            self._weights.be_cautious(caution)

    @classmethod
    def from_pretrained(
        cls,
        model: str | PreTrainedModel = DEFAULT_MODEL,
        *,
        memory: str | Path | MemoryStore,
        tokenizer: PreTrainedTokenizerBase | None = None,
        create: bool = True,
        **parts: Any,
    ) -> Learner:
        """Open the memory in the folder ``memory`` (made if there is none and ``create``) on a base model.

        Args:
            model: a name for :func:`~everlearn.models.hub.load_model`, or a loaded base model with its ``tokenizer``.
            memory: the user's folder, one process at a time; or an open store, or anything with its methods.
            tokenizer: of a model given as an object.
            create: whether to make the folder.
            parts: ``levels`` (faster levels, each with a period; they live for the day), ``layout``, ``caution`` (the
                least likeness of a question to a dreamt one for the memory to answer, up to 1.3: with .15, the default,
                it tries most questions about the user's life, with .35 those that it knows well), ``seed``,
                ``dreamer``, ``selector``, ``schedule``, ``consolidator``, ``voice``, ``progress``; with a ``layout``
                that is trained by gradient also ``objective`` and ``optimizer``.

        Raises:
            ModelNotFound, StackingError, StoreLocked, StoreCorrupt, StoreError: see their texts.
            FingerprintError: the memory was made on another base model.
        """
        store = MemoryStore.open(memory, create=create) if isinstance(memory, str | Path) else memory
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
    ) -> Generator[str, None, None]:
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

    def reminded(self, question: str, most: int = 3) -> list[Reminder]:
        """Return the observations that ``question``, asked in an empty conversation, brings up, the likest first.

        Args:
            question: what is asked.
            most: how many are returned, at most.

        Raises:
            InvalidArgument: ``most`` is below 1, or the memory is not one of slots (trained weights do not tell).
        """
        if most < 1:
            raise InvalidArgument(f"most: got {most}, expected at least 1")
        likeness, heard = self._weights.reminded(question)
        near = sorted(likeness, key=likeness.__getitem__, reverse=True)[:most]
        known = {item.id: item for item in self.store.history()}
        return [Reminder(known[number], likeness[number], number == heard) for number in near]

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
        chosen = [(item, _worth(item, j)) for item, j in zip(heard, judged, strict=True) if _wanted(item, j)]
        dreamer, texts, old = self._make_dreamer(), {item.id: text for item, text in chosen}, kept_dreams(self.store)
        new, beside = dreamt(dreamer, texts, old, generator, self._progress)
        dismissed = [item.id for item in heard if item.id not in new and not item.meta.get("remember")]
        given = superseded(dreamer, {key: (texts[key], found) for key, found in new.items()}, old, beside)
        report, night = None, None
        if new:
            givers = {number for taken in given.values() for number in taken.ids}
            lost = tuple(sorted({item.observation for item in old if item.id in givers}))
            left = holding(old, givers)
            new = {key: found.dreams for key, found in given.items()}
            report, night = self._consolidate(new, left, lost, generator, superseding(given), dismissed)
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
        ids = find_observations([item for item in self.store.history() if item.state != "forgotten"], what)
        if not self.store.needs_rebuild(ids):
            self.store.forget(ids)
            return ids
        parent, relearn, known, lost = before_knowing(self.store, ids)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.store.head + 1)
        with self._asleep():
            self._weights.load(self.store.load_state(parent))
            metrics: dict[str, Any] = {"rebuilt_from": parent}
            if relearn:
                replay = choose_replay(known, self._replay_size(relearn.values()), generator)
                report = self._make_consolidator().learn(relearn, replay, generator, self._progress, lost)
                metrics |= report.metrics()
            self.store.forget(ids, self._weights.dump(), metrics=metrics)
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
        self._weights.load(self.store.load_state())

    def diff(self, old: int, new: int | None = None) -> dict[str, Any]:
        """Return what separates two nights: the observations learned, those lost, and how many both know."""
        return diff_nights(self.store, old, new)

    def export(self, file: str | Path) -> dict[str, Any]:
        """Write the whole memory to one file and return its manifest."""
        return self.store.export(file)

    @classmethod
    def import_(cls, file: str | Path, *, memory: str | Path, replace: bool = False) -> None:
        """Make the memory folder ``memory`` from an exported ``file``; see ``MemoryStore.import_``."""
        MemoryStore.import_(file, memory, replace=replace)

    def status(self) -> dict[str, Any]:
        """Return the store's status, the bytes of the memory in the weights, and the layers that carry it."""
        return {**self.store.status(), "memory_bytes": self._weights.bytes, "layers": self._weights.layers}

    # inside

    def _check_base(self) -> None:
        recorded, ours = self.store.base, self._weights
        if recorded is None:
            self.store.set_base({"name": ours.name, "fingerprint": ours.fingerprint})
        elif recorded.get("fingerprint") != ours.fingerprint:
            raise FingerprintError(
                f"{self.store.path} belongs to {recorded.get('name')} (fingerprint {recorded.get('fingerprint')}), but"
                f" the model here is {ours.name} (fingerprint {ours.fingerprint}); open it on its own base model"
            )

    def _consolidate(
        self,
        new: dict[int, list[Dream]],
        left: list[Kept],
        lost: tuple[int, ...],
        generator: torch.Generator,
        metrics: dict[str, Any],
        dismissed: list[int],
    ) -> tuple[Report, int]:
        """Learn ``new`` beside what is ``left`` of the old; of those that ``lost`` some that is learned anew."""
        again, known = relearned(left, lost)
        replay = choose_replay(known, self._replay_size(new.values()), generator)
        with self._asleep():
            report = self._make_consolidator().learn({**again, **new}, replay, generator, self._progress, lost)
            night = self.store.commit_night(
                self._weights.dump(),
                consolidated=list(new),
                dismissed=dismissed,
                dreams={key: [dream.payload() for dream in found] for key, found in new.items()},
                metrics={**metrics, **report.metrics()},
            )
        return report, night

    @contextlib.contextmanager
    def _asleep(self) -> Iterator[None]:
        """Hold the faster levels at their start while the slow one learns; if that fails all is as it was before."""
        before, day = self.store.load_state(), {name: snapshot(self.model, name) for name in self._day}
        for name in self._day:
            reset_level(self.model, name)
        try:
            yield
        except BaseException:
            self._weights.load(before)
            for name, state in day.items():
                restore(self.model, state, name)
            raise

    def _dismiss(self, ids: list[int]) -> int | None:
        """Commit a night in which nothing was learned, so that its small talk is not judged again."""
        if not ids:
            return None
        return self.store.commit_night(self._weights.dump(), dismissed=ids)

    def _replay_size(self, new: Iterable[Sequence[Dream]]) -> int:
        return round(self.schedule.replay * sum(map(len, new)))

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

    def _make_selector(self) -> Selector:
        return self._selector(self.model, self.tokenizer, self._weights.split, self._weights.anchor)

    def _make_dreamer(self) -> Dreamer:
        if self._dreamer is None:
            self._dreamer = SelfStudyDreamer(self.base, self.tokenizer)
        return self._dreamer

    def _make_consolidator(self) -> Consolidator | SlotConsolidator:
        how: dict[str, Any] = {"level": SLOW, "schedule": self.schedule}
        make: Callable[..., Consolidator | SlotConsolidator] | None = self._consolidator
        if self._weights.layout.width is None:
            make = make or SlotConsolidator
        else:
            make = make or Consolidator
            how |= {"objective": self._objective, "optimizer": self._optimizer or adamw}
        weights = self._weights
        return make(weights.split, self.tokenizer, weights.gate, weights.anchor, **how)


def _worth(item: Observation, judged: Judgement) -> str:
    """Return what is dreamt of: all of what is to be remembered, else what tells something."""
    return item.text if item.meta.get("remember") else judged.worth or item.text


def _wanted(item: Observation, judged: Judgement) -> bool:
    return judged.keep or bool(item.meta.get("remember"))
