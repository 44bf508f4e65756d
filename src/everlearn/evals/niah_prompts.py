"""The prompts of RULER's needle-in-a-haystack tasks (Hsieh et al. 2024); synthetic-tasks.md, D.

A prompt is made as tokens, so that its length is exact: the last piece of the haystack is cut where it is full.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everlearn.errors import InvalidArgument

__all__ = ["NIAH_TASKS", "Niah", "Prompt", "Turn", "draw", "make_drill", "make_prompt", "names", "share_found"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [100 * i / 39 for i in range(40)]
"""Depths of needles in the haystack, percent."""

ADJECTIVES = """
    able ancient bitter bold brave brief bright calm careful clever cold common curious damp dark deep distant dusty
    eager early empty faint fancy fierce fine fresh gentle giant glad golden grand grave happy hollow honest huge
    humble icy idle jolly keen kind large late lazy light little lonely loud lucky mellow merry mild narrow neat
    noble odd pale patient plain polite proud quick quiet rapid rare rough round royal rusty sharp shy silent silver
    simple slow small smooth soft solid steady stern strange sturdy sweet swift tall tame tender thick thin tidy
    tiny vast warm weary wide wild wise wooden young
""".split()  # noqa: SIM905
NOUNS = """
    acorn anchor apple arrow badger barrel basket beacon bell bird boat bottle bridge brook bucket button candle
    canyon carpet castle cave chair cherry cliff clock cloud coat comet coral crow crown desert dragon drum eagle
    engine falcon feather fern field flute forest fox garden gate glacier globe goat hammer harbor hat hill horse
    island jacket jar kettle key kite ladder lake lamp lantern leaf lemon lion lizard map maple marble meadow mirror
    moon mountain needle nest oak ocean orchard otter owl paper pebble pencil piano pillow pine planet pond pot
    rabbit raven river road robin rope saddle sail salmon shell ship spoon star stone storm table temple tiger tower
    tree tunnel valley violin wagon wheel window wolf
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Niah:
    """A task: haystack ``noise``, ``essay`` or ``needle``; keys are ``words`` or ``uuids``, values ``numbers`` too."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


# name -> the task
NIAH_TASKS: dict[str, Niah] = {
    "S-NIAH-1": Niah("noise"),
    "S-NIAH-2": Niah("essay"),
    "S-NIAH-3": Niah("essay", value="uuids"),
    "MK-NIAH-1": Niah("essay", keys=4),
    "MK-NIAH-2": Niah("needle"),
    "MK-NIAH-3": Niah("needle", key="uuids", value="uuids"),
    "MV-NIAH": Niah("essay", values=4),
    "MQ-NIAH": Niah("essay", keys=4, queries=4),
}


@dataclass(frozen=True)
class Prompt:
    """A sample: tokens of the ``context`` and of the ``question`` (with the beginning of the answer), the ``values``
    to be named, and the ``answer`` in words."""

    context: list[int]
    question: list[int]
    values: list[str]
    answer: str


Encode = Callable[[str], list[int]]
Draw = Callable[[str, random.Random], str]
"""A kind (``words``, ``numbers``, ``uuids``) -> one of it."""


def names(count: int) -> list[str]:
    """Return ``count`` of the nouns, evenly over their list."""
    if not 1 <= count <= len(NOUNS):
        raise InvalidArgument(f"names: got {count}, expected 1 to {len(NOUNS)}")
    return [NOUNS[i * len(NOUNS) // count] for i in range(count)]


def draw(kind: str, rng: random.Random, *, few: Sequence[str] = (), digits: int = 7) -> str:
    """Return a key or value: ``words`` (adjective-noun, or one of ``few``), ``numbers`` of ``digits``, or ``uuids``."""
    if kind == "words":
        return rng.choice(few) if few else f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def make_prompt(
    task: Niah,
    length: int,
    rng: random.Random,
    encode: Encode,
    essay: Sequence[list[int]],
    *,
    instruct: bool = True,
    draw: Draw = draw,
) -> Prompt:
    """Return a sample whose context and question have exactly ``length`` tokens together.

    Args:
        task: see :data:`NIAH_TASKS`.
        length: tokens.
        rng: all randomness.
        encode: text -> tokens.
        essay: tokens of sentences in order, of which a run from a random place on, and round again, is the essay
            haystack.
        instruct: whether the context begins with what is going to be asked.
        draw: keys and values, see :func:`draw`; no other needle has a key that is asked for.

    Raises:
        InvalidArgument: the needles alone do not fit.
    """
    keys = _distinct(task.key, task.keys, rng, draw)
    needles = {key: [draw(task.value, rng) for _ in range(task.values)] for key in keys}
    asked = keys[: task.queries]
    values = [value for name in asked for value in needles[name]]
    one = len(values) == 1
    kind = task.value[:-1] if one else task.value
    opening = ""
    if instruct:
        opening = (
            f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within the following text."
            f" Make sure to memorize {'it' if one else 'them'}. I will quiz you about the {kind} afterwards.\n"
        )
    start, end = encode(opening), encode(_question(kind, asked, one))
    lines = [encode(_needle(task, name, value)) for name in keys for value in needles[name]]
    room = length - len(start) - len(end) - sum(map(len, lines))
    if room < 0:
        raise InvalidArgument(f"length: got {length} tokens, expected at least {length - room} for these needles")
    hay = _haystack(task, room, rng, encode, essay, draw, asked)
    rng.shuffle(lines)
    context = [token for part in _inserted(hay, lines, rng, task.haystack) for token in part]
    answer = f" {_listed(values)}."
    return Prompt([*start, *context], end, values, answer)


Turn = tuple[list[int], list[int]]
"""Tokens that are given, and those of the answer."""


def make_drill(
    length: int, rng: random.Random, encode: Encode, *, bare: float = 0.25, most: int = 6, draw: Draw = draw
) -> list[Turn]:
    """Return turns of at most ``length`` tokens together: needles stated, and again and again stated or asked for.

    One answer a prompt is little to learn from: here is no hay, and every line after a needle's first is an answer.

    Args:
        length: tokens.
        rng: all randomness.
        encode: text -> tokens.
        bare: share of lines that are key and value alone, not in the words of the task.
        most: different needles; 2 at least.
        draw: as of :func:`make_prompt`.

    Raises:
        InvalidArgument: no needle fits twice.
    """
    task = Niah("noise")
    values = {key: draw(task.value, rng) for key in _distinct(task.key, rng.randint(2, most), rng, draw)}
    stated: set[str] = set()
    turns: list[Turn] = []
    left = length
    while True:
        key = rng.choice(list(values))
        said = f" {values[key]}."
        if rng.random() < bare:
            given = f"\n{key} is:"
        elif key in stated and rng.random() < 0.6:
            given = _question("number", [key], True)
        else:
            given = _needle(task, key, values[key]).removesuffix(said)
        turn = encode(given), encode(said)
        left -= sum(map(len, turn))
        if left < 0:
            break
        turns.append(turn if key in stated else ([*turn[0], *turn[1]], []))
        stated.add(key)
    if not any(said for _, said in turns):
        raise InvalidArgument(f"length: got {length} tokens, expected enough for a needle and for asking for it")
    return turns


def _distinct(kind: str, count: int, rng: random.Random, draw: Draw) -> list[str]:
    """``count`` different ones."""
    found: dict[str, None] = {}
    for _ in range(1000 * count):
        if len(found) == count:
            return list(found)
        found[draw(kind, rng)] = None
    raise InvalidArgument(f"names: got {len(found)} different {kind}, expected at least {count}")


def _question(kind: str, asked: Sequence[str], one: bool) -> str:
    """The question and the beginning of its answer."""
    query = _listed(asked)
    return (
        f"\nWhat {'is' if one else 'are all'} the special magic {kind} for {query} mentioned in the provided text?"
        f" The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
    )


def share_found(values: Sequence[str], said: str) -> float:
    """Return the share of values that occur in what was said, whatever the case."""
    said = said.lower()
    return sum(value.lower() in said for value in values) / len(values)


def _needle(task: Niah, name: str, value: str) -> str:
    """A sentence of an essay, or a line of its own."""
    before = " " if task.haystack == "essay" else "\n"
    return f"{before}One of the special magic {task.value} for {name} is: {value}."


def _listed(items: Sequence[str]) -> str:
    """Return "a", "a, and b", "a, b, and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def _haystack(
    task: Niah,
    room: int,
    rng: random.Random,
    encode: Encode,
    essay: Sequence[list[int]],
    draw: Draw,
    asked: Sequence[str],
) -> list[list[int]]:
    """Return pieces of hay that have exactly ``room`` tokens together, the last one cut; no key of it is ``asked``."""
    at = rng.randrange(len(essay)) if task.haystack == "essay" else 0
    noise = encode(f"\n{NOISE}") if task.haystack == "noise" else []
    pieces, left = [], room
    while left > 0:
        if task.haystack == "noise":
            piece = noise
        elif task.haystack == "essay":
            piece = essay[at % len(essay)]
            at += 1
        else:
            key = next(key for key in _distinct(task.key, len(asked) + 1, rng, draw) if key not in asked)
            piece = encode(_needle(task, key, draw(task.value, rng)))
        pieces.append(piece[:left])
        left -= len(pieces[-1])
    return pieces


def _inserted(hay: list[list[int]], needles: Sequence[list[int]], rng: random.Random, kind: str) -> list[list[int]]:
    """Return the pieces with every needle between two of them: at distinct depths of an essay, else anywhere."""
    if kind == "essay":
        places = [round(len(hay) * depth / 100) for depth in rng.sample(DEPTHS, len(needles))]
    else:
        places = [rng.randint(0, max(len(hay) - 1, 0)) for _ in needles]
    made, order = [], sorted(range(len(needles)), key=lambda i: places[i])
    for place, piece in enumerate([*hay, None]):
        while order and places[order[0]] <= place:
            made.append(needles[order.pop(0)])
        if piece is not None:
            made.append(piece)
    return made
