"""The base model's own voice: what it asks and answers by itself, sampled once per base model and cached.

It is the reference of what is ordinary: on it a memory must stay silent, or agree with the base. Nothing of a user is
in it, so all users of a base share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import StoreCorrupt, StoreError
from everlearn.learner import prompts
from everlearn.learner.asked import load_kinds
from everlearn.learner.chat import chat_prompt
from everlearn.learner.practice import load_practice
from everlearn.learner.sampling import Prompt, common_start, encode
from everlearn.models.hub import cache_dir
from everlearn.models.memory_file import atomic_write, fingerprint

VERSION = 3
REPLY_TOKENS = 16

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Voice:
    """Texts the base model made: questions of four kinds, its replies to the first two, and things people say.

    Attributes:
        general: (prompt, the base's reply): about the world.
        others: (prompt, the base's reply): about people nobody told it of.
        own: questions somebody may ask about their own life, plain and dressed in a situation.
        statements: things people tell of themselves.
        chatter: things people say that tell nothing.
        practice: questions about one thing of one's own life in several wordings, group by group; not the base's: texts
            that come with the package, or yours.
        elsewhere: questions in such words, but about the world or about somebody else; from where ``practice`` is.
        assistant: such questions about the assistant's own life.
        told: what each group of ``practice`` asks about, in the words of whoever told it; none, or one for each.
        usual: what people ask of their own lives in several wordings, group by group, the plainest first; from where
            ``practice`` is.
    """

    general: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, str], ...]
    own: tuple[str, ...]
    statements: tuple[str, ...]
    chatter: tuple[str, ...]
    practice: tuple[tuple[str, ...], ...] = ()
    elsewhere: tuple[str, ...] = ()
    assistant: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    usual: tuple[tuple[str, ...], ...] = ()


def load_voice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> Voice:
    """Return the voice of the base ``model``, from the cache, or made now and cached.

    Args:
        model: the base model, not stacked.
        tokenizer: its tokenizer.
        size: prompts of each kind; twice as many of those with replies.
        seed: of the sampling; a voice of another size or seed is another file.
        progress: called with what is being done and the share done, from 0 to 1.
    """
    path = cache_dir() / "voices" / f"{fingerprint(model)}-{VERSION}-{size}-{seed}.json"
    cached = _read(path)
    if cached is not None:
        return _practised(cached)
    voice = make_voice(model, tokenizer, size=size, seed=seed, progress=progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be made: {error}; set EVERLEARN_CACHE to a folder of yours") from error
    atomic_write(path, json.dumps(asdict(voice), ensure_ascii=False, indent=1).encode())
    return _practised(voice)


def _practised(voice: Voice) -> Voice:
    """Return ``voice`` with the practice texts and the usual questions of the package."""
    records = load_practice()
    return replace(
        voice,
        practice=tuple(record.questions for record in records),
        elsewhere=tuple(asked for record in records for asked in record.elsewhere()),
        assistant=tuple(record.assistant for record in records),
        told=tuple(record.said for record in records),
        usual=tuple(kind.ask for kind in load_kinds()),
    )


def make_voice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> Voice:
    """Sample a voice: lists of prompts continued line by line at temperature 0.8 to 1, then greedy replies."""
    generator = torch.Generator().manual_seed(seed)
    report = progress or (lambda stage, share: None)

    def lines(text: str, starts: Sequence[str], count: int, temperature: float) -> list[str]:
        begun = [starts[index % len(starts)] for index in range(count)]
        ends = Prompt(model, tokenizer, text).sample(
            begun, max_new_tokens=28, generator=generator, temperature=temperature
        )
        known = set(text.splitlines())
        whole = (prompts.joined(start, end) for start, end in zip(begun, ends))
        return [line for line in dict.fromkeys(whole) if line not in known and 2 <= len(line.split()) <= 30]

    stages = [
        ("general", prompts.GENERAL, prompts.WISHING, 2 * size, 1.0),
        ("others", prompts.OTHERS, (*prompts.OTHERING, *prompts.ASKING), 2 * size, 0.8),
        ("own", prompts.OWN, prompts.ASKING, size, 0.8),
        ("situations", prompts.SITUATIONS, prompts.SITUATING, size, 0.8),
        ("statements", prompts.STATEMENTS, prompts.TELLING, size, 0.8),
        ("chatter", prompts.CHATTER, prompts.CHATTING, size, 0.8),
    ]
    made: dict[str, list[str]] = {}
    for index, (name, text, starts, count, temperature) in enumerate(stages):
        report("listening to the base model's own voice (once per model)", 0.08 * index)
        made[name] = lines(text, starts, count, temperature)
    replies: dict[str, tuple[tuple[str, str], ...]] = {}
    for index, name in enumerate(("general", "others")):
        report("listening to the base model's own voice (once per model)", 0.5 + 0.25 * index)
        replies[name] = tuple(zip(made[name], greedy_replies(model, tokenizer, made[name]), strict=True))
    report("the base model's voice is ready", 1.0)
    return Voice(
        general=replies["general"],
        others=replies["others"],
        own=(*made["own"], *made["situations"]),
        statements=tuple(made["statements"]),
        chatter=tuple(made["chatter"]),
    )


def greedy_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: Sequence[str], tokens: int = REPLY_TOKENS
) -> list[str]:
    """Return what ``model`` replies to each message in an empty conversation, cut after ``tokens`` tokens."""
    if not messages:
        return []
    rows = [encode(tokenizer, chat_prompt(tokenizer, message)) for message in messages]
    shared = common_start(rows)
    head, generator = Prompt(model, tokenizer, rows[0][:shared]), torch.Generator()
    tails = [row[shared:] for row in rows]
    return head.sample(tails, max_new_tokens=tokens, generator=generator, temperature=0, stop=None)


def _read(path: Path) -> Voice | None:
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        pairs = {name: tuple((a, b) for a, b in kept[name]) for name in ("general", "others")}
        return Voice(**pairs, **{name: tuple(kept[name]) for name in ("own", "statements", "chatter")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{path} is damaged ({error}); delete it, it will be made anew") from error
