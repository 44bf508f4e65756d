"""The slot memory: an associative memory that is written in closed form, one slot for each thing to be said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.memories.carried import NOBODY, Turn, take_turn
from everlearn.memories.gated import Gate, GatedMemory, rms_normalise
from everlearn.memories.gist import Gist

TRUST = 24.0  # of the gate in how much nearer a slot is than every foil
TRUST_MOST = 2.0  # that opens it by: what merely shares the words of something told stays shut
LITERAL, LITERAL_MOST = (
    0.6,
    10.0,
)  # likeness from which a question is nearly word for word one dreamt, and the same then
ANYBODY, ASSISTANT = -1, -2  # owners of the foils that come with the base model; of questions about the assistant
SHARPNESS = 100.0  # of the competition between slots, in units of cosine
SPOKEN = 0.3  # least likeness to a slot that goes on with a reply: only those of its own owner compete
ASKED = 0.15  # to one that begins a reply: questions come in other words than the dreamt ones
ABOUT = 0.3  # weight of the cosine of two gists in a likeness, beside that of what was read
LIKEST = 1.0 + ABOUT
RIVALRY = 0.5  # and above that share of the likeness to the nearest rival: it may ask for that, never told


class _Prepared(NamedTuple):
    """Slots that go on and that begin, apart: keys, all kinds of foils and rivals as coordinates; values and owners.

    ``about`` and ``rivals_about`` are gists, times their weight.
    """

    spoken: Tensor
    begun: Tensor
    about: Tensor
    foils: Tensor
    assistant: Tensor
    rivals: Tensor
    rivals_about: Tensor
    values: Tensor
    owners: Tensor


class SlotMemory(nn.Module):
    """``M(x) = x + sum_c a_c v_c``: a is a softmax over the slots that are near enough, and over saying nothing.

    A slot is a key, the mean of what the memory reads where the same thing is to be said, and a value, what is to be
    added there. Likeness is the cosine in whitened coordinates, ``cos((x/rms(x) - c) P, (k - c) P)``. Slots that begin
    a reply have coordinates of their own: with P from the scatter of one question in several wordings this is linear
    discriminant analysis, streamed (Hayes and Kanan 2020). The others are whitened by what is ordinarily read. The
    read is that of a modern Hopfield memory (Ramsauer et al. 2021) with a threshold. Nothing that is added,
    changed or dropped touches another slot, so there is nothing to forget and nothing to replay. Where no slot is near
    the memory is exactly the identity.

    One owner speaks at a time, and a slot that goes on is heard only behind its own: where a slot of its owner was
    heard at the token before. Who spoke last is carried in the model's cache (:mod:`everlearn.memories.carried`). So
    replies that begin with the same token ("O" of Odile and of Orcas Island) are told apart by the question for all of
    the reply, and nothing goes on with what the base says by itself.

    Slots that begin a reply answer only where the gate is open, times its value. Its own part of the gate is how much
    nearer the nearest of them is than every foil, the key of a question that is not to be answered from here:
    ``g = clamp(w . y/rms(y) + b + u . x/rms(x) + min(TRUST (near - foil), most), 0, 1)``, y what the gate reads, with
    ``most`` LITERAL_MOST where ``near`` is above LITERAL, TRUST_MOST elsewhere. Foils of the owner ``ASSISTANT``, like
    "Where do you live?", which only the gate tells from "Where do I live?", are not among them: nearer to one of those
    a question is not nearly word for word one that was dreamt.

    *Gists*: beside what is read there, a slot that begins a reply has what it tells in its words
    (:class:`~everlearn.memories.gist.Gist`), whose cosine with the words of the question, times ``ABOUT``, is part of
    their likeness, though not of how near a question is to a foil. It finds what a question only hints at.

    *Rivals* are other things that one may ask about: a slot begins a reply where its likeness is above ``asked`` and
    above ``RIVALRY rival``, ``rival`` that of the nearest of them. So a question about what was never told,
    nearest to some slot though not near, is left to the base (as speaker verification sets a score beside those of
    a cohort, Auckenthaler et al. 2000).

    All that it holds is buffers, whose number of rows grows with what is written; ``keys`` and ``values`` are float16.

    Args:
        hidden_size: size d of what is read and written.
        gate: shared by all memories of a stack.
        opens: whether this is the lowest memory, which opens the gate and keeps it in its state.

    Attributes:
        keys, values: of the slots, [m, d].
        begins: whether a slot begins a reply, [m].
        gist: reads words, once it is filled.
        about: gists of the slots that begin a reply, in their order, [b, d]; zero for one that has none.
        owners: to which observation it belongs, [m].
        spoken, asked: from which likeness on a slot that goes on, and one that begins a reply, is heard.
        foils, foil_owners: keys of foils [f, d], and to which observation they belong, [f]: ``ANYBODY``, ``ASSISTANT``.
        rivals, rivals_about: keys and gists of rivals, [r, d].
        lean: u above, [d].
        center, whitener: c [2, d] and P [2, d, d], of the slots that go on and of those that begin a reply.
        scatter, counted: summed scatter [d, d] of the questions of all nights, and how many they were.
    """

    def __init__(self, hidden_size: int, gate: Gate, *, opens: bool) -> None:
        super().__init__()
        if hidden_size < 1:
            raise InvalidArgument(f"hidden_size: got {hidden_size}, expected at least 1")
        self.keys: Tensor
        self.values: Tensor
        self.begins: Tensor
        self.owners: Tensor
        self.foils: Tensor
        self.foil_owners: Tensor
        self.rivals: Tensor
        self.about: Tensor
        self.rivals_about: Tensor
        self.lean: Tensor
        self.center: Tensor
        self.whitener: Tensor
        self.scatter: Tensor
        self.counted: Tensor
        self.register_buffer("keys", torch.zeros(0, hidden_size, dtype=torch.float16))
        self.register_buffer("values", torch.zeros(0, hidden_size, dtype=torch.float16))
        self.register_buffer("begins", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.long))
        self.register_buffer("foils", torch.zeros(0, hidden_size, dtype=torch.float16))
        self.register_buffer("foil_owners", torch.zeros(0, dtype=torch.long))
        self.register_buffer("rivals", torch.zeros(0, hidden_size, dtype=torch.float16))
        self.register_buffer("about", torch.zeros(0, hidden_size, dtype=torch.float16))
        self.register_buffer("rivals_about", torch.zeros(0, hidden_size, dtype=torch.float16))
        self.register_buffer("lean", torch.zeros(hidden_size))
        self.register_buffer("center", torch.zeros(2, hidden_size))
        self.register_buffer("whitener", torch.eye(hidden_size).repeat(2, 1, 1))
        self.register_buffer("scatter", torch.zeros(hidden_size, hidden_size))
        self.register_buffer("counted", torch.zeros(()))
        self.gist = Gist(hidden_size)
        self.opens = opens
        self.spoken, self.asked = SPOKEN, ASKED
        self._shared = (gate,)  # in a tuple, so that it is a submodule of the lowest memory alone
        if opens:
            self.gate = gate
        self._saying: Tensor | None = None
        self._ready: tuple[tuple[int, ...], list[Tensor], _Prepared] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def extra_repr(self) -> str:
        """Return the size, as ``repr`` and a memory file's layout show it."""
        return f"hidden_size={self.keys.shape[1]}"

    @staticmethod
    def completed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``state`` of a memory of any version: slots once had a ``least`` each, and no rivals or gists."""
        hidden_size, rivals = state["keys"].shape[1], len(state.get("rivals", ()))
        rows = {"rivals": 0, "about": int(state["begins"].sum()), "rivals_about": rivals}
        start = {name: torch.zeros(count, hidden_size, dtype=torch.float16) for name, count in rows.items()}
        start |= {f"gist.{name}": tensor for name, tensor in Gist(hidden_size).state_dict().items()}
        return start | {name: tensor for name, tensor in state.items() if name != "least"}

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Give the buffers that grow the size of those in ``state``, in place, for a state to be loaded."""
        slots = ("keys", "values", "begins", "owners", "about")
        for name in (*slots, "foils", "foil_owners", "rivals", "rivals_about", "gist.weights"):
            own = self.get_buffer(name)
            own.data = own.new_zeros(len(state[name]), *own.shape[1:])

    @torch.no_grad()
    def whiten(self, begins: bool, center: Tensor, whitener: Tensor) -> None:
        """Read in the coordinates ``(x - center) @ whitener``, of ``center`` [d] and ``whitener`` [d, d].

        Those of the slots that begin a reply, or of the others.
        """
        self.center[int(begins)] = center
        self.whitener[int(begins)] = whitener

    @torch.no_grad()
    def add(self, keys: Tensor, values: Tensor, begins: Tensor, owners: Tensor, about: Tensor | None = None) -> None:
        """Add slots: ``keys`` (means of x/rms(x)) and ``values`` [m, d], ``begins`` and ``owners`` [m].

        Those that begin a reply are ``about`` [b, d].
        """
        if about is None:
            about = self.about.new_zeros(int(begins.sum()), self.about.shape[1])
        rows = (self.keys, keys), (self.values, values), (self.begins, begins), (self.owners, owners)
        for own, more in (*rows, (self.about, about)):
            own.data = torch.cat([own, more.to(own.dtype)])

    @torch.no_grad()
    def add_foils(self, keys: Tensor, owners: Tensor) -> None:
        """Add foils: ``keys`` [f, d] like those of slots, ``owners`` [f]."""
        for own, more in ((self.foils, keys), (self.foil_owners, owners)):
            own.data = torch.cat([own, more.to(own.dtype)])

    @torch.no_grad()
    def set_rivals(self, keys: Tensor, about: Tensor | None = None) -> None:
        """Set the rivals: ``keys`` [r, d] like those of slots, and what they are ``about`` [r, d]."""
        self.rivals.data = keys.to(self.rivals)
        self.rivals_about.data = (torch.zeros_like(keys) if about is None else about).to(self.rivals_about)

    @torch.no_grad()
    def drop(self, owners: Collection[int]) -> None:
        """Drop the slots and the foils of some owners."""
        for by, theirs in (
            (self.owners[self.begins], (self.about,)),
            (self.owners, (self.keys, self.values, self.begins, self.owners)),
            (self.foil_owners, (self.foils, self.foil_owners)),
        ):
            kept = torch.tensor([owner not in owners for owner in by.tolist()], dtype=torch.bool)
            for own in theirs:
                own.data = own[kept]

    def coordinates(self, begins: bool, x: Tensor) -> Tensor:
        """Return the unit vectors [..., d] in which likeness is measured, of x/rms(x), [..., d]."""
        return F.normalize((x - self.center[int(begins)]) @ self.whitener[int(begins)], dim=-1)

    @contextmanager
    def saying(self, delta: Tensor) -> Iterator[None]:
        """Add ``delta`` [..., d] instead of what the slots say, to find out what has to be added."""
        self._saying = delta
        try:
            yield
        finally:
            self._saying = None

    def delta(self, x: Tensor) -> Tensor:
        """Return what the memory adds to ``x`` [..., T, d]."""
        turn = take_turn()
        if self.opens:
            self._shared[0].open(x)
        if self._saying is not None:
            return self._saying.to(x.dtype)
        if not len(self.keys):
            return torch.zeros_like(x)
        slots = self._prepared()
        read = rms_normalise(x.to(slots.values.dtype))
        on = self.coordinates(False, read) @ slots.spoken.T - self.spoken
        asked = self.coordinates(True, read)
        gate = self.opening(read, self._shared[0].opened_raw())
        about = self._about(turn, gate[..., 0] > 0)
        new = asked @ slots.begun.T + about @ slots.about.T - self._bar(asked, about)
        scores = SHARPNESS * torch.cat([on, new], -1)
        heard = self._heard(scores, torch.cat([on > 0, (new > 0) & (gate > 0)], -1), turn)
        scores = scores.masked_fill(~heard, float("-inf"))
        shares = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        weight = torch.cat([torch.ones_like(on), gate.expand_as(new)], -1)
        return ((shares * weight) @ slots.values).to(x.dtype)

    @torch.no_grad()
    def _heard(self, scores: Tensor, near: Tensor, turn: Turn) -> Tensor:
        """Return which of the slots that are ``near`` are heard, [..., T, m]; note who spoke, padding passes it on."""
        slots = self._prepared()
        begins = torch.arange(near.shape[-1], device=near.device) >= len(slots.spoken)
        rows, scores = near.reshape(-1, *near.shape[-2:]), scores.reshape(-1, *near.shape[-2:])
        time = rows.shape[1]
        real = rows.new_ones(rows.shape[:2]) if turn.real is None else turn.real[:, -time:]
        rows = rows & real[..., None]
        speakers = rows.new_full((len(rows), time + 1), NOBODY, dtype=torch.long)
        if turn.before is not None:
            speakers[:, 0] = turn.before
        heard = torch.zeros_like(rows)
        for t in (rows.any(-1) | ~real).any(0).nonzero()[:, 0].tolist():
            may = rows[:, t] & (begins | (slots.owners == speakers[:, t, None]))
            loudest = slots.owners[scores[:, t].masked_fill(~may, float("-inf")).argmax(-1)]
            speaker = torch.where(may.any(-1), loudest, NOBODY)
            heard[:, t] = may & (slots.owners == speaker[:, None])
            speakers[:, t + 1] = torch.where(real[:, t], speaker, speakers[:, t])
        turn.numbers = speakers[:, 1:]
        return heard.reshape(near.shape)

    def opening(self, read: Tensor, raw: Tensor) -> Tensor:
        """Return g [..., 1] for x/rms(x) [..., d] and what the gate below made of this pass, not clamped, [..., 1]."""
        slots = self._prepared()
        raw = raw + (read @ self.lean)[..., None]
        if len(slots.foils) and len(slots.begun):
            asked = self.coordinates(True, read)
            near, foil = (asked @ slots.begun.T).amax(-1, True), (asked @ slots.foils.T).amax(-1, True)
            literal = near > LITERAL
            if len(slots.assistant):
                literal &= near > (asked @ slots.assistant.T).amax(-1, True)
            most = torch.where(literal, LITERAL_MOST, TRUST_MOST)
            raw = raw + torch.minimum(TRUST * (near - foil), most)
        return raw.clamp(0, 1)

    @torch.no_grad()
    def _about(self, turn: Turn, where: Tensor) -> Tensor:
        """Return the gists [..., T, d] of what was asked, at the tokens ``where`` [..., T]; zero elsewhere."""
        gists = torch.zeros(*where.shape, self.about.shape[1], device=where.device)
        rows, words = where.reshape(-1, where.shape[-1]), turn.words
        if not len(self.gist.weights) or words is None or turn.embed is None or len(words) != len(rows):
            return gists
        before, places = words.shape[1] - rows.shape[1], rows.nonzero()
        texts = [self.gist.asked(words[row, : before + time + 1]) for row, time in places.tolist()]
        gists.view(*rows.shape, -1)[tuple(places.T)] = self.gist(texts, turn.embed)
        return gists

    def _bar(self, asked: Tensor, about: Tensor) -> Tensor:
        """Return the likeness [..., 1] above which slots begin a reply, of coordinates and gists [..., d]."""
        slots, least = self._prepared(), torch.full_like(asked[..., :1], self.asked)
        if not len(slots.rivals):
            return least
        rival = asked @ slots.rivals.T + about @ slots.rivals_about.T
        return torch.maximum(least, RIVALRY * rival.amax(-1, True))

    @torch.no_grad()
    def bar(self, read: Tensor, about: Tensor) -> float:
        """Return the likeness above which a slot begins a reply, where x/rms(x) [d] is read of words ``about`` [d]."""
        return float(self._bar(self.coordinates(True, read), about))

    @torch.no_grad()
    def likeness(self, read: Tensor, about: Tensor) -> dict[int, float]:
        """Return for each owner how like the likest of its slots that begin a reply is.

        Args:
            read: x/rms(x) [d] where a question ends.
            about: gist of its words [d].
        """
        slots, owners = self._prepared(), self.owners[self.begins]
        near = slots.begun @ self.coordinates(True, read) + slots.about @ about
        return {owner: float(near[owners == owner].max()) for owner in owners.unique().tolist()}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + delta(x)``."""
        return x + self.delta(x)

    def _prepared(self) -> _Prepared:
        """Return the slots as they are read, computed once a state."""
        held = (self.keys, self.begins, self.foils, self.rivals, self.whitener, self.owners, self.about)
        own = [tensor.detach() for tensor in (*held, self.rivals_about)]
        mark = tuple(number for tensor in own for number in (tensor.data_ptr(), tensor._version, len(tensor)))
        if self._ready is None or self._ready[0] != mark:
            keys, values, begins = self.keys.float(), self.values.float(), self.begins
            spoken, begun = self.coordinates(False, keys[~begins]), self.coordinates(True, keys[begins])
            foils, rivals = (self.coordinates(True, rows.float()) for rows in (self.foils, self.rivals))
            assistant = foils[self.foil_owners == ASSISTANT]
            foils = foils[self.foil_owners != ASSISTANT]
            ordered = torch.cat([values[~begins], values[begins]])
            owners = torch.cat([self.owners[~begins], self.owners[begins]])
            about, rivals_about = ABOUT * self.about.float(), ABOUT * self.rivals_about.float()
            made = _Prepared(spoken, begun, about, foils, assistant, rivals, rivals_about, ordered, owners)
            self._ready = mark, own, made  # ``own`` is held so that no other state can come to lie in its place
        return self._ready[2]


def slot_memories(*, below: bool = False) -> Callable[[int], GatedMemory | SlotMemory]:
    """Return a factory for ``stack_levels(memory=...)``: slots under one gate, lowest layer first.

    With ``below`` the lowest layer only opens the gate for those above.
    """
    gates: list[Gate] = []

    def make(hidden_size: int) -> GatedMemory | SlotMemory:
        opens = not gates
        if opens:
            gates.append(Gate(hidden_size))
        if opens and below:
            return GatedMemory(hidden_size, 0, gates[0], opens=True)
        return SlotMemory(hidden_size, gates[0], opens=opens)

    return make
