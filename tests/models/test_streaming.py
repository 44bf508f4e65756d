"""Streaming clocks: due levels step exactly when due, on the gradient of their tokens, however the stream is cut."""

from __future__ import annotations

import io

import pytest
import torch
from tiny_families import FAMILIES, VOCAB, tiny
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.levels import Level
from everlearn.models.stacking import memory_parameters, memory_state, restore, snapshot, stack_levels
from everlearn.models.streaming import Stream


def sgd(rate: float = 0.5):
    return lambda params: torch.optim.SGD(params, lr=rate)


LEVELS = [Level("fast", 4, optimizer=sgd()), Level("mid", 8, optimizer=sgd(0.2)), Level("slow")]


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, count), generator=torch.Generator().manual_seed(3))


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def only(state, *levels):
    return {key: value for key, value in state.items() if key.split(".")[1] in levels}


def naive(model, ids, levels, context):
    """The definition: each token predicted from those before it, the loss summed until a level is due, then one step.

    The memory sits in the last layer, so what earlier tokens left in the cache does not depend on it.
    """
    sums, counts, begin = {}, {level.name: 0 for level in levels}, 0
    for t in range(1, ids.shape[1] + 1):
        level_params = {level.name: memory_parameters(model, level.name) for level in levels}
        if t >= 2:
            if (t - 1) % 4 == 0 or t == 2:  # a new pass begins; would its tokens still fit?
                size = min(4 - (t - 1) % 4, 3 if t == 2 else 4)
                begin = begin if (t - 2) - begin + size <= context else t - 2
            logits = model(input_ids=ids[:, begin : t - 1]).logits[:, -1]
            loss = F.cross_entropy(logits, ids[:, t - 1], reduction="sum")
            for level in levels:
                params = level_params[level.name]
                grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
                for key, grad in zip(params, grads):
                    sums[key] = sums.get(key, 0) + grad
                counts[level.name] += len(ids)
        for level in levels:
            if t % level.every == 0:
                with torch.no_grad():
                    for key, parameter in level_params[level.name].items():
                        rate = {"fast": 0.5, "mid": 0.2}[level.name]
                        parameter -= rate * sums.pop(key) / counts[level.name]
                counts[level.name] = 0


@pytest.mark.parametrize("context", [64, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_naive_loop(context, batch):
    ids = tokens(18, batch)
    model = tiny().double()
    options = {"layers": [-1], "width": 4}
    ours, theirs = (stack_levels(model, LEVELS, **options).double() for _ in range(2))
    start = snapshot(ours)
    steps = Stream(ours, context=context).feed(ids)
    naive(theirs, ids, LEVELS[:2], context)
    one, two = memory_state(ours), memory_state(theirs)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-9, atol=1e-12)
    assert not torch.equal(one["3.fast.W1"], start["3.fast.W1"])
    assert not torch.equal(one["3.mid.W2"], start["3.mid.W2"])
    assert [(step.tokens, step.levels) for step in steps] == [
        (4, ("fast",)),
        (8, ("fast", "mid")),
        (12, ("fast",)),
        (16, ("fast", "mid")),
    ]


def test_levels_step_exactly_when_due_and_others_stay_bit_identical():
    stacked = stack_levels(tiny(), LEVELS)
    stream, before = Stream(stacked), snapshot(stacked)
    for count, token in enumerate(tokens(24)[0].tolist(), start=1):
        stream.feed([token])
        now = snapshot(stacked)
        assert same(only(now, "fast"), only(before, "fast")) == (count % 4 != 0)
        assert same(only(now, "mid"), only(before, "mid")) == (count % 8 != 0)
        assert same(only(now, "slow"), only(before, "slow"))
        before = now


def test_gradient_reaches_due_levels_only():
    reached = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            reached.append({name for name, p in stacked.named_parameters() if p.grad is not None})
            return super().step(closure)

    levels = [Level("a", 3, optimizer=lambda p: Spy(p, lr=0.1)), Level("b", 100), Level("c")]
    stacked = stack_levels(tiny(), levels)
    Stream(stacked).feed(tokens(6))
    names = {id(p): name for name, p in stacked.named_parameters()}
    due = {names[id(p)] for p in memory_parameters(stacked, "a").values()}
    assert reached == [due, due]
    assert all(p.grad is None for p in stacked.parameters())


@pytest.mark.parametrize("wiring", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("init", ["residual", "pretrained"])
def test_updates_do_not_depend_on_the_cuts(init, wiring):
    ids, ends = tokens(30), []
    for cuts in ([30], [1] * 30, [3, 10, 0, 4, 13]):
        stacked = stack_levels(tiny(), LEVELS, init=init, wiring=wiring, layers=[1, 2, 3])
        stream, at, steps = Stream(stacked, chunk_size=5, context=16), 0, []
        for size in cuts:
            steps += stream.feed(ids[:, at : at + size])
            at += size
        ends.append((snapshot(stacked), steps))
    assert all(same(ends[0][0], state) and ends[0][1] == steps for state, steps in ends[1:])
    assert not same(ends[0][0], memory_state(stack_levels(tiny(), LEVELS, init=init, wiring=wiring, layers=[1, 2, 3])))


@pytest.mark.parametrize("init", ["residual", "pretrained"])
@pytest.mark.parametrize("wiring", ["sequential", "nested", "independent"])
def test_rate_zero_reproduces_the_base(init, wiring):
    model = tiny()
    levels = [Level("fast", 2, optimizer=sgd(0.0)), Level("mid", 4, optimizer=sgd(0.0))]
    stacked = stack_levels(model, levels, init=init, wiring=wiring)
    assert len(Stream(stacked).feed(tokens(12))) == 6
    ids = tokens(9, batch=2)
    with torch.no_grad():
        assert torch.equal(stacked(input_ids=ids).logits, model(input_ids=ids).logits)


def test_learning_lowers_the_loss_and_leaves_the_base_alone():
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stacked = stack_levels(model, [Level("a", 8, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))])
    steps = Stream(stacked).feed(tokens(8).repeat(1, 40))
    assert steps[-1].loss < 0.7 * steps[1].loss
    assert same(before, model.state_dict())


PLAIN = [name for name in torch.optim.__all__ if name not in ("Optimizer", "LBFGS", "SparseAdam", "lr_scheduler")]


@pytest.mark.parametrize("name", [name for name in PLAIN if isinstance(getattr(torch.optim, name), type)])
def test_any_torch_optimiser_can_be_a_levels_own(name):
    """It moves its level, all of it and only it, and takes itself as many steps as the level was due."""
    made = []

    def optimizer(params):
        made.append(getattr(torch.optim, name)(params, lr=0.01))
        made[-1].register_step_post_hook(lambda *_: steps.append(1))
        return made[-1]

    steps = []
    stacked = stack_levels(tiny(), [Level("own", 4, optimizer=optimizer), Level("other", 100), Level("slow")])
    stream, before = Stream(stacked), snapshot(stacked)
    stream.feed(tokens(9))
    now = memory_state(stacked)
    assert (len(made), len(steps)) == (1, 2)
    assert {key.split(".")[1] for key in now if not torch.equal(now[key], before[key])} == {"own"}
    assert not any(torch.equal(now[key], before[key]) for key in only(now, "own"))


def test_an_optimiser_that_asks_for_its_loss_again_is_refused():
    stacked = stack_levels(tiny(), [Level("a", 4, optimizer=torch.optim.LBFGS)])
    with pytest.raises(InvalidArgument, match="optimizer: got LBFGS for level 'a'"):
        Stream(stacked)


def test_nested_resets_a_level_when_its_parents_period_ends():
    stacked = stack_levels(tiny(), LEVELS, wiring="nested")
    stream, start = Stream(stacked), snapshot(stacked)
    stream.feed(tokens(4))
    assert not same(only(memory_state(stacked), "fast"), only(start, "fast"))
    stream.feed(tokens(4))
    assert same(only(memory_state(stacked), "fast"), only(start, "fast"))
    assert not same(only(memory_state(stacked), "mid"), only(start, "mid"))
    assert not stream.state_dict()["optimizers"]["fast"]["state"]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_resume_in_every_family(family):
    levels = [Level("fast", 4), Level("mid", 6, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))]
    ids = tokens(40)
    stacked = stack_levels(tiny(family), levels)
    stream = Stream(stacked, context=16)
    stream.feed(ids[:, :17])
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    memory = snapshot(stacked)
    rest = stream.feed(ids[:, 17:])
    file.seek(0)
    again = stack_levels(tiny(family), levels)
    restore(again, memory)
    resumed = Stream(again, context=16)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.feed(ids[:, 17:]) == rest
    assert same(memory_state(again), memory_state(stacked))


def test_ending_a_context_forgets_the_past():
    first, second = tokens(4), tokens(8)[:, 4:]
    stacked = stack_levels(tiny(), [Level("a", 4, optimizer=sgd())])
    stream = Stream(stacked)
    stream.feed(first)
    memory = snapshot(stacked)
    with_past = stream.feed(second)[0].loss
    ends = []
    for before in (first, first % 7 + 1, None):
        restore(stacked, memory)
        stream = Stream(stacked)
        if before is not None:
            stream.feed(before)
            stream.end_context()
            restore(stacked, memory)
        ends.append((stream.feed(second)[0].loss, snapshot(stacked)))
    assert ends[0][0] == ends[1][0] == ends[2][0] != with_past
    assert same(ends[0][1], ends[1][1])
    assert same(ends[0][1], ends[2][1])


def test_ending_a_context_learns_what_waits():
    ends = []
    for waiting in (tokens(3), tokens(3).flip(1)):
        stacked = stack_levels(tiny(), LEVELS)
        stream = Stream(stacked)
        stream.feed(waiting)
        stream.end_context()
        assert stream.clock.tokens == 3
        assert [step.tokens for step in stream.feed(tokens(1))] == [4]
        ends.append(snapshot(stacked))
    assert not same(*ends)


def test_errors():
    stacked = stack_levels(tiny(), LEVELS)
    with pytest.raises(InvalidArgument, match="period"):
        Stream(stack_levels(tiny(), [Level("slow")]))
    with pytest.raises(InvalidArgument, match="stack_levels"):
        Stream(tiny())
    with pytest.raises(InvalidArgument, match="context"):
        Stream(stacked, context=1000)
    with pytest.raises(InvalidArgument, match="chunk_size"):
        Stream(stacked, chunk_size=0)
    stream = Stream(stacked)
    stream.feed(tokens(3))
    for bad in (tokens(3, batch=2), torch.zeros(1, 1, 1)):
        with pytest.raises(InvalidArgument, match="tokens"):
            stream.feed(bad)
