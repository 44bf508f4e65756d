"""Slots: what is near is said, what is not is left alone, and no slot touches another."""

from __future__ import annotations

import copy
import gc
import io
import math
import threading
import weakref

import pytest
import torch
from tiny_families import HIDDEN, VOCAB, tiny
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from everlearn import HopeConfig, HopeForCausalLM, Level, stack_levels
from everlearn.errors import InvalidArgument
from everlearn.memories.gated import Gate, GatedMemory, rms_normalise
from everlearn.memories.residual import ResidualMemory
from everlearn.memories.slots import ASKED, SHARPNESS, SPOKEN, TRUST, TRUST_MOST, SlotMemory, slot_memories
from everlearn.models.memory_file import load_memory, memory_bytes
from everlearn.models.stacking import (
    continua,
    load_memory_state,
    memory_state,
    reset_level,
    restore,
    snapshot,
    stack_of,
)
from everlearn.models.streaming import Stream
from everlearn.models.trunk import SplitModel

D = 16


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


@pytest.mark.parametrize("foils", [False, True])
def test_a_read_is_the_softmax_of_the_definition(memory, foils):
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
    memory.owners.copy_(torch.tensor([1, 1, 2, 2, 3, 1, 1, 2, 3]))
    memory.asked, memory.spoken = 0.6, 0.5  # in few dimensions much is alike
    order = [0, 5, 6, 7, 2, 7, 5, 4, 8, 8, 9, 1, 9, 6]  # some go on behind their own, some behind another's, some alone
    places = torch.cat([memory.keys.float(), torch.zeros(1, D)])[order]
    places = (
        places + 0.05 * torch.randn(len(order), D) + torch.randn(len(order), D) * (torch.tensor(order) == 9)[:, None]
    )
    speaker, spoke = None, 0
    for at, x in enumerate(places):
        unit = x.double() / x.double().pow(2).mean().add(1e-5).sqrt()
        gate = float(bias + memory.lean.double() @ unit)
        if foils:
            P, c = memory.whitener[1].double(), memory.center[1].double()
            here = F.normalize((unit - c) @ P, dim=0)
            begins, others = (
                max(float(here @ F.normalize((key.double() - c) @ P, dim=0)) for key in keys)
                for keys in (memory.keys[memory.begins], memory.foils)
            )
            gate += min(TRUST * (begins - others), TRUST_MOST)
        gate = min(max(gate, 0.0), 1.0)
        near = []
        for index, (key, begins) in enumerate(zip(memory.keys.double(), memory.begins.tolist())):
            P, c = memory.whitener[int(begins)].double(), memory.center[int(begins)].double()
            likeness = F.normalize((unit - c) @ P, dim=0) @ F.normalize((key - c) @ P, dim=0)
            over, owner = float(likeness) - (0.6 if begins else 0.5), int(memory.owners[index])
            if over > 0 and (gate > 0 if begins else owner == speaker):
                near.append((over, owner, (gate if begins else 1.0) * memory.values[index].double()))
        speaker = max(near, key=lambda found: found[0])[1] if near else None
        shares = [(math.exp(SHARPNESS * over), value) for over, owner, value in near if owner == speaker]
        total = 1 + sum(share for share, _ in shares)
        expected = sum((share * value for share, value in shares), torch.zeros(D, dtype=torch.float64)) / total
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
    """Which had a least likeness for each slot."""
    model, other = stacked(), stacked()
    fill(slots(model), 1)
    state = {**memory_state(model, "slow"), "3.slow.least": torch.full((21,), 0.7)}
    load_memory(other, memory_bytes(model, level="slow", state=state))
    assert memory_state(other).keys() == memory_state(model).keys()
    assert torch.equal(slots(other).keys, slots(model).keys)


def talkative(base: PreTrainedModel | None = None, layers: tuple[int, ...] = (1, 3)) -> PreTrainedModel:
    """Return a model with slots near to whatever is read, of a few owners, so that who speaks depends on who spoke."""
    memory = slot_memories(below=True)
    model = stack_levels(
        base or tiny("llama"), [Level("slow")], wiring="independent", layers=layers, memory=memory
    ).eval()
    lowest, *others = continua(model).values()
    lowest.memories[0].gate.set_(torch.zeros(HIDDEN), torch.tensor(1.0))
    ids = torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    for continuum in others:
        seen = []
        hook = continuum.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        with torch.no_grad():
            model(input_ids=ids)
        hook.remove()
        keys, own = rms_normalise(seen[0].flatten(0, 1)), continuum.memories[0]
        own.add(keys, 5 * torch.randn_like(keys), torch.arange(len(keys)) % 4 == 0, torch.arange(len(keys)) % 3)
        own.asked = 0.6
    return model


def whole(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def by_token(model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
    got = []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            got.append(out.logits)
            cache = out.past_key_values
    return torch.cat(got, 1), cache


IDS = torch.randint(0, VOCAB, (16, 12), generator=torch.Generator().manual_seed(2))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def small_hope() -> PreTrainedModel:
    torch.manual_seed(0)
    return HopeForCausalLM(
        HopeConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=2)
    ).eval()


@pytest.mark.parametrize("layers", [(1, 3), (0, 1, 3)])
@pytest.mark.parametrize("base", ["lazy", "tiny", "hope"])
def test_who_spoke_is_carried_in_the_cache(base, layers):
    """Token by token, of one or two memories and whoever makes the cache, the logits are those of one pass."""
    model = talkative(small_hope() if base == "hope" else None, layers)
    expected = whole(model, IDS)
    got, cache = by_token(model, IDS, DynamicCache() if base == "lazy" else None)
    close(got, expected)
    assert cache.get_seq_length() == 12
    for continuum in list(continua(model).values())[1:]:
        continuum.memories[0].spoken = 2.0  # nothing goes on
    assert not torch.allclose(whole(model, IDS), expected, atol=1e-3), "or the test says nothing"


def test_it_is_cut_chosen_repeated_and_copied_with_the_cache():
    model = talkative()
    expected = whole(model, IDS)
    _, cache = by_token(model, IDS, None)
    cache.crop(-5)
    rows = torch.arange(15, -1, -1)
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    beams = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    cache.reorder_cache(beams)
    order = rows.repeat_interleave(2)[beams]
    other, copied = copy.deepcopy((model, cache))
    for one, its in ((model, cache), (other, copied)):
        with torch.no_grad():
            close(one(input_ids=IDS[order, 7:], past_key_values=its).logits, expected[order, 7:])
    cache.reset()
    close(by_token(model, IDS, cache)[0], expected)


def test_padding_says_nothing_and_nothing_goes_on_behind_it():
    model = talkative()
    ids, pads = IDS[:, :6], 3
    padded = torch.cat([IDS[:, 6 : 6 + pads], ids], 1)  # pads that would speak
    mask = torch.cat([torch.zeros(16, pads), torch.ones(16, 6)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for time in (9, 5):
            first = model(input_ids=padded[:, :time], attention_mask=mask[:, :time], position_ids=positions[:, :time])
            rest = model(
                input_ids=padded[:, time:], attention_mask=mask, position_ids=positions[:, time:],
                past_key_values=first.past_key_values,
            ) if time < 9 else None  # fmt: skip
            got = first.logits if rest is None else torch.cat([first.logits, rest.logits], 1)
            close(got[:, pads:], whole(model, ids))


def test_a_reply_goes_on_across_padding():
    """As between a beginning that prompts share and their ends, which are padded on the left."""
    model = talkative()
    mask = torch.cat([torch.ones(16, 6), torch.zeros(16, 2), torch.ones(16, 6)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    _, cache = by_token(model, IDS[:, :6], None)
    with torch.no_grad():
        ids = torch.cat([IDS[:, :2], IDS[:, 6:]], 1)
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions[:, 6:], past_key_values=cache).logits
    close(got[:, 2:], whole(model, IDS)[:, 6:])


def test_tokens_that_the_memory_missed_are_nobodys():
    """It was empty, or the base read them: what comes then goes on with nothing."""
    model = talkative()
    own, full = slots(model), snapshot(model, "slow")
    for missed in (model, stack_of(model).base):
        _, cache = by_token(model, IDS[:, :4], None)
        if missed is model:
            reset_level(model, "slow")
        with torch.no_grad():
            missed(input_ids=IDS[:, 4:8], past_key_values=cache)
        load_memory_state(model, full, "slow")
        _, fresh = by_token(stack_of(model).base, IDS[:, :8], None)
        close(by_token(model, IDS[:, 8:], cache)[0], by_token(model, IDS[:, 8:], fresh)[0])
    assert len(own)


def test_outside_of_a_model_nothing_is_carried():
    """Nor left behind by a pass, whether it ended or failed, nor seen by another thread."""
    model = talkative()
    _, cache = by_token(model, IDS[:, :6], None)
    slots(model).delta(torch.randn(16, 2, HIDDEN))
    gone = [by_token(model, IDS[:, :2], DynamicCache())[1], DynamicCache()]
    with pytest.raises(IndexError):
        model(input_ids=torch.full((16, 1), VOCAB), past_key_values=gone[1])
    seen = [weakref.ref(one) for one in gone]
    gone.clear()
    gc.collect()
    assert [one() for one in seen] == [None, None]

    def elsewhere() -> None:
        by_token(model, IDS.flip(0), None)

    hook = continua(model)[3].register_forward_pre_hook(lambda module, args: run(elsewhere))
    threads = []

    def run(work) -> None:
        if threading.current_thread() is threading.main_thread():
            threads.append(threading.Thread(target=work))
            threads[-1].start()
            threads[-1].join()

    got, _ = by_token(model, IDS[:, 6:], cache)
    hook.remove()
    assert len(threads) == 6
    close(got, whole(model, IDS)[:, 6:])


def test_what_was_broken_off_is_no_part_of_what_runs_outside(monkeypatch):
    """Hooks do not see a keyboard interrupt."""
    model = talkative()
    split = SplitModel(model)
    acts = split.trunk(IDS[:, :6])
    expected = split.upper(acts)

    def stop(module, args):
        raise KeyboardInterrupt

    hook = continua(model)[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS[:3, :4], attention_mask=torch.zeros(3, 4))
    hook.remove()
    close(split.upper(acts), expected)


def test_a_stream_goes_on_where_it_was_saved():
    level = Level("fast", 4)
    make = {"fast": lambda size: ResidualMemory(size, 4), "slow": slot_memories(below=True)}

    def stack() -> PreTrainedModel:
        return stack_levels(tiny("llama"), [level, Level("slow")], wiring="independent", layers=[1, 3], memory=make)

    model, filled = stack(), memory_state(talkative(), "slow")
    load_memory_state(model, filled, "slow")
    stream = Stream(model)
    stream.feed(IDS[:1, :7])
    kept, memory = io.BytesIO(), snapshot(model)
    torch.save(stream.state_dict(), kept)
    kept.seek(0)
    make["slow"] = slot_memories(below=True)
    again = stack()
    load_memory_state(again, memory)
    resumed = Stream(again)
    resumed.load_state_dict(torch.load(kept, weights_only=True))
    assert resumed.feed(IDS[:1, 7:]) == stream.feed(IDS[:1, 7:])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation_is_that_of_whole_passes(how):
    model = talkative()
    ids = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(4))
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **how}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for pads in (IDS[:2, :3], IDS[4:6, 3:6]):  # that would speak
        mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], 1)
        assert torch.equal(model.generate(torch.cat([pads, ids], 1), attention_mask=mask, **options)[:, 3:], made)
    if how.get("num_beams"):
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **{**options, "use_cache": False})
        assert torch.equal(made, plain)
        return
    with torch.no_grad():
        best = model(input_ids=made, use_cache=False).logits.argmax(-1)
    assert torch.equal(made[:, 5:], best[:, 4:-1])


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
