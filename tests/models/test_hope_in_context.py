"""Levels of the continuum memory as fast weights of a sequence, within a decoder."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.models.hope import HopeConfig, HopeForCausalLM
from everlearn.models.hope_in_context import hope_in_context, level_starts

RATES = {"level1": 0.3, "level2": 0.5}


def make(mixer="hope", wiring="sequential", layers=1):
    config = HopeConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=8,
        chunk_size=3, mixer=mixer, cms_periods=[2, 4], cms_wiring=wiring, tie_word_embeddings=False,
    )  # fmt: skip
    model = HopeForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_rate_zero_is_the_model_itself(mixer):
    model, ids = make(mixer), torch.randint(0, 11, (2, 9))
    logits, _ = hope_in_context(model, ids, {"level1": 0.0, "level2": 0.0})
    torch.testing.assert_close(logits, model(ids).logits)


@pytest.mark.parametrize("wiring", ["sequential", "nested"])
def test_updates_are_those_of_the_chunk_losses(wiring):
    """By hand: level 1 steps every 2 tokens, level 2 every 4, each on the mean loss gradient of its tokens."""
    model, ids = make(wiring=wiring), torch.randint(0, 11, (1, 7))
    logits, end = hope_in_context(model, ids, RATES)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    levels, cache, outs, sums = level_starts(model), model.new_cache(), [], {}
    for begin in (0, 2, 4, 6):
        out = model(ids[:, begin : begin + 2], past_key_values=cache).logits
        outs.append(out.detach())
        wanted = ids[:, begin + 1 : begin + 3]
        loss = F.cross_entropy(out[:, : wanted.shape[1]].flatten(0, 1), wanted.flatten(), reduction="sum")
        if not wanted.shape[1]:
            break
        for name, value in zip(start, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)):
            sums.setdefault(name, []).append(value)
        cache.store([state.detach() for state in cache.states()], 0)
        with torch.no_grad():
            for level, every in (("level1", 2), ("level2", 4)):
                if (begin + 2) % every:
                    continue
                for name, p in levels[level].items():
                    p -= RATES[level] * sum(sums[name][-every // 2 :]) / every
            if wiring == "nested" and (begin + 2) % 4 == 0:
                for name, p in levels["level1"].items():
                    p.copy_(start[name])
    torch.testing.assert_close(logits, torch.cat(outs, dim=1))
    for level, held in levels.items():
        for name, p in held.items():
            torch.testing.assert_close(end.levels[level][name], p)


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_outer_gradient_goes_through_the_updates(mixer):
    model, ids = make(mixer, layers=2), torch.randint(0, 11, (1, 6))
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def outer(rate):
        logits, _ = hope_in_context(model, ids, {"level1": rate, "level2": 0.1})
        return F.cross_entropy(logits[0, :-1], ids[0, 1:])

    assert torch.autograd.gradcheck(outer, (rate,), atol=1e-6)
    outer(rate).backward()
    weight = model.model.layers[0].mixer.in_proj.weight
    found, eps = weight.grad[0, 0].item(), 1e-5
    values = []
    for step in (eps, -2 * eps):
        with torch.no_grad():
            weight[0, 0] += step
            values.append(outer(rate).item())
    assert found == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-9)


def test_two_calls_equal_one():
    model, ids = make(), torch.randint(0, 11, (1, 8))
    targets = torch.cat((ids[:, 1:], torch.tensor([[-100]])), dim=1)
    whole, end = hope_in_context(model, ids, RATES)
    first, state = hope_in_context(model, ids[:, :3], RATES, targets=targets[:, :3])
    second, last = hope_in_context(model, ids[:, 3:], RATES, targets=targets[:, 3:], state=state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    for name, value in end.levels["level2"].items():
        torch.testing.assert_close(last.levels["level2"][name], value)


def test_bad_input_is_named():
    single = HopeForCausalLM(HopeConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(InvalidArgument, match="cms_periods"):
        hope_in_context(single, ids, {})
    with pytest.raises(InvalidArgument, match="rates"):
        hope_in_context(make(), ids, {"level1": 0.1})
