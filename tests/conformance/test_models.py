"""One suite for every model family: caches, masks, documents, gradients, saving, and what transformers expects."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from everlearn.errors import InvalidArgument
from everlearn.models.backbone_cache import StateCache
from everlearn.models.hope_in_context import hope_in_context
from everlearn.models.registry import FAMILIES, build

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4}
# options that bring chunks and windows into a sequence of 13 tokens
OPTIONS = {"samba": {"mixer_options": {"window": {"window": 3}}}}
GROWING = {"transformer", "hope-attention"}  # their cache holds every key


def config_of(name: str, **changes):
    return FAMILIES[name](**{**SIZES, "intermediate_size": 24, **OPTIONS.get(name, {}), **changes})


def made(name: str, **changes):
    """A float64 model in evaluation mode whose weights matter."""
    model = build(config_of(name, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch=2, length=13):
    return torch.randint(0, 31, (batch, length))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_starts_at_the_loss_of_a_uniform_guess(family):
    ids = tokens(4, 40)
    loss = build(config_of(family))(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(torch.tensor(31.0).log().item(), rel=0.05)


def test_all_parameters_are_drawn_and_learn(family):
    with torch.device("meta"):
        empty = build(config_of(family))
    model = build(config_of(family))
    assert all(torch.isfinite(p).all() for p in model.parameters())  # torch.empty is poisoned in tests
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert silent == set()


def test_auto_classes_and_round_trip(family, tmp_path):
    model, ids = made(family), tokens()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {"dtype": None}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    headless = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_is_causal(family):
    model, ids = made(family), tokens()
    before = model(ids).logits
    for t in (2, 3, 9):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        after = model(changed).logits
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("cuts", [[1] * 13, [5, 6, 2]])
def test_a_cache_continues_the_sequence(family, cuts):
    model, ids = made(family), tokens()
    cache, parts = None, []
    for part in ids.split(cuts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)
    assert cache.get_seq_length() == 13


def test_masked_tokens_change_nothing(family):
    """Padding on the left, on the right, and holes; then the rows go on from a common cache."""
    model, ids = made(family), tokens(batch=4)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 6:], mask[3, 2:9] = 0, 0, 0
    padded = model(ids, attention_mask=mask, use_cache=True)
    cache, logits = padded.past_key_values, [padded.logits]
    more = tokens(4, 4)
    for part in more.split([1, 3], dim=1):
        mask = torch.cat((mask, torch.ones_like(part)), dim=1)
        logits.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    found, everything = torch.cat(logits, dim=1), torch.cat((ids, more), dim=1)
    for row in range(4):
        kept = mask[row].bool()
        torch.testing.assert_close(found[row, kept], model(everything[row : row + 1, kept]).logits[0])


@pytest.mark.parametrize("given", ["position_ids", "document_ids"])
def test_packed_documents_are_apart(family, given):
    model, ids = made(family), tokens(batch=1)
    lengths = [5, 1, 7]
    values = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "document_ids": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]),
    }[given][None]
    packed = model(ids, labels=ids, use_cache=True, **{given: values})
    parts = [model(part).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed.logits, torch.cat(parts, dim=1))
    wanted = torch.cat([part[:, 1:] for part in ids.split(lengths, dim=1)], dim=1)[0]
    loss = torch.nn.functional.cross_entropy(torch.cat([p[0, :-1] for p in parts]), wanted)
    torch.testing.assert_close(packed.loss, loss, check_dtype=False, rtol=1e-5, atol=1e-6)
    # the cache holds the last document only
    more = tokens(1, 3)
    positions = {"position_ids": torch.arange(7, 10)[None]} if given == "position_ids" else {}
    found = model(more, past_key_values=packed.past_key_values, **positions).logits
    torch.testing.assert_close(found, model(torch.cat((ids[:, 6:], more), dim=1)).logits[:, 7:])


def test_documents_begin_anywhere_in_padded_and_cached_rows(family):
    model, ids = made(family), tokens(batch=2)
    documents = torch.zeros_like(ids)
    documents[0, 4:], documents[1, 9:] = 1, 1
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, 5:7] = 0, 0
    cache, logits = None, []
    for a, b in ((0, 6), (6, 13)):
        out = model(
            ids[:, a:b],
            attention_mask=mask[:, :b],
            past_key_values=cache,
            use_cache=True,
            document_ids=documents[:, a:b],
        )
        cache = out.past_key_values
        logits.append(out.logits)
    found = torch.cat(logits, dim=1)
    for row in range(2):
        for document in range(2):
            kept = mask[row].bool() & (documents[row] == document)
            torch.testing.assert_close(found[row, kept], model(ids[row : row + 1, kept]).logits[0])


def test_generates_what_the_parallel_form_says(family):
    model, prompts = made(family), tokens(batch=2, length=6)
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    out = model.generate(prompts, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, start in enumerate((0, 3)):
        ids = prompts[row : row + 1, start:]
        for _ in range(5):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(out[row, start:], ids[0])


def test_beam_search_reorders_states(family):
    model, prompts = made(family), tokens(batch=2, length=5)
    fast, slow = (
        model.generate(prompts, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    )
    assert torch.equal(fast, slow)


@torch.no_grad()
def test_the_cache_keeps_its_size(family):
    model = build(config_of(family)).eval()
    sizes = [model(tokens(length=length), use_cache=True).past_key_values.nbytes for length in (1, 5, 80)]
    assert (sizes[0] == sizes[1] == sizes[2]) == (family not in GROWING)
    assert isinstance(model(tokens()).past_key_values, StateCache)


def test_gradients(family):
    """Against finite differences in float64, through a masked and a packed row."""
    model = made(family, num_hidden_layers=1, vocab_size=7).train()
    ids = torch.randint(0, 7, (2, 7))
    mask, documents = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, :2], documents[1, 3:] = 0, 1
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(*values):
        given = dict(zip(names, values))
        out = torch.func.functional_call(
            model, given, (), {"input_ids": ids, "attention_mask": mask, "document_ids": documents}
        )
        return (out.logits[mask.bool()].log_softmax(-1)[:, 1:3]).sum()

    torch.autograd.gradcheck(loss, parameters, fast_mode=True, atol=1e-4, rtol=1e-3)


def test_checkpointing_gives_the_same_gradients(family):
    model, ids, grads = made(family).train(), tokens(), []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads)


def test_bfloat16(family):
    """Under autocast, and as the dtype of the weights."""
    model = build(config_of(family)).train()
    ids = tokens(length=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    exact = model.eval()(ids).logits
    rough = model.bfloat16()(ids).logits
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.05)


def test_levels_can_stand_in_every_family(family):
    """The continuum memory learns in context behind any mixer, and with zero rates changes nothing."""
    model, ids = made(family, cms_periods=[1, 4]), tokens(1, 9)
    assert [level.every for level in model.levels()] == [1, 4]
    still, _ = hope_in_context(model, ids, {"level1": 0.0, "level2": 0.0}, chunk_size=4)
    torch.testing.assert_close(still, model(ids).logits)
    moved, _ = hope_in_context(model, ids, {"level1": 0.1, "level2": 0.1}, chunk_size=4)
    torch.testing.assert_close(moved[:, 0], still[:, 0])
    assert not torch.allclose(moved[:, 4:], still[:, 4:])


def test_unknown_options_are_named(family):
    with pytest.raises(InvalidArgument, match="brass"):
        config_of(family, mixer_options={"brass": {}})
    with pytest.raises(InvalidArgument, match="colour"):
        config_of(family, mixer_options={config_of(family).mixers()[0]: {"colour": 1}})
