"""The shared trainer: rates, scores against hand-worked ones, the best checkpoint, divergence, memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everlearn.evals.contestants import Size, choose, configuration, make
from everlearn.evals.fitting import IGNORED, Batch, PeakMemory, Recipe, cross_entropy, fit, parameters, score
from everlearn.evals.long_context import lesson
from everlearn.evals.suites import SUITES
from everlearn.models.registry import count_parameters

SIZE = Size(16, 1, 2, 16, {"chunk_size": 4}, (1, 64))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make(choose(["hope"], {})[0], SIZE, 5)


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(0, 5, (4, 8), generator=generator)
    return Batch(inputs, inputs)


def test_rates_by_hand():
    recipe = Recipe(10, lr=2.0, warmup=0.2, lr_end=0.2)
    assert [recipe.rate(step) for step in (0, 1)] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert recipe.rate(2) == pytest.approx(1.0)
    assert recipe.rate(6) == pytest.approx(0.1 + 0.9 * 0.5)
    assert recipe.rate(10) == pytest.approx(0.1)
    assert Recipe(10, lr=1.0, schedule="constant").rate(9) == 1.0
    stairs = Recipe(10, lr=1.0, every=5)
    assert [stairs.rate(step) for step in (0, 4)] == [1.0, 1.0]
    assert stairs.rate(5) == stairs.rate(9) == pytest.approx(0.5)


def test_scores_by_hand():
    targets = torch.tensor([[0, 1, IGNORED], [1, 1, 2]])
    said = torch.tensor([[0, 1, 2], [1, 0, 3]])
    logits = 10.0 * nn.functional.one_hot(said, 4)
    found = score(None, [Batch(said, targets)], lambda model, given: logits)
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.sequences == pytest.approx(1 / 2)
    # class 0: 1 of 1; class 1: 2 of 3; class 2: 0 of 1; class 3: only predicted, so 0
    assert found.macro == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits.view(-1, 4), targets.view(-1))))


def test_scores_do_not_depend_on_how_rows_are_batched(model):
    whole = batch()
    parts = [Batch(whole.inputs[i : i + 1], whole.targets[i : i + 1]) for i in range(4)]
    assert score(model, [whole]) == pytest.approx(score(model, parts))


def test_training_learns_and_counts(model):
    before = cross_entropy(model, batch()).item()
    told = []
    fitted = fit(model, batch, Recipe(30, 1e-2, checks=3), tell=told.append)
    assert (fitted.steps, fitted.tokens, fitted.score) == (30, 30 * 32, None)
    assert fitted.seconds > 0
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    assert fitted.loss < 0.7 * before
    assert not model.training


def test_the_best_checkpoint_is_kept_and_enough_ends_the_training(model):
    scores, states = iter([(0.5,), (0.9,), (0.1,)]), []

    def validate():
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    fitted = fit(model, batch, Recipe(6, 1e-2, checks=3), validate=validate)
    assert fitted.score == (0.9,)
    assert all(value.equal(states[1][name]) for name, value in model.state_dict().items())
    fitted = fit(model, batch, Recipe(6, 1e-2, checks=3), validate=lambda: (1.0,), enough=lambda s: s[0] == 1)
    assert fitted.steps == 2


def test_a_loss_that_is_not_finite_ends_the_run(model):
    fitted = fit(model, batch, Recipe(5, 1e-2), loss=lambda m, b: cross_entropy(m, b) * float("nan"))
    assert (fitted.loss, fitted.score, fitted.steps) == (None, None, 0)


def test_levels_step_on_their_clock(model):
    slow = model.level_parameters()["level2"][0]
    before = slow.detach().clone()
    fit(model, batch, Recipe(1, 1e-2))
    assert slow.equal(before)
    fit(model, batch, Recipe(2, 1e-2))
    assert not slow.equal(before)


@pytest.mark.parametrize("budget", ["tiny", "small", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in SUITES if name != "ablation"])
def test_every_contestant_of_every_suite_has_as_many_parameters(name, budget):
    suite, plan = SUITES[name], SUITES[name].budgets[budget]
    chosen = choose(None, suite.variants, left_out=suite.left_out)
    counts = {c.name: count_parameters(configuration(c, plan.size, 512, tied=False)) for c in chosen}
    assert {"hope", "hope-attention", "transformer", *suite.variants} <= counts.keys()
    assert all(abs(count - counts["hope"]) <= 0.03 * counts["hope"] for count in counts.values()), counts


def test_other_families_can_be_changed_too():
    size = Size(16, 1, 2, 16, {"chunk_size": 4}, others={"transformer": {"rope_theta": 500.0}})
    assert make(choose(["transformer"], {})[0], size, 8).config.rope_theta == 500.0
    assert parameters(make(choose(["hope"], {})[0], size, 8)) > 0


def test_variants_change_what_they_name():
    own = {"hope-slow": ("hope", {"cms_periods": [1, 512], "memory": {"momentum": 0.5}})}
    slow = choose(["hope_slow"], own)[0]
    config = make(slow, Size(16, 1, 2, 16, {"width": 4}), 8).config
    assert config.cms_periods == [1, 512]
    assert config.memory == {"width": 4, "momentum": 0.5}


def test_peaks_can_be_nested():
    outer = PeakMemory()
    block = torch.ones(8 << 20)
    high = outer.bytes()
    del block
    inner = PeakMemory()
    assert outer.bytes() > 0.9 * high  # the system's count is not exact
    assert inner.bytes() > 0


def test_a_batch_of_three_parts_is_passed_on_whole(model):
    seen = []

    def loss(made, given):
        seen.append(given)
        return cross_entropy(made, given)

    fit(model, lambda step: lesson([[([1, 2, 3], [4])]]), Recipe(1, 1e-3), loss=loss)
    assert seen[0].answer.tolist() == [[False, False, True]]
    assert seen[0].inputs.tolist() == [[1, 2, 3]]
