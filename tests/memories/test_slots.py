"""Slots: what is near is said, what is not is left alone, and no slot touches another."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_families import HIDDEN, VOCAB, tiny
from torch.nn import functional as F

from everlearn import Level, stack_levels
from everlearn.errors import InvalidArgument
from everlearn.memories.carried import outside
from everlearn.memories.gated import Gate, GatedMemory, rms_normalise
from everlearn.memories.slots import (
    ABOUT,
    ANYBODY,
    ASKED,
    ASSISTANT,
    LITERAL,
    LITERAL_MOST,
    RIVALRY,
    SHARPNESS,
    SPOKEN,
    TRUST,
    TRUST_MOST,
    SlotMemory,
    slot_memories,
)
from everlearn.models.memory_file import load_memory, memory_bytes
from everlearn.models.stacking import (
    continua,
    load_memory_state,
    memory_state,
    reset_level,
    restore,
    snapshot,
)
from everlearn.models.trunk import SplitModel

D, V = 16, 20
TABLE = torch.randn(V, D, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def memory() -> SlotMemory:
    torch.manual_seed(0)
    made = SlotMemory(D, Gate(D), opens=True)
    made.gate.set_(torch.zeros(D), torch.tensor(1.0))
    return made


def add(memory: SlotMemory, count: int, begins: bool, owner: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(count, D), torch.randn(count, D)
    memory.add(rms_normalise(keys), values, torch.full((count,), begins), torch.full((count,), owner))
    return keys, values


def test_without_slots_it_is_the_identity(memory):
    x = torch.randn(3, D)
    assert torch.equal(memory(x), x)


@pytest.mark.parametrize("gists", [False, True])
@pytest.mark.parametrize("foils", [False, True])
def test_a_read_is_the_softmax_of_the_definition(memory, foils, gists):
    """Against the definition, term by term, in float64."""
    add(memory, 5, True)
    add(memory, 4, False)
    spread = torch.randn(D, D)
    memory.whiten(True, torch.randn(D) * 0.1, torch.eye(D) + 0.3 * spread)
    memory.whiten(False, torch.randn(D) * 0.1, torch.eye(D) - 0.2 * spread)
    bias = -1.4 if foils else 0.3
    memory.gate.set_(torch.zeros(D), torch.tensor(bias))
    memory.lean.copy_(0.05 * torch.randn(D))
    if foils:
        memory.add_foils(torch.randn(3, D), torch.zeros(3))
        memory.set_rivals(torch.cat([memory.keys[1:3].float(), torch.randn(2, D)]))
    memory.owners.copy_(torch.tensor([1, 1, 2, 2, 3, 1, 1, 2, 3]))
    if gists:
        words = {
            "weights": torch.ones(V),
            "center": torch.zeros(D),
            "whitener": torch.eye(D),
            "behind": torch.tensor(0),
        }
        memory.gist.fill(words)
        memory.about.copy_(F.normalize(torch.randn(5, D), dim=-1))
        memory.rivals_about.copy_(F.normalize(torch.randn(len(memory.rivals), D), dim=-1))
    least = 0.45 if foils else 0.6  # in few dimensions much is alike
    memory.asked, memory.spoken = least, 0.5
    order = [0, 5, 6, 7, 2, 7, 5, 4, 8, 8, 9, 1, 9, 6]  # some go on behind their own, some behind another's, some alone
    places = torch.cat([memory.keys.float(), torch.zeros(1, D)])[order]
    places = (
        places + 0.05 * torch.randn(len(order), D) + torch.randn(len(order), D) * (torch.tensor(order) == 9)[:, None]
    )
    ids = torch.randint(0, V, (1, len(order)))
    speaker, spoke = None, 0
    for at, x in enumerate(places):
        about = F.normalize(TABLE[ids[0, : at + 1]].sum(0), dim=0).double() * ABOUT * gists
        unit = x.double() / x.double().pow(2).mean().add(1e-5).sqrt()
        gate, bar = float(bias + memory.lean.double() @ unit), least
        if foils:
            P, c = memory.whitener[1].double(), memory.center[1].double()
            here = F.normalize((unit - c) @ P, dim=0)
            alike = lambda keys: [float(here @ F.normalize((key.double() - c) @ P, dim=0)) for key in keys]  # noqa: E731, B023
            begins, others = max(alike(memory.keys[memory.begins])), max(alike(memory.foils))
            rivals = zip(alike(memory.rivals), memory.rivals_about.double())
            bar = max(bar, RIVALRY * max(near + float(own @ about) for near, own in rivals))
            gate += min(TRUST * (begins - others), LITERAL_MOST if begins > LITERAL else TRUST_MOST)
        gate = min(max(gate, 0.0), 1.0)
        near = []
        for index, (key, begins) in enumerate(zip(memory.keys.double(), memory.begins.tolist())):
            P, c = memory.whitener[int(begins)].double(), memory.center[int(begins)].double()
            likeness = F.normalize((unit - c) @ P, dim=0) @ F.normalize((key - c) @ P, dim=0)
            if begins:
                likeness = likeness + memory.about[int(memory.begins[:index].sum())].double() @ about
            over, owner = float(likeness) - (bar if begins else 0.5), int(memory.owners[index])
            if over > 0 and (gate > 0 if begins else owner == speaker):
                near.append((over, owner, (gate if begins else 1.0) * memory.values[index].double()))
        speaker = max(near, key=lambda found: found[0])[1] if near else None
        shares = [(math.exp(SHARPNESS * over), value) for over, owner, value in near if owner == speaker]
        total = 1 + sum(share for share, _ in shares)
        expected = sum((share * value for share, value in shares), torch.zeros(D, dtype=torch.float64)) / total
        with outside(ids[:, : at + 1], lambda tokens: TABLE[tokens]):
            got = memory.delta(places[: at + 1][None])[0, -1]
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
        spoke += speaker is not None
    assert 3 < spoke < len(order), "or the test says nothing"


def test_far_from_every_slot_and_behind_a_shut_gate_nothing_is_added(memory):
    begin, _ = add(memory, 1, True)
    keys, _ = add(memory, 3, False)
    far = torch.randn(200, D)
    near = F.normalize(far, dim=-1) @ F.normalize(torch.cat([begin, keys]), dim=-1).T
    far = far[(near < torch.tensor([ASKED] + [SPOKEN] * 3) - 0.02).all(1)]
    assert len(far) > 50
    assert torch.equal(memory(far), far)
    reply = torch.cat([begin, keys])
    assert (memory(reply) != reply).any(-1).all()
    memory.gate.set_(torch.zeros(D), torch.tensor(-1.0))
    assert torch.equal(memory(reply), reply)


def test_a_slot_goes_on_only_behind_its_own(memory):
    """Not by itself, not behind another's, not after a word of somebody else's; one owner speaks at a time."""
    (mine,), _ = add(memory, 1, True, owner=1)
    (theirs,), _ = add(memory, 1, True, owner=2)
    (on,), _ = add(memory, 1, False, owner=1)
    silent = -(mine + theirs + on)

    def heard(*reads: torch.Tensor) -> list[bool]:
        x = torch.stack(reads)
        return (memory(x) != x).any(-1).tolist()

    assert heard(silent, on) == [False, False]
    assert heard(mine, on, on) == [True, True, True]
    assert heard(theirs, on) == [True, False]
    assert heard(mine, silent, on) == [True, False, False]
    assert heard(mine, theirs, on) == [True, True, False]
    both = rms_normalise(1.01 * mine / mine.norm() + theirs / theirs.norm())[None]
    alone = memory.delta(both)
    memory.drop([2])
    torch.testing.assert_close(memory.delta(both), alone)


def test_adding_and_dropping_touches_no_other_slot(memory):
    keys, _ = add(memory, 4, True, owner=1)
    before = memory.delta(keys)
    add(memory, 6, True, owner=2)
    torch.testing.assert_close(memory.delta(keys), before, rtol=1e-3, atol=1e-4)
    memory.drop([2])
    assert torch.equal(memory.delta(keys), before)
    assert memory.owners.tolist() == [1] * 4


def test_saying_adds_what_it_is_told_with_its_gradient(memory):
    x, delta = torch.randn(2, D), torch.randn(2, D, requires_grad=True)
    with memory.saying(delta):
        memory.delta(x).sum().backward()
        assert torch.equal(memory.delta(x), delta)
    assert torch.equal(delta.grad, torch.ones(2, D))
    assert torch.equal(memory.delta(x), torch.zeros(2, D))


def stacked():
    return stack_levels(
        tiny("llama"), [Level("slow")], wiring="independent", layers=[1, 3], memory=slot_memories(below=True)
    )


def slots(model) -> SlotMemory:
    return next(m for m in continua(model)[3].memories if isinstance(m, SlotMemory))


def open_gate(model) -> None:
    continua(model)[1].memories[0].gate.set_(torch.zeros(HIDDEN), torch.tensor(1.0))


def fill(memory: SlotMemory, seed: int) -> None:
    torch.manual_seed(seed)
    count = 20 + seed
    keys = torch.randn(count, HIDDEN)
    memory.add(keys, torch.randn(count, HIDDEN), torch.ones(count, dtype=torch.bool), torch.ones(count))


def test_a_memory_of_an_earlier_version_is_loaded():
    """Which had a least likeness for each slot, and knew nothing of rivals and words."""
    model, other = stacked(), stacked()
    fill(slots(model), 1)
    slots(model).set_rivals(torch.randn(2, HIDDEN))
    state = {**memory_state(model, "slow"), "3.slow.least": torch.full((21,), 0.7)}
    state = {name: tensor for name, tensor in state.items() if "about" not in name and ".gist." not in name}
    load_memory(other, memory_bytes(model, level="slow", state=state))
    assert memory_state(other).keys() == memory_state(model).keys()
    assert torch.equal(slots(other).keys, slots(model).keys)
    assert torch.equal(slots(other).about, torch.zeros(21, HIDDEN).half())
    assert torch.equal(slots(other).rivals_about, torch.zeros(2, HIDDEN).half())
    fill(slots(other), 2)
    assert len(slots(other).about) == len(slots(other)) == 43, "and goes on"


def test_a_stack_grows_is_saved_loaded_and_reset():
    model, other = stacked(), stacked()
    ids = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = tiny("llama")(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, base)
        open_gate(model)
        fill(slots(model), 1)
        first, kept = model(input_ids=ids).logits, snapshot(model, "slow")
        assert not torch.equal(first, base)
        fill(slots(model), 2)
        assert not torch.equal(model(input_ids=ids).logits, first)
        load_memory(other, memory_bytes(model, level="slow"))
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
        restore(model, kept, "slow")
        assert torch.equal(model(input_ids=ids).logits, first)
        reset_level(model, "slow")
        assert torch.equal(model(input_ids=ids).logits, base)
        assert len(slots(model)) == 0
        assert len(slots(other)) == 43, "another user's memory is not touched"


def test_a_state_of_another_width_is_refused_and_changes_nothing():
    model = stacked()
    fill(slots(model), 1)
    state = {key: tensor.clone() for key, tensor in memory_state(model).items()}
    state["3.slow.keys"] = state["3.slow.keys"][:, :-1]
    with pytest.raises(InvalidArgument, match=r"3\.slow\.keys has shape"):
        load_memory_state(model, state)
    assert len(slots(model)) == 21


def test_the_cut_model_sees_what_is_written_later():
    model = stacked()
    split = SplitModel(model)
    assert split.layer == 3
    open_gate(model)
    fill(slots(model), 1)
    ids = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        got = split.logits(split.upper(split.trunk(ids)).flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_has_slots_of_its_own(memory):
    keys, _ = add(memory, 2, True)
    other = copy.deepcopy(memory)
    memory.drop([1])
    assert not torch.equal(other(keys), keys)


def test_the_lowest_layer_opens_the_gate():
    make = slot_memories(below=True)
    lowest, above = make(D), make(D)
    assert isinstance(lowest, GatedMemory)
    assert isinstance(above, SlotMemory)
    assert not above.opens
    alone = slot_memories()(D)
    assert isinstance(alone, SlotMemory)
    assert alone.opens


def test_bad_size():
    with pytest.raises(InvalidArgument, match="hidden_size"):
        SlotMemory(0, Gate(4), opens=True)


def test_nearness_opens_a_shut_gate_only_to_what_was_dreamt_nearly_word_for_word(memory):
    begin, _ = add(memory, 1, True)
    away = torch.randn(1, D)
    away = rms_normalise(away - (away @ begin.T) / (begin @ begin.T) * begin)
    memory.add_foils(rms_normalise(-begin), torch.tensor([7]))  # far from both
    unit = F.normalize(begin, dim=-1)
    told, alike = (
        begin,
        D**0.5 * ((LITERAL - 0.05) * unit + (1 - (LITERAL - 0.05) ** 2) ** 0.5 * F.normalize(away, dim=-1)),
    )
    for bias, opens in (
        (0.5 - TRUST_MOST, (True, True)),
        (-1 - TRUST_MOST, (True, False)),
        (-LITERAL_MOST, (False, False)),
    ):
        memory.gate.set_(torch.zeros(D), torch.tensor(bias))
        assert tuple(not torch.equal(memory(x), x) for x in (told, alike)) == opens


def test_what_the_assistant_is_asked_about_itself_is_not_taken_word_for_word(memory):
    begin, _ = add(memory, 1, True)
    near = begin + 0.1 * torch.randn(1, D)
    memory.add_foils(rms_normalise(-begin), torch.tensor([ANYBODY]))
    memory.gate.set_(torch.zeros(D), torch.tensor(-1 - TRUST_MOST))
    assert not torch.equal(memory(near), near), "word for word"
    memory.add_foils(rms_normalise(near), torch.tensor([ASSISTANT]))
    assert torch.equal(memory(near), near)
    assert not torch.equal(memory(begin), begin), "nearer to what was told"
    memory.gate.set_(torch.zeros(D), torch.tensor(0.5 - TRUST_MOST))
    assert not torch.equal(memory(near), near), "it is no foil otherwise"


def test_a_foil_shuts_the_gate_of_what_it_is_nearer_to(memory):
    memory.gate.set_(torch.zeros(D), torch.tensor(0.0))  # of itself neither open nor shut
    begin, _ = add(memory, 1, True)
    assert torch.equal(memory(begin), begin), "with nothing to compare it with the gate stays as it is"
    near = begin + 0.1 * torch.randn(1, D)
    memory.add_foils(rms_normalise(-begin), torch.tensor([7]))
    assert not torch.equal(memory(near), near), "a foil far away speaks for the slot"
    memory.add_foils(rms_normalise(near), torch.tensor([8]))
    assert torch.equal(memory(near), near)
    memory.drop([8])
    assert not torch.equal(memory(near), near)


def test_a_rival_keeps_what_is_not_near_from_beginning_and_a_memory_without_rivals_reads_as_before(memory):
    begin, _ = add(memory, 1, True)
    far = rms_normalise(torch.randn(1, D))
    unit = F.normalize(begin, dim=-1)
    away = F.normalize(far - (far @ unit.T) * unit, dim=-1)
    asked = D**0.5 * (0.3 * unit + (1 - 0.3**2) ** 0.5 * away)  # likeness 0.3
    before = memory(asked)
    assert not torch.equal(before, asked)
    assert memory.bar(asked[0], torch.zeros(D)) == pytest.approx(ASKED)
    memory.set_rivals(away)
    assert memory.bar(asked[0], torch.zeros(D)) == pytest.approx(RIVALRY * (1 - 0.3**2) ** 0.5, abs=1e-3)
    assert torch.equal(memory(asked), asked), "it may ask for that"
    assert not torch.equal(memory(begin), begin), "what was told is still known"
    memory.asked = 0.99
    assert memory.bar(begin[0], torch.zeros(D)) == pytest.approx(0.99), "caution holds beside it"
    old = {name: tensor for name, tensor in memory.state_dict().items() if name != "rivals"}
    restored = SlotMemory.completed({**old, "least": torch.zeros(1)})
    assert restored["rivals"].shape == (0, D)
    assert "least" not in restored


def test_a_question_is_also_like_what_shares_its_words(memory):
    add(memory, 2, True)
    memory.owners.copy_(torch.tensor([1, 2]))
    memory.gist.fill(
        {"weights": torch.ones(V), "center": torch.zeros(D), "whitener": torch.eye(D), "behind": torch.tensor(0)}
    )
    question = torch.tensor([[3, 4]])
    about = memory.gist([question[0]], lambda tokens: TABLE[tokens])[0]
    memory.about[1] = about
    read = rms_normalise(torch.randn(D))
    plain, beside = memory.likeness(read, torch.zeros(D)), memory.likeness(read, about)
    assert beside[1] == pytest.approx(plain[1])
    assert beside[2] == pytest.approx(plain[2] + ABOUT, abs=1e-3)
    memory.asked = (max(plain.values()) + beside[2]) / 2
    assert plain[1] < memory.asked, "or the test says nothing"
    x = read[None, None].expand(1, 2, D)

    def added(ids: torch.Tensor) -> bool:
        with outside(ids, lambda tokens: TABLE[tokens]):
            return bool(memory.delta(x)[0, -1].any())

    assert added(question)
    assert not added(torch.tensor([[8, 9]]))
    assert not memory.delta(x).any(), "outside of a model no words are known"
    memory.drop([1])
    assert added(question), "a gist stays with its slot"
    memory.drop([2])
    assert memory.about.shape == (0, D)
