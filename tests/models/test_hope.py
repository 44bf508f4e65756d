"""HOPE, HOPE-Attention and Transformer++ as transformers models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import everlearn
from everlearn.errors import InvalidArgument
from everlearn.models.backbone_cache import StateCache
from everlearn.models.hope import HopeConfig, HopeForCausalLM, HopeModel
from everlearn.models.transformer import TransformerConfig, TransformerForCausalLM

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4}
FAMILIES = {
    "hope": lambda: HopeConfig(**SIZES),
    "hope_options": lambda: HopeConfig(
        **{**SIZES, "chunk_size": 2}, projection_chunk_size=4, memory={"momentum": 0.5}, cms_periods=[1, 64]
    ),
    "hope_attention": lambda: HopeConfig(**SIZES, mixer="attention", cms_periods=[1, 64]),
    "hybrid": lambda: HopeConfig(**SIZES, mixer=["hope", "attention"]),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    """A float64 model of each family whose memories matter."""
    config = FAMILIES[request.param]()
    made = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(batch=2, length=13):
    return torch.randint(0, 31, (batch, length))


def test_four_sizes_are_enough():
    config = everlearn.HopeConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    out = everlearn.HopeForCausalLM(config)(input_ids=tokens(), labels=tokens())
    assert out.logits.shape == (2, 13, 50)
    assert out.loss.item() == pytest.approx(torch.tensor(50.0).log().item(), rel=0.1)


def test_auto_classes_and_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {"dtype": None}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is type(model)
    ids = tokens()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    headless = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_labels_give_the_shifted_loss(model):
    ids = tokens()
    labels = ids.clone()
    labels[:, :5] = -100
    out = model(input_ids=ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_is_causal(model):
    ids = tokens()
    before = model(ids).logits
    for t in (2, 3, 4, 9):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("cuts", [[1] * 13, [5, 6, 2]])
def test_a_cache_continues_the_sequence(model, cuts):
    ids = tokens()
    whole = model(ids).logits
    cache, parts = None, []
    for part in ids.split(cuts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.get_seq_length() == 13


def test_left_padding_changes_nothing(model):
    ids = tokens(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    padded = model(ids, attention_mask=mask, use_cache=True)
    more = torch.randint(0, 31, (3, 3))
    longer = torch.cat((mask, torch.ones_like(more)), dim=1)
    next_logits = model(more, attention_mask=longer, past_key_values=padded.past_key_values).logits
    for row, start in enumerate((0, 4, 9)):
        alone = model(torch.cat((ids[row : row + 1, start:], more[row : row + 1]), dim=1)).logits[0]
        torch.testing.assert_close(padded.logits[row, start:], alone[:-3])
        torch.testing.assert_close(next_logits[row], alone[-3:])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_short_padded_call_continues_the_sequence(model, length):
    """The convolution reaches back beyond a masked call into what came before it."""
    ids, more = tokens(), torch.randint(0, 31, (2, length))
    mask = torch.ones(2, 13 + length, dtype=torch.long)
    mask[0, 13 : 12 + length] = 0
    cache = model(ids, use_cache=True).past_key_values
    logits = model(more, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits[1], model(torch.cat((ids, more), dim=1)).logits[1, 13:])
    one = model(torch.cat((ids[:1], more[:1, -1:]), dim=1)).logits[0, -1]
    torch.testing.assert_close(logits[0, -1], one)


@pytest.mark.parametrize("given", ["position_ids", "document_ids"])
def test_packed_documents_are_apart(model, given):
    ids = tokens(batch=1)
    lengths = [5, 1, 7]
    values = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "document_ids": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]),
    }[given][None]
    packed = model(ids, labels=ids, use_cache=True, **{given: values})
    parts = [model(part).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed.logits, torch.cat(parts, dim=1))
    predicted = torch.cat([p[:, :-1] for p in parts], dim=1)[0]
    wanted = torch.cat([part[:, 1:] for part in ids.split(lengths, dim=1)], dim=1)[0]
    torch.testing.assert_close(
        packed.loss, torch.nn.functional.cross_entropy(predicted, wanted), check_dtype=False, rtol=1e-5, atol=1e-6
    )
    # the cache holds the last document only
    more = tokens(1, 3)
    positions = {"position_ids": torch.arange(7, 10)[None]} if given == "position_ids" else {}
    found = model(more, past_key_values=packed.past_key_values, **positions).logits
    torch.testing.assert_close(found, model(torch.cat((ids[:, 6:], more), dim=1)).logits[:, 7:])


def test_generate_equals_running_everything_again(model):
    prompts = tokens(batch=2, length=6)
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    out = model.generate(prompts, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, start in enumerate((0, 3)):
        ids = prompts[row : row + 1, start:]
        for _ in range(5):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(out[row, start:], ids[0])


def test_beam_search_reorders_states(model):
    prompts = tokens(batch=2, length=5)
    fast = model.generate(prompts, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    slow = model.generate(prompts, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(fast, slow)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    model.train()
    ids, grads = tokens(), []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads)


def test_bfloat16_autocast_is_finite(model):
    model.float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(length=40), labels=tokens(length=40)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_cache_does_not_grow():
    model = HopeForCausalLM(HopeConfig(**SIZES)).eval()
    sizes = []
    with torch.no_grad():
        for length in (5, 80):
            sizes.append(model(tokens(length=length), use_cache=True).past_key_values.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_no_cache_in_training_unless_asked():
    model = HopeForCausalLM(HopeConfig(**SIZES))
    assert model.train()(tokens()).past_key_values is None
    assert isinstance(model(tokens(), use_cache=True).past_key_values, StateCache)
    assert isinstance(model.eval()(tokens()).past_key_values, StateCache)


def test_return_dict_false_gives_tuples(model):
    ids = tokens()
    whole = model(ids, labels=ids, use_cache=True)
    loss, logits, cache = model(ids, labels=ids, use_cache=True, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)
    assert type(cache) is StateCache
    (hidden,) = model.model(ids, use_cache=False, return_dict=False)
    assert hidden.shape == (*ids.shape, model.config.hidden_size)


def test_hidden_states_and_logits_to_keep(model):
    ids = tokens()
    out = model(ids, output_hidden_states=True, logits_to_keep=2)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(out.logits, model(ids).logits[:, -2:])
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_levels_of_the_continuum():
    model = HopeForCausalLM(HopeConfig(**SIZES, cms_periods=[1, 64], intermediate_size=24))
    assert [(level.name, level.every) for level in model.levels()] == [("level1", 1), ("level2", 64)]
    held = model.level_parameters()
    assert set(held) == {"level1", "level2"}
    assert sum(p.numel() for p in held["level2"]) == 2 * 3 * 16 * 12
    single = HopeForCausalLM(HopeConfig(**SIZES, intermediate_size=24))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in single.parameters())
    assert single.level_parameters() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids: got shape"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids: got shape"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids: got dtype"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)}, "attention_mask"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "document_ids": torch.arange(3)}, "document_ids"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.zeros(2, 4, dtype=torch.long)}, "labels"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "past_key_values": ()}, "past_key_values: got tuple"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "past_key_values": StateCache(1)}, "past_key_values"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        HopeForCausalLM(HopeConfig(**SIZES))(**arguments)


def test_a_cache_of_other_rows_is_named():
    model = HopeForCausalLM(HopeConfig(**SIZES)).eval()
    cache = model(tokens(batch=3)).past_key_values
    with pytest.raises(InvalidArgument, match="got 3 rows, expected 2"):
        model(tokens(batch=2), past_key_values=cache)
    with pytest.raises(InvalidArgument, match="cannot be cropped"):
        cache.crop(-1)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert model(tokens(batch=2), past_key_values=cache).logits.shape == (2, 13, 31)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.reset()
    ids = tokens(batch=3)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 15}, "hidden_size"),
        ({"chunk_size": 3, "projection_chunk_size": 4}, "projection_chunk_size"),
        ({"memory": {"colour": 1}}, "colour"),
        ({"memory": {"chunk_size": 2}}, "chunk_size"),
        ({"mixer": ["hope"]}, "mixer"),
        ({"cms_periods": []}, "cms_periods"),
        ({"cms_periods": [4, 4]}, "cms_periods"),
        ({"cms_wiring": "loose"}, "wiring"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(InvalidArgument, match=message):
        HopeConfig(**{**SIZES, **change})


def test_unknown_mixers_are_named():
    with pytest.raises(InvalidArgument, match="mixer"):
        HopeModel(HopeConfig(**SIZES, mixer="brass"))


def test_hope_attention_is_a_transformer_with_levels():
    torch.manual_seed(0)
    one = HopeForCausalLM(HopeConfig(**SIZES, mixer="attention")).eval()
    other = TransformerForCausalLM(TransformerConfig(**SIZES)).eval()
    other.load_state_dict(one.state_dict())
    ids = tokens()
    assert torch.equal(one(ids).logits, other(ids).logits)


def _largest(state) -> float:
    return max(x.abs().max().item() for x in state.now)


@pytest.mark.parametrize("text", ["random", "one_token", "short_cycle", "real"])
def test_memories_stay_bounded(text):
    _bounded(2048, text)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["random", "one_token", "short_cycle", "real"])
def test_memories_stay_bounded_over_100k_tokens(text):
    _bounded(100_000, text)


def _bytes_of_our_documents(length: int) -> torch.Tensor:
    files = sorted(Path(__file__).parents[2].rglob("docs/*.md")) + sorted(Path(__file__).parents[1].rglob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    assert len(text) >= 100_000
    return torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8).long()


@torch.no_grad()
def _bounded(length: int, text: str) -> None:
    """A fast, forgetful-free memory on hard text: nothing grows, and the cache keeps its size."""
    hard = {"eta_init": 0.5, "alpha_init": 0.9999}
    model = HopeForCausalLM(HopeConfig(**{**SIZES, "vocab_size": 256, "chunk_size": 64}, memory=hard)).eval()
    ids = {
        "random": torch.randint(0, 31, (1, length)),
        "one_token": torch.full((1, length), 7),
        "short_cycle": torch.arange(length)[None] % 5,
        "real": _bytes_of_our_documents(length)[None],
    }[text]
    cache, seen = model.new_cache(), []
    for part in ids.split(512, dim=1):
        logits = model(part, past_key_values=cache).logits
        assert torch.isfinite(logits).all()
        seen.append(max(_largest(state) for state in cache.states()))
    assert max(seen) < 50
    assert max(seen[len(seen) // 2 :]) < 2 * max(seen[: len(seen) // 2])
