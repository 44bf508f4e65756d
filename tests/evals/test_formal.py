"""The formal languages' suite: batches, what the checkpoint is chosen by, and a run at the tiny budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from everlearn.evals import formal
from everlearn.evals.contestants import choose, configuration
from everlearn.evals.fitting import IGNORED
from everlearn.evals.formal import BINS, BUDGETS, FORMAL, batches, held_out, pad
from everlearn.evals.formal_languages import LANGUAGES
from everlearn.evals.suite import Job
from everlearn.models.registry import count_parameters

PLAN = BUDGETS["tiny"]
SAMPLES = [(tuple([i % 2] * (1 + i)), tuple([1] * (1 + i))) for i in range(10)]


def job(task="parity", model="hope", seed=0):
    return Job(task, "", choose([model], {})[0], seed, (("lr", 3e-3), ("memory", "network")))


def test_padding_is_not_scored():
    made = pad([((1, 1), (0, 1)), ((0,), (1,))])
    assert made.inputs.tolist() == [[1, 1], [0, 0]]
    assert made.targets.tolist() == [[0, 1], [1, IGNORED]]


def test_an_epoch_has_every_string_once_in_batches_of_like_length():
    made = list(itertools.islice(batches(SAMPLES, 2, 5, seed=0), 5))
    lengths = sorted(int((row != IGNORED).sum()) for batch in made for row in batch.targets)
    assert lengths == list(range(1, 11))
    assert all(int((batch.targets == IGNORED).sum()) == 1 for batch in made)
    again = list(itertools.islice(batches(SAMPLES, 2, 5, seed=0), 5))
    other = list(itertools.islice(batches(SAMPLES, 2, 5, seed=1), 5))
    assert [b.inputs.shape for b in made] == [b.inputs.shape for b in again]
    assert [b.inputs.shape for b in made] != [b.inputs.shape for b in other]


@pytest.mark.parametrize("memory", formal.MEMORIES)
@pytest.mark.parametrize("budget", ["tiny", "small", "counting"])
def test_every_memory_of_hope_makes_a_model_of_equal_size(memory, budget):
    size = BUDGETS[budget].size
    hope, other = choose(["hope", "transformer"], {})
    config = configuration(hope, size, 4, tied=False, memory=formal.MEMORIES[memory])
    assert config.memory_config().structure == ("matrix" if memory == "counter" else "mlp")
    target = count_parameters(size.hope(4, tied=False))
    assert abs(count_parameters(config) - target) <= 0.03 * target
    like = configuration(other, size, 4, tied=False, memory=formal.MEMORIES[memory])
    assert like.to_dict() == configuration(other, size, 4, tied=False).to_dict()


def test_bins_are_longer_and_longer():
    found = held_out(LANGUAGES["counter-2"], PLAN)
    lengths = [[int((row != IGNORED).sum()) for batch in part for row in batch.targets] for part in found]
    assert [(min(x), max(x)) for x in lengths] == [(6, 16), (20, 32), (36, 48)]


def test_the_checkpoint_is_chosen_on_bin0_only(monkeypatch):
    asked = []
    original = formal.score

    def score(model, part):
        asked.append(max(batch.inputs.shape[1] for batch in part))
        return original(model, part)

    monkeypatch.setattr(formal, "score", score)
    formal.run(job(), PLAN, None, lambda what, share: None)
    during, after = asked[:-3], asked[-3:]
    assert max(during) <= PLAN.hi < after[1] < after[2]


def test_a_run_measures_every_bin():
    outcome = formal.run(job("counter-3", "transformer"), PLAN, None, lambda what, share: None)
    assert {(m.setting, m.metric) for m in outcome.measures} == set(itertools.product(BINS, ("sequences", "accuracy")))
    assert all(0 <= m.value <= 1 for m in outcome.measures)
    assert (outcome.steps, outcome.parameters > 0) == (3, True)
    again = formal.run(job("counter-3", "transformer"), PLAN, None, lambda what, share: None)
    assert outcome.measures[0].value == again.measures[0].value or outcome.validation is not None


def test_a_string_is_right_only_if_every_label_is():
    language, plan = LANGUAGES["parity"], PLAN
    part = held_out(language, plan)[0]

    class Oracle(nn.Module):
        """Counts ones, but takes the last letter for a zero."""

        def forward(self, input_ids, use_cache):
            even = 1 - input_ids.cumsum(1) % 2
            return type("Out", (), {"logits": nn.functional.one_hot(even, 2).float()})

    assert formal.score(Oracle(), part).sequences == 1.0

    class Wrong(Oracle):
        def forward(self, input_ids, use_cache):
            out = super().forward(input_ids, use_cache)
            out.logits[:, 0] = out.logits[:, 0].flip(-1)
            return out

    found = formal.score(Wrong(), part)
    assert found.sequences == 0.0
    assert found.accuracy > 0.5


@pytest.mark.slow
def test_hope_learns_parity_for_good_and_attention_does_not():
    plan = formal.BUDGETS["small"]
    found = {}
    for model in ("hope", "transformer"):
        torch.manual_seed(0)
        one = Job("parity", "", choose([model], {})[0], 0, (("lr", 1e-2), ("memory", "network")))
        outcome = formal.run(one, plan, None, lambda what, share: None)
        found[model] = {m.setting: m.value for m in outcome.measures if m.metric == "sequences"}
    assert found["hope"] == {"bin0": 1.0, "bin1": 1.0, "bin2": 1.0}
    assert found["transformer"]["bin1"] < 0.1
    assert FORMAL.tasks[0] == "parity"
