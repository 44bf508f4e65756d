"""Who speaks is carried from token to token, by whatever cache a model is run with."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from tiny_families import HIDDEN, VOCAB, tiny
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from everlearn import HopeConfig, HopeForCausalLM, Level, stack_levels
from everlearn.memories import carried
from everlearn.memories.gated import rms_normalise
from everlearn.memories.gist import MARK
from everlearn.memories.residual import ResidualMemory
from everlearn.memories.slots import slot_memories
from everlearn.models.stacking import continua, load_memory_state, memory_state, reset_level, snapshot, stack_of
from everlearn.models.streaming import Stream
from everlearn.models.trunk import SplitModel


def talkative(base: PreTrainedModel | None = None, layers: tuple[int, ...] = (1, 3)) -> PreTrainedModel:
    """Return a model with slots near to whatever is read, of a few owners, so that who speaks depends on who spoke.

    Which one begins depends on the words before it too, among them some that end a part of a conversation.

    Its base is in float64: which of many near slots is the nearest must not hang on the order of sums in float32.
    """
    memory = slot_memories(below=True)
    model = stack_levels(
        (base or tiny("llama")).double(), [Level("slow")], wiring="independent", layers=layers, memory=memory
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
        weights = torch.rand(VOCAB).where(torch.arange(VOCAB) % 7 > 0, MARK)
        spread = {"center": torch.randn(HIDDEN), "whitener": torch.randn(HIDDEN, HIDDEN)}
        own.gist.fill({"weights": weights, **spread, "behind": torch.tensor(1)})
        begins = torch.arange(len(keys)) % 4 == 0
        about = F.normalize(torch.randn(int(begins.sum()), HIDDEN), dim=-1)
        own.add(keys, 5 * torch.randn_like(keys), begins, torch.arange(len(keys)) % 3, about)
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
    memories = [continuum.memories[0] for continuum in list(continua(model).values())[1:]]
    for change in ("spoken", "about"):
        for memory in memories:
            if change == "spoken":
                memory.spoken = 2.0  # nothing goes on
            else:
                memory.about.zero_()
        changed = whole(model, IDS)
        assert not torch.allclose(changed, expected, atol=1e-3), f"or the test says nothing of {change}"
        expected = changed


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
    own = continua(model)[3].memories[0]
    own.about.zero_()  # who speaks, not which words are known
    full = snapshot(model, "slow")
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
    continua(model)[3].memories[0].delta(torch.randn(16, 2, HIDDEN))
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


def test_the_upper_half_reads_the_same_words():
    model = talkative()
    split = SplitModel(model)
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        close(split.upper(split.trunk(IDS)), expected)


def test_embeddings_in_place_of_tokens_have_no_words():
    model = talkative()
    with torch.no_grad():
        got = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
        for continuum in list(continua(model).values())[1:]:
            continuum.memories[0].about.zero_()
        close(got, whole(model, IDS))


def test_a_window_that_moves_hides_no_words():
    """A mask of fewer keys than there were tokens, of a static cache with a sliding window, tells no padding."""
    mask, cache = torch.ones(2, 1, 1, 8, dtype=torch.bool), DynamicCache()
    cache.update(torch.zeros(2, 1, 9, 4), torch.zeros(2, 1, 9, 4), 0)
    assert carried._real(mask, cache) is None
    assert carried._real(torch.ones(2, 1, 1, 10, dtype=torch.bool), cache).tolist() == [[True], [True]]
