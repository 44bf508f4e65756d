"""One suite for every optimiser: it learns, resumes bit for bit, obeys groups, schedulers and torch's conventions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from everlearn.levels import Level
from everlearn.optim import OPTIMIZERS, MultiFrequency, Muon, create, param_groups

OURS = ["dgd", "delta_momentum", "dmgd", "muon", "m3", "multi_frequency"]
RATES = {"dgd": 0.1, "delta_momentum": 0.1, "dmgd": 0.05, "muon": 0.02, "m3": 0.02, "multi_frequency": 0.01}
VARIANTS = {
    "delta_momentum": [{"keys": "gradient"}],
    "dmgd": [{"hidden_size": 2}],
    "muon": [{"nesterov": False, "weight_decay": 0.1, "ns_dtype": torch.bfloat16}],
    "m3": [{"form": "printed", "scale": "absolute", "frequency": 3, "lr": 1e-3}, {"frequency": 2, "alpha": 1.0}],
    "dgd": [{"weight_decay": 0.01}],
    "multi_frequency": [{"tokens_per_step": 4, "reduction": "mean"}],
}
CASES = [(name, {}) for name in OURS] + [(name, options) for name in OURS for options in VARIANTS[name]]


class Net(nn.Module):
    """An embedding, two matrices of one shape, another, a convolution, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up = nn.Linear(8, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.conv(x.mT).mT
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(self.norm(torch.tanh(self.up(x))))


def build(name: str, options: dict, seed: int = 0):
    torch.manual_seed(seed)
    model = Net()
    if name == "multi_frequency":
        slow = Level("slow", 12, optimizer=lambda p: Muon(p, lr=0.02))
        first, *rest = param_groups(model)
        rest = [p for group in rest for p in group["params"]]
        optimizer = MultiFrequency(
            [{"params": first["params"], "level": slow}, {"params": rest, "every": 8}],
            **{"tokens_per_step": 4, **options},
        )
        return model, optimizer
    return model, create(name, model, **{"lr": RATES[name], **options})


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), ((tokens * 3 + 1) % 11).flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_suite_covers_every_optimiser():
    assert {*OURS, "adamw", "sgd"} == set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_learns(name, options):
    model, optimizer = build(name, options)
    losses = train(model, optimizer, range(60))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_resumes_bit_for_bit(name, options):
    """7 steps is in the middle of every slow period; the state goes through a file with ``weights_only``."""
    model, optimizer = build(name, options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    for step in range(7, 15):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()

    file.seek(0)
    weights, state, schedule = torch.load(file, weights_only=True)
    other, resumed = build(name, options, seed=1)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    continued = torch.optim.lr_scheduler.LambdaLR(resumed, lambda n: 1 / (1 + n))
    continued.load_state_dict(schedule)
    resumed.load_state_dict(state)  # building a scheduler writes rates into the groups
    for step in range(7, 15):
        train(other, resumed, range(step, step + 1))
        continued.step()
    assert same(model, other)


@pytest.mark.parametrize("name", OURS)
def test_same_seed_same_weights(name):
    runs = [build(name, {}) for _ in range(2)]
    for model, optimizer in runs:
        train(model, optimizer, range(6))
    assert same(runs[0][0], runs[1][0])


@pytest.mark.parametrize("name", OURS)
def test_rate_zero_changes_nothing(name):
    model, optimizer = build(name, {})
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(6))
    tolerance = 1e-6 if name == "dgd" else 0.0  # solves with the identity
    for a, b in zip(before.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", OURS)
def test_parameters_without_gradient_are_left_alone(name):
    model, optimizer = build(name, {})
    before = model.second.weight.clone()
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        model.second.weight.grad = None
        optimizer.step()
    assert torch.equal(before, model.second.weight)
    assert not torch.equal(before, model.first.weight)


@pytest.mark.parametrize("name", OURS)
def test_scheduler_reaches_every_group(name):
    _, optimizer = build(name, {})
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in rates]
    assert len(rates) > 1


@pytest.mark.parametrize("name", OURS)
def test_closure_is_called_with_gradients_enabled(name):
    model, optimizer = build(name, {})

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(loss_of(build(name, {})[0], 0).item())


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_parameters_stay_finite(name):
    model, optimizer = build(name, {})
    model.bfloat16()
    train(model, optimizer, range(4))
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", OURS)
def test_accumulated_gradients_equal_one_large_batch(name):
    halves, whole = build(name, {}), build(name, {})
    for step in range(3):
        tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        for (model, optimizer), parts in ((halves, tokens.chunk(2)), (whole, (tokens,))):
            optimizer.zero_grad()
            for part in parts:
                out = model(part).flatten(0, 1)
                (nn.functional.cross_entropy(out, (part * 3 + 1).flatten() % 11) / len(parts)).backward()
            optimizer.step()
    for a, b in zip(halves[0].parameters(), whole[0].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
