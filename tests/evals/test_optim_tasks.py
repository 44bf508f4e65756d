"""The problems of the optimiser comparison: what their constructions promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.evals.optim import CONTENDERS, Contender, train
from everlearn.evals.optim_tasks import ByteLM, Digits, OrthogonalTasks, OscillatingSurface
from everlearn.optim import create


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    (folder / "b.txt").write_text("pack my box with five dozen liquor jugs. " * 300)
    return folder


def test_surface_curvature_oscillates_along_the_valley():
    height, x = OscillatingSurface.height, torch.arange(-4, 1, 0.01)
    curvature = 2 * (height(x, torch.tensor(1.0)) - height(x, torch.tensor(0.0)))  # quadratic in y
    assert curvature.min() > 0.3
    assert curvature.max() > 7
    turns = curvature.diff().sign().diff().count_nonzero()
    assert turns >= 4
    assert height(torch.tensor(0.0), torch.tensor(0.0)) == 0


def test_tasks_of_the_orthogonal_construction_do_not_share_gradients():
    problem = OrthogonalTasks(seed=0, steps=10)
    first, second = problem.bases
    torch.testing.assert_close(first.mT @ second, torch.zeros(16, 16), rtol=0, atol=1e-5)
    gradients = []
    for step in (0, 5):
        (gradient,) = torch.autograd.grad(problem.loss(step), problem.model.parameters())
        gradients.append(gradient)
    assert gradients[0].norm() > 0.1
    assert (gradients[0] @ gradients[1].mT).abs().max() < 1e-4


def test_loss_of_the_orthogonal_tasks_follows_each_in_its_turn():
    problem = OrthogonalTasks(seed=0, steps=4)
    weight, targets = problem.linear.weight, problem.targets
    problem.loss(0)
    start = problem.measure()["loss"]
    with torch.no_grad():
        weight.copy_(targets[0])
    assert problem.measure()["loss"] == pytest.approx(problem.error(1))
    problem.loss(2)
    with torch.no_grad():
        weight.copy_(targets[1])
    assert problem.measure()["loss"] == pytest.approx(0.0, abs=1e-6)  # the first task was learned in its turn
    assert problem.error(0) > 1
    assert start > 2


def test_plain_gradient_descent_destroys_nothing_and_a_crossing_optimiser_does():
    plain = train(lambda: OrthogonalTasks(0, 200), Contender("sgd", 0.03), 0.03, 200, points=2)
    assert abs(plain["metrics"]["destroyed"]) < 1e-4
    assert plain["metrics"]["first_task_learned"] < 2
    adam = train(lambda: OrthogonalTasks(0, 200), CONTENDERS["adamw"], 0.03, 200, points=2)
    assert abs(adam["metrics"]["destroyed"]) > 1e-3  # moves element by element, out of the subspace


def test_digits_are_learned():
    outcome = train(lambda: Digits(0, 60), CONTENDERS["adamw"], 0.01, 60, points=3)
    assert outcome["metrics"]["accuracy"] > 0.75
    assert [point[0] for point in outcome["curve"]] == [0, 20, 40, 60]
    assert outcome["curve"][0][2] == pytest.approx(math.log(10), abs=0.2)
    assert outcome["parameters"] == 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10


def test_every_optimiser_sees_the_same_start_and_batches():
    losses = []
    for _ in range(2):
        problem = Digits(3, 10)
        torch.rand(5)  # what an optimiser may draw in between
        losses.append([problem.loss(step).item() for step in range(3)])
    assert losses[0] == losses[1]
    assert Digits(4, 10).loss(0).item() != losses[0][0]


def test_language_model_learns(text_folder):
    outcome = train(lambda: ByteLM(0, 16, text_folder), CONTENDERS["adamw"], 0.01, 16, points=1)
    assert outcome["metrics"]["loss"] < 0.7 * math.log(256)
    assert outcome["metrics"]["bits_per_byte"] == pytest.approx(outcome["metrics"]["loss"] / math.log(2))
    assert outcome["tokens"] == 16 * 4 * 128


def test_language_models_of_all_families_have_one_size(text_folder):
    hope, transformer = (ByteLM(0, 1, text_folder, family) for family in ("hope", "transformer"))
    sizes = [sum(p.numel() for p in problem.model.parameters()) for problem in (hope, transformer)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)
    assert sizes[0] == pytest.approx(0.14e6, rel=0.1)
    optimizer = create("dgd", hope.model)
    hope.loss(0).backward()
    optimizer.step()  # its fused layers and stacks of memories are no hindrance


def test_language_task_holds_out_the_end_of_every_text_of_the_books(text_folder):
    (text_folder / "books").mkdir()
    for name in "xy":
        (text_folder / "books" / f"{name}.txt").write_text(name * 18_000 + name.upper() * 1_000 + name * 1_000)
    problem = ByteLM(0, 1, text_folder)
    assert set(bytes(problem.train.tolist())) == set(b"xy\n")
    assert b"X" in bytes(problem.validation.flatten().tolist())
    assert set(bytes(problem.test.flatten().tolist())) == set(b"xy\n")
    assert len(problem.validation) == len(problem.test) == 2000 // 128


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="data"):
        ByteLM(0, 1, tmp_path)
    (tmp_path / "short.txt").write_text("too short " * 20)
    with pytest.raises(InvalidArgument, match="at least 20,000"):
        ByteLM(0, 1, tmp_path)
