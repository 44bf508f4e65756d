"""Self-modifying memories: the fast form against its definition, and what a sequence layer must keep."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.memories.self_modifying import SelfModifyingConfig, SelfModifyingMemory, SelfModifyingState
from everlearn.memories.self_modifying_chunk import flattened
from everlearn.memories.self_modifying_naive import self_modifying_naive
from everlearn.ops.delta_rule import delta_rule

BASE = SelfModifyingConfig(hidden_size=6, num_heads=2, width=4, chunk_size=4, eta_init=0.3, alpha_init=0.9)

# every ablation and option, each in the chunk form against the definition
VARIANTS = {
    "default": {},
    "token_by_token": {"chunk_size": 1},
    "one_chunk": {"chunk_size": 64},
    "two_chunk_sizes": {"chunk_size": 2, "projection_chunk_size": 4},
    "two_chunk_sizes_momentum": {"chunk_size": 2, "projection_chunk_size": 6, "momentum": 0.5},
    "boundary_read": {"read": "boundary"},
    "momentum": {"momentum": 0.7},
    "momentum_token_by_token": {"momentum": 0.7, "chunk_size": 1},
    "momentum_boundary": {"momentum": 0.7, "read": "boundary"},
    "gradient_descent": {"rule": "gd"},
    "dot_product": {"objective": "dot"},
    "targets_given": {"self_targets": False},
    "targets_given_dot": {"self_targets": False, "objective": "dot"},
    "no_decay": {"decay": False},
    "no_inner_projections": {"adaptive": ()},
    "no_inner_projections_two_sizes": {"adaptive": (), "chunk_size": 2, "projection_chunk_size": 4},
    "inner_k_and_eta": {"adaptive": ("eta", "k")},
    "inner_q_too": {"adaptive": ("q", "k", "v", "eta", "alpha")},
    "small_errors_only": {"max_error": 0.5},
    "small_errors_only_dot": {"max_error": 0.5, "objective": "dot"},
    "any_error": {"max_error": None},
    "decay_to_zero": {"retention": "zero"},
    "decay_to_zero_momentum": {"retention": "zero", "momentum": 0.5, "chunk_size": 2, "projection_chunk_size": 4},
    "values_as_they_are": {"normalize_values": False},
    "matrix": {"structure": "matrix"},
    "matrix_dot_gd": {"structure": "matrix", "rule": "gd", "objective": "dot", "self_targets": False},
    "matrix_boundary_momentum": {"structure": "matrix", "read": "boundary", "momentum": 0.5},
    "tanh": {"activation": "tanh"},
    "relu": {"activation": "relu"},
    "wide": {"width": 7},
    "no_output_norm": {"output_norm": False},
    "no_output_gate": {"output_gate": False},
    "only_w1_forgets": {"forgetting": ("W1",)},
    "only_w2_forgets": {"forgetting": ("W2",), "momentum": 0.5, "chunk_size": 2, "projection_chunk_size": 4},
    "nothing_forgets_token_by_token": {"forgetting": (), "chunk_size": 1},
    "targets_are_constants": {"target_gradient": False},
    "matrix_targets_are_constants": {"structure": "matrix", "target_gradient": False},
    "recompute_nothing": {"recompute": "nothing"},
    "recompute_chunk": {"recompute": "chunk"},
    "recompute_chunk_two_sizes": {"recompute": "chunk", "chunk_size": 2, "projection_chunk_size": 4, "momentum": 0.5},
}


def layer(**changes) -> SelfModifyingMemory:
    """A float64 layer whose starts and projections are large enough to matter."""
    made = SelfModifyingMemory(BASE.replace(**changes)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def text(batch=2, length=11):
    return torch.randn(batch, length, BASE.hidden_size, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_its_definition_with_every_gradient(name):
    made, x = layer(**VARIANTS[name]), text().requires_grad_()
    wanted = [x, *(p for p in made.parameters() if p.requires_grad)]
    results = []
    for outs, now in (self_modifying_naive(made, x), ((found := made(x))[0], found[1].now)):
        loss = outs.sin().sum() + sum(w.cos().sum() for w in now)
        results.append([outs, *now, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    for naive, fast in zip(*results):
        if naive is None:  # a gate that this variant does not use
            assert fast is None or not fast.any()
            continue
        torch.testing.assert_close(fast, naive, rtol=1e-8, atol=1e-9)


def test_every_parameter_learns():
    made = layer()
    made(text())[0].square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


def test_is_the_gated_delta_rule_without_its_extras():
    """Static projections, a matrix, plain gradient descent, targets v, C = 1 (nested-learning.md, section 4)."""
    made = layer(
        retention="zero",
        structure="matrix",
        adaptive=(),
        rule="gd",
        self_targets=False,
        chunk_size=1,
        output_norm=False,
        output_gate=False,
    )
    x = text()
    y, state = made(x)
    past = torch.cat((x.new_zeros(2, 3, 6), x), dim=1)
    mixed = torch.nn.functional.silu(sum(past[:, j : j + 11] * made.conv_weight[j] for j in range(4)))
    q, k, v, e, a = made.in_proj(mixed).view(2, 11, 2, 5, 3).permute(3, 0, 2, 1, 4)
    q, k, v = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k, v))
    eta = torch.sigmoid((e * made.eta_weight[:, None]).sum(-1) + made.eta_bias[:, None])
    log_alpha = torch.nn.functional.logsigmoid((a * made.alpha_weight[:, None]).sum(-1) + made.alpha_bias[:, None])
    start = made.starts[0][:, 0].expand(2, 2, 3, 3)
    out, last = delta_rule(q, k, eta.unsqueeze(-1) * v, log_alpha, eta, start)
    torch.testing.assert_close(y, made.out_proj(out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(state.now[0][:, :, 0], last)


@pytest.mark.parametrize("name", ["default", "decay_to_zero_momentum", "boundary_read", "matrix", "momentum"])
@pytest.mark.parametrize("cuts", [[1] * 11, [3, 8], [4, 4, 3], [10, 1], [5, 1, 1, 4]])
def test_streaming_equals_one_call(name, cuts):
    made, x = layer(**VARIANTS[name]), text()
    whole, end = made(x)
    state, outs = None, []
    for part in x.split(cuts, dim=1):
        out, state = made(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    for ours, theirs in zip(state.state_dict().values(), end.state_dict().values()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["default", "token_by_token", "two_chunk_sizes_momentum", "boundary_read", "matrix"])
def test_is_causal(name):
    made, x = layer(**VARIANTS[name]), text()
    before, _ = made(x)
    for t in (0, 3, 4, 7, 10):
        changed = x.clone()
        changed[:, t] += 1.0
        after, _ = made(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("read", ["token", "boundary"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (2, 6), (3, 3), (64, 64)])
@pytest.mark.parametrize("structure", ["mlp", "matrix"])
def test_is_causal_for_every_read_and_chunk_size(read, sizes, structure):
    made = layer(read=read, chunk_size=sizes[0], projection_chunk_size=sizes[1], structure=structure, momentum=0.3)
    x = text(length=9)
    before, _ = made(x)
    for t in range(9):
        changed = x.clone()
        changed[:, t] -= 1.0
        after, _ = made(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("name", ["default", "two_chunk_sizes_momentum", "boundary_read"])
def test_a_long_input_in_pieces_equals_one_call(name):
    made, x = layer(**VARIANTS[name]), text(batch=1, length=700)
    with torch.no_grad():
        whole, end = made(x)
        state, outs = None, []
        for part in x.split([257, 1, 99, 343], dim=1):
            out, state = made(part, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(list(state.now), list(end.now), rtol=1e-8, atol=1e-9)


def test_rows_do_not_meet():
    made, x = layer(), text(batch=3)
    together, state = made(x)
    for row in range(3):
        alone, own = made(x[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)
        picked = state.select(torch.tensor([row]))
        torch.testing.assert_close(list(picked.state_dict().values()), list(own.state_dict().values()))


@pytest.mark.parametrize("name", ["default", "decay_to_zero_momentum", "boundary_read", "momentum"])
def test_masked_tokens_are_not_there(name):
    """Left, right and scattered padding give what each row gives without it, also over further calls."""
    made = layer(**VARIANTS[name])
    x, more = text(batch=5, length=13), text(batch=5, length=9)
    mask = torch.ones(5, 13, dtype=torch.bool)
    mask[1, :6] = False
    mask[2, 7:] = False
    mask[3, ::2] = False
    mask[4] = False
    out, state = made(x, None, made.plan(13, torch.zeros(5, dtype=torch.long), mask))
    later = mask[:, :9].flip(0)
    out2, state2 = made(more, state, made.plan(9, state.position, later))
    out3, state3 = made(more[:, :1], state2)
    out4, state4 = made(more[:, :6], state3)
    for row in range(5):
        tokens = [x[row, mask[row]], more[row, later[row]], more[row, :1], more[row, :6]]
        alone, end = made(torch.cat(tokens).unsqueeze(0))
        found = torch.cat([out[row, mask[row]], out2[row, later[row]], out3[row], out4[row]])
        torch.testing.assert_close(found, alone[0])
        kept = state4.select(torch.tensor([row]))
        torch.testing.assert_close(list(kept.state_dict().values()), list(end.state_dict().values()))
    assert not out[~mask].any()


@pytest.mark.parametrize("name", ["default", "two_chunk_sizes_momentum", "token_by_token"])
def test_packed_documents_do_not_meet(name):
    made = layer(**VARIANTS[name])
    x = text(batch=2, length=20)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    ends = [[0, 5, 6, 14, 20], [0, 8, 20]]
    for row, edges in enumerate(ends):
        starts[row, edges[:-1]] = True
    out, state = made(x, None, made.plan(20, torch.zeros(2, dtype=torch.long), None, starts))
    for row, edges in enumerate(ends):
        for a, b in pairwise(edges):
            alone, own = made(x[row : row + 1, a:b])
            torch.testing.assert_close(out[row, a:b], alone[0])
        kept = state.select(torch.tensor([row]))
        torch.testing.assert_close(list(kept.state_dict().values()), list(own.state_dict().values()))
    # a document that starts in a later call forgets all before it
    later = torch.zeros(2, 3, dtype=torch.bool)
    later[0, 0] = later[1, 1] = True
    out2, _ = made(x[:, :3], state, made.plan(3, state.position, None, later))
    torch.testing.assert_close(out2[0], made(x[:1, :3])[0][0])
    torch.testing.assert_close(out2[1, 1:], made(x[1:, 1:3])[0][0])


def test_gradients_through_layout_are_those_of_the_rows():
    made, x = layer(), text(batch=2, length=9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    out, _ = made(x, None, made.plan(9, torch.zeros(2, dtype=torch.long), mask))
    parameters = list(made.parameters())
    found = torch.autograd.grad(out.sin().sum(), parameters)
    alone = made(x[:1])[0].sin().sum() + made(x[1:, 4:])[0].sin().sum()
    torch.testing.assert_close(found, torch.autograd.grad(alone, parameters))


def test_second_derivatives_and_function_transforms():
    made, x = layer(), text(length=6)
    params = {name: p.detach() for name, p in made.named_parameters()}

    def inner(p, recompute):
        made.config = BASE.replace(recompute=recompute)
        return torch.func.functional_call(made, p, (x,))[0].sin().sum()

    def outer(p, recompute):
        step = torch.func.grad(inner)(p, recompute)
        return inner({name: p[name] - 0.01 * step[name] for name in p}, recompute)

    found = [torch.func.grad(outer)(params, recompute) for recompute in ("nothing", "parts", "chunk")]
    for name in params:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found[2][name], found[0][name], rtol=1e-7, atol=1e-8)
    leaves = [p.clone().requires_grad_() for p in params.values()]
    for recompute in ("parts", "chunk"):
        by_autograd = torch.autograd.grad(outer(dict(zip(params, leaves)), recompute), leaves)
        for name, value in zip(params, by_autograd):
            torch.testing.assert_close(value, found[0][name], rtol=1e-7, atol=1e-8)


COMPILED = {
    "as by default": {},
    "chunks computed again": {"recompute": "chunk"},
    "two sizes, momentum": {"chunk_size": 2, "projection_chunk_size": 4, "momentum": 0.5},
}


def gradients(made: SelfModifyingMemory, x: torch.Tensor) -> list[torch.Tensor]:
    """Of the outputs and of the state after them, by all parameters; the outputs come first."""
    out, state = made(x)
    loss = out.sin().sum() + sum(p.cos().sum() for p in state.now)
    return [out, *torch.autograd.grad(loss, list(made.parameters()))]


def compiled_equals(monkeypatch, changes, **options) -> list[object]:
    """Compare a layer with itself, compiled; return what was compiled."""
    made, x, compiled = layer(**changes), text(length=11), []
    expected, compile = gradients(made, x), torch.compile

    def counting(function, **given):
        compiled.append(function)
        return compile(function, **given, **options)

    monkeypatch.setattr(torch, "compile", counting)
    flattened.cache_clear()
    torch.compiler.reset()
    made.config = made.config.replace(compile=True)
    with torch.no_grad():
        torch.testing.assert_close(made(x)[0], expected[0])
    assert not compiled, "nothing is compiled but for training"
    torch.testing.assert_close(gradients(made, x), expected)
    flattened.cache_clear()
    return compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every input's
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_itself_with_every_gradient(name, monkeypatch):
    compiled = compiled_equals(monkeypatch, COMPILED[name], backend="aot_eager")
    assert 0 < len(compiled) <= 4, "one for each kind of whole chunk, not one a call"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every input's
def test_compiled_equals_itself_with_the_compiler(monkeypatch):
    assert compiled_equals(monkeypatch, {})


def test_state_is_a_value():
    made, x = layer(momentum=0.5), text()
    _, state = made(x)
    saved = state.clone()
    made(x, state)
    for key, value in state.state_dict().items():
        assert torch.equal(value, saved.state_dict()[key]), key
    again = SelfModifyingState.from_state_dict(state.state_dict())
    torch.testing.assert_close(made(x, again)[0], made(x, state)[0])
    assert state.now[0].requires_grad
    assert not any(value.requires_grad for value in state.detach().state_dict().values())
    assert made(text(length=40))[1].nbytes == state.nbytes
    twice = state.select(torch.tensor([1, 1]))
    assert torch.equal(twice.now[0][0], state.now[0][1])
    with pytest.raises(InvalidArgument, match="tensors"):
        SelfModifyingState.from_state_dict({k: v for k, v in state.state_dict().items() if k != "now.1"})


@pytest.mark.parametrize("name", ["default", "momentum", "matrix", "boundary_read"])
def test_no_nan_in_bfloat16(name):
    config = SelfModifyingConfig(hidden_size=32, num_heads=2, **{"chunk_size": 8, **VARIANTS[name]})
    made, x = SelfModifyingMemory(config), torch.randn(2, 30, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = made(x)
        y.float().square().mean().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    assert state.now[0].dtype == torch.float32
    low = made.bfloat16()(x.bfloat16())[0]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), made.float()(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 7}, "hidden_size"),
        ({"chunk_size": 4, "projection_chunk_size": 6}, "projection_chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"adaptive": ("k", "w")}, "adaptive"),
        ({"structure": "tree"}, "structure"),
        ({"forgetting": ("W3",)}, "forgetting"),
        ({"activation": "sin"}, "activation"),
        ({"rule": "newton"}, "rule"),
        ({"objective": "l1"}, "objective"),
        ({"read": "later"}, "read"),
        ({"max_error": 0.0}, "max_error"),
        ({"retention": "never"}, "retention"),
        ({"momentum": 1.0}, "momentum"),
        ({"eta_init": 1.0}, "eta_init"),
        ({"alpha_init": 1.0}, "alpha_init"),
        ({"width": 0}, "head_width"),
        ({"recompute": "some"}, "recompute"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(InvalidArgument, match=message):
        BASE.replace(**change)


def test_bad_inputs_are_named():
    made = layer()
    for bad in (torch.zeros(2, 0, 6), torch.zeros(2, 3, 5), torch.zeros(3, 6)):
        with pytest.raises(InvalidArgument, match="x: got shape"):
            made(bad.double())
    with pytest.raises(InvalidArgument, match="state: got memories"):
        made(text(batch=2), made.init_state(3))
    with pytest.raises(InvalidArgument, match="state: got memories"):
        made(text(), layer(momentum=0.5).init_state(2))
