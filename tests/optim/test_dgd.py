"""Delta gradient descent: what its hooks see, and that its step is the proximal minimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from everlearn import HopeConfig, HopeForCausalLM
from everlearn.errors import InvalidArgument
from everlearn.ops.updates import dgd_step_naive
from everlearn.optim import DGD


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).double()


def per_token(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The inputs of both layers, and the gradients of each token's own loss at their outputs."""
    first = model[0](x)
    hidden = model[1](first)
    second = model[2](hidden)
    errors = torch.autograd.grad((second - y).square().sum(), [first, second])
    return [(x, errors[0]), (hidden.detach(), errors[1])]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3)])
def test_step_solves_the_proximal_problem_of_every_layer(reduction, shape):
    model, x, y = two_layers(), torch.randn(*shape, 5).double(), torch.randn(*shape, 3).double()
    flat = per_token(model, x.reshape(-1, 5), y.reshape(-1, 3))
    optimizer = DGD(model, lr=0.3, reduction=reduction)
    loss = (model(x) - y).square().sum(-1)
    (loss.mean() if reduction == "mean" else loss.sum()).backward()
    rate = 0.3 if reduction == "mean" else 0.3 * len(flat[0][0])
    expected = [dgd_step_naive(model[i].weight.detach(), *flat[i // 2], eta=rate) for i in (0, 2)]
    optimizer.step()
    for i, weight in zip((0, 2), expected):
        torch.testing.assert_close(model[i].weight.detach(), weight, rtol=1e-9, atol=1e-10)


def test_the_transposed_weight_of_gpt2_steps_as_that_of_a_linear_layer():
    linear, conv = nn.Linear(5, 7).double(), Conv1D(7, 5).double()
    conv.load_state_dict({"weight": linear.weight.detach().mT.clone(), "bias": linear.bias.detach().clone()})
    x = torch.randn(6, 5).double()
    for layer in (linear, conv):
        optimizer = DGD(layer, lr=0.3)
        layer(x).square().sum(-1).mean().backward()
        optimizer.step()
    torch.testing.assert_close(conv.weight, linear.weight.mT, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(conv.bias, linear.bias, rtol=1e-12, atol=1e-13)


def test_only_tokens_that_got_a_gradient_count():
    models = [two_layers(), two_layers()]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    for model, rows in zip(models, (6, 4)):
        optimizer = DGD(model, lr=0.3)
        (model(x[:rows]) - y[:rows]).square().sum(-1)[:4].mean().backward()
        optimizer.step()
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_forward_passes_without_backward_do_not_count():
    models = [two_layers(), two_layers()]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    for model, extra in zip(models, (True, False)):
        optimizer = DGD(model, lr=0.3)
        if extra:
            model(100 * x)
            with torch.no_grad():
                model(100 * x)
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def test_inputs_are_forgotten_with_their_gradients():
    """``zero_grad`` and the first backward pass after a step both start afresh, whoever clears the gradients."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    optimizer = DGD(model, lr=0.3)
    x = torch.randn(6, 5).double()
    for clear in (optimizer.zero_grad, model.zero_grad):
        model(1000 * x).sum().backward()
        optimizer.step()
        clear()
        model(x).sum().backward()
        (seen,) = [s for p, s in optimizer._inputs.items() if p is model[0].weight]
        torch.testing.assert_close(seen.gram, x.mT @ x)
        assert seen.count == 6
        optimizer.zero_grad()
        assert seen.gram is None


def test_no_rate_diverges():
    model, x, y = two_layers(), 1e3 * torch.randn(6, 5).double(), torch.randn(6, 3).double()
    optimizer = DGD(model, lr=1e6)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() and p.abs().max() < 1e3 for p in model.parameters())


def test_only_hidden_linear_weights_get_the_rule():
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 3, 2), "linear": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    optimizer = DGD(model)
    matrices = [p for group in optimizer.param_groups if group["rule"] == "matrix" for p in group["params"]]
    assert len(matrices) == 1
    assert matrices[0] is model["linear"].weight
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_a_linear_layer_that_is_never_called_gets_adamw_where_its_owner_says_so():
    model = HopeForCausalLM(
        HopeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    mixer, feed_forward = model.model.layers[0].mixer, model.model.layers[0].feed_forward
    optimizer = DGD(model, lr=0.1)
    matrices = {id(p) for group in optimizer.param_groups if group["rule"] == "matrix" for p in group["params"]}
    called = (mixer.gate_proj, mixer.out_proj, feed_forward.in_proj, feed_forward.out_proj)
    assert matrices == {id(linear.weight) for linear in called}
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_errors_name_the_argument():
    model = two_layers()
    with pytest.raises(InvalidArgument, match="module"):
        DGD(model.parameters())
    with pytest.raises(InvalidArgument, match="reduction"):
        DGD(model, reduction="max")
    optimizer = DGD(model)
    optimizer.remove_hooks()
    model(torch.randn(2, 5).double()).sum().backward()
    with pytest.raises(InvalidArgument, match="inputs were not seen"):
        optimizer.step()
