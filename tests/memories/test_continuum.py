"""Wirings against their equations; the in-context form against a hand-written double loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.levels import Level
from everlearn.memories.continuum import Continuum, gradient_descent, learn_in_context, start_in_context
from everlearn.memories.residual import ResidualMemory

D, VOCAB = 6, 11


def learned(width: int = 4) -> ResidualMemory:
    memory = ResidualMemory(D, width).double()
    nn.init.normal_(memory.W1, std=0.3)
    return memory


class Plain(nn.Module):
    """A memory that has no `delta`: whatever maps hidden states to hidden states will do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


# ------------------------------------------------------------------------------------------------- wirings


@pytest.mark.parametrize("wiring", ["sequential", "nested"])
def test_chain(wiring):
    base, a, b = nn.Linear(D, D, dtype=torch.float64), learned(), Plain()
    x = torch.randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(Continuum(["a", "b"], [a, b], wiring=wiring, base=base)(x), b(a(base(x))))
    torch.testing.assert_close(Continuum(["a", "b"], [a, b], wiring=wiring)(x), b(a(x)))


def test_independent_beside_a_base():
    base, a, b = nn.Linear(D, D, dtype=torch.float64), learned(), Plain()
    x = torch.randn(3, D, dtype=torch.float64)
    expected = base(x) + (a(x) - x) + (b(x) - x)
    torch.testing.assert_close(Continuum(["a", "b"], [a, b], wiring="independent", base=base)(x), expected)


def test_independent_mixture():
    memories = [Plain(), Plain(), Plain()]
    mixture = Continuum(["a", "b", "c"], memories, wiring="independent")
    for logit in mixture.mix:
        nn.init.normal_(logit)
    x = torch.randn(3, D, dtype=torch.float64)
    weights = torch.softmax(torch.stack([mixture.level_parameters(n)["mixture_logit"] for n in "abc"]), dim=0)
    torch.testing.assert_close(mixture(x), sum(w * m(x) for w, m in zip(weights, memories)))
    mixture(x).sum().backward()
    assert all(logit.grad.abs() > 0 for logit in mixture.mix)


def test_mixture_of_equal_levels_is_exact():
    memories = [nn.Linear(D, D) for _ in range(3)]
    for memory in memories[1:]:
        memory.load_state_dict(memories[0].state_dict())
    x = torch.randn(50, D)
    assert torch.equal(Continuum(["a", "b", "c"], memories, wiring="independent")(x), memories[0](x))


def test_levels_own_their_parameters_and_reset_to_their_start():
    chain = Continuum(["a", "b"], [ResidualMemory(D, 3), ResidualMemory(D, 3)])
    before = {key: value.clone() for key, value in chain.state_dict().items()}
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(1.0)
    chain.reset("a")
    assert all(torch.equal(value, before[f"memories.0.{key}"]) for key, value in chain.level_state("a").items())
    assert all(torch.equal(value, before[f"memories.1.{key}"] + 1) for key, value in chain.level_state("b").items())
    assert set(chain.level_parameters("b")) == {"W1", "W2"}
    assert chain.level_parameters("c") == {}


def test_errors():
    with pytest.raises(InvalidArgument, match="wiring"):
        Continuum(["a"], [Plain()], wiring="parallel")
    for names in (["a"], ["a", "a"]):
        with pytest.raises(InvalidArgument, match="names"):
            Continuum(names, [Plain(), Plain()])


# ---------------------------------------------------------------------------------------------- in context

LEVELS = [Level("fast", 3), Level("mid", 6), Level("slow")]


class Tiny(nn.Module):
    """Token embedding, a running sum of the past (the model's own state), three levels, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D, dtype=torch.float64)
        self.cms = Continuum([level.name for level in LEVELS], [learned(), learned(), learned()])
        self.head = nn.Linear(D, VOCAB, dtype=torch.float64)

    def starts(self):
        return {level.name: self.cms.level_parameters(level.name) for level in LEVELS}

    def forward(self, tokens, past):
        summed = torch.cumsum(self.embed(tokens), dim=-2) + past
        return self.head(self.cms(torch.tanh(summed))), summed[..., -1:, :]

    def step(self, levels, tokens, past):
        names = {level.name: index for index, level in enumerate(LEVELS)}
        params = {f"cms.memories.{names[n]}.{k}": v for n, own in levels.items() for k, v in own.items()}
        return torch.func.functional_call(self, params, (tokens, past))


def double_loop(model, tokens, targets, rates, wiring):
    """The definition, a token at a time: the gradient of each token's loss, summed until its level is due."""
    starts = model.starts()
    fast = {name: dict(own) for name, own in starts.items()}
    past = torch.zeros(tokens.shape[0], 1, D, dtype=torch.float64)
    sums = {name: dict.fromkeys(own, 0.0) for name, own in starts.items()}
    counts = dict.fromkeys(starts, 0)
    outputs, entered = [], past
    for t in range(tokens.shape[1]):
        if t % 3 == 0:  # a piece begins: its inner gradient takes what came before as a constant
            entered, begin = past, t
        now = {name: {key: value.view_as(value) for key, value in own.items()} for name, own in fast.items()}
        logits, _ = model.step(now, tokens[:, begin : t + 1], entered)
        outputs.append(logits[:, -1:])
        loss = F.cross_entropy(logits[:, -1], targets[:, t], ignore_index=-100, reduction="sum")
        for level in LEVELS[:2]:
            grads = torch.autograd.grad(loss, list(now[level.name].values()), create_graph=True)
            for key, grad in zip(fast[level.name], grads):
                sums[level.name][key] = sums[level.name][key] + grad
            counts[level.name] += int((targets[:, t] != -100).sum())
        if (t + 1) % 3 == 0:
            past = model.step(fast, tokens[:, begin : t + 1], entered)[1]
        for level in LEVELS[:2]:
            if (t + 1) % level.every == 0:
                own, name = fast[level.name], level.name
                fast[name] = {k: own[k] - rates[name] * sums[name][k] / max(counts[name], 1) for k in own}
                sums[name], counts[name] = dict.fromkeys(own, 0.0), 0
                if wiring == "nested" and name == "mid":
                    fast["fast"] = dict(starts["fast"])
    return torch.cat(outputs, dim=1), fast


def data(batch=1, time=14):
    tokens = torch.randint(VOCAB, (batch, time + 1))
    targets = tokens[:, 1:].clone()
    targets[:, 4] = -100
    rates = {name: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for name in ("fast", "mid")}
    return tokens[:, :-1], targets, rates, torch.zeros(batch, 1, D, dtype=torch.float64)


@pytest.mark.parametrize("wiring", ["sequential", "nested"])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_double_loop_with_every_gradient(wiring, batch):
    model = Tiny()
    tokens, targets, rates, past = data(batch)
    start = start_in_context(model.starts(), LEVELS, past)
    logits, end = learn_in_context(
        model.step, model.starts(), tokens, targets, LEVELS, gradient_descent(rates), wiring=wiring, state=start
    )
    expected, fast = double_loop(model, tokens, targets, rates, wiring)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for name in ("fast", "mid", "slow"):
        for key, value in end.levels[name].items():
            torch.testing.assert_close(value, fast[name][key], rtol=1e-10, atol=1e-10)
    outer = [*model.parameters(), *rates.values()]
    flat = targets.flatten()
    ours = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), flat), outer)
    theirs = torch.autograd.grad(F.cross_entropy(expected.flatten(0, 1), flat), outer)
    for ours_one, theirs_one in zip(ours, theirs):
        torch.testing.assert_close(ours_one, theirs_one, rtol=1e-9, atol=1e-10)
    assert all(grad.abs().sum() > 0 for grad in ours)


def test_nested_and_sequential_differ_only_after_the_parents_period():
    model = Tiny()
    tokens, targets, rates, past = data()
    one, two = (
        learn_in_context(
            model.step,
            model.starts(),
            tokens,
            targets,
            LEVELS,
            gradient_descent(rates),
            wiring=wiring,
            state=start_in_context(model.starts(), LEVELS, past),
        )[0]
        for wiring in ("sequential", "nested")
    )
    assert torch.equal(one[:, :6], two[:, :6])
    assert not torch.allclose(one[:, 6:], two[:, 6:])


def test_continuing_equals_one_run_wherever_it_is_cut():
    model = Tiny()
    tokens, targets, rates, past = data()
    update = gradient_descent(rates)
    fresh = start_in_context(model.starts(), LEVELS, past)
    whole, end = learn_in_context(model.step, model.starts(), tokens, targets, LEVELS, update, state=fresh)
    parts, state, at = [], fresh, 0
    for size in (1, 4, 2, 7):
        piece = slice(at, at + size)
        logits, state = learn_in_context(
            model.step, model.starts(), tokens[:, piece], targets[:, piece], LEVELS, update, state=state
        )
        parts.append(logits)
        at += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-11, atol=1e-11)
    assert state.tokens == end.tokens == 14
    torch.testing.assert_close(state.levels["fast"]["W1"], end.levels["fast"]["W1"], rtol=1e-11, atol=1e-11)


def test_vmap_gives_every_sequence_its_own_fast_weights():
    model = Tiny()
    tokens, targets, rates, _ = data(batch=3)
    past = torch.zeros(1, D, dtype=torch.float64)

    def one(tokens, targets):
        start = start_in_context(model.starts(), LEVELS, past)
        return learn_in_context(
            model.step, model.starts(), tokens, targets, LEVELS, gradient_descent(rates), state=start
        )[0]

    each = torch.stack([one(row, target) for row, target in zip(tokens, targets)])
    torch.testing.assert_close(torch.vmap(one)(tokens, targets), each, rtol=1e-10, atol=1e-10)


def test_rate_zero_is_the_plain_model_and_no_grad_keeps_no_graph():
    model = Tiny()
    tokens, targets, rates, past = data()
    zero = gradient_descent(dict.fromkeys(rates, 0.0))
    with torch.no_grad():
        state = start_in_context(model.starts(), LEVELS, past)
        logits, end = learn_in_context(model.step, model.starts(), tokens, targets, LEVELS, zero, state=state)
        torch.testing.assert_close(logits, model(tokens, past)[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(end.levels["fast"]["W1"], model.starts()["fast"]["W1"])
    assert not logits.requires_grad


def test_no_logit_depends_on_its_own_or_a_later_target():
    model = Tiny()
    tokens, targets, rates, past = data()
    runs = []
    for changed in (targets, targets.clone()):
        if runs:
            changed[:, 8] = (changed[:, 8] + 1) % VOCAB
        state = start_in_context(model.starts(), LEVELS, past)
        runs.append(
            learn_in_context(model.step, model.starts(), tokens, changed, LEVELS, gradient_descent(rates), state=state)
        )
    assert torch.equal(runs[0][0][:, :9], runs[1][0][:, :9])
    assert not torch.equal(runs[0][0][:, 9:], runs[1][0][:, 9:])


def test_in_context_errors():
    model = Tiny()
    tokens, targets, rates, _ = data()
    with pytest.raises(InvalidArgument, match="starts"):
        start_in_context({"fast": {}}, LEVELS)
    with pytest.raises(InvalidArgument, match="inputs"):
        learn_in_context(model.step, model.starts(), tokens[:, :0], targets[:, :0], LEVELS, gradient_descent(rates))
    with pytest.raises(InvalidArgument, match="wiring"):
        learn_in_context(
            model.step, model.starts(), tokens, targets, LEVELS, gradient_descent(rates), wiring="sideways"
        )
