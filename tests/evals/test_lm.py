"""Language modelling: likelihoods against naive ones, perplexities by hand, runs of lm and ablation."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_sources import make_sources
from torch.nn import functional as F

from everlearn.errors import InvalidArgument
from everlearn.evals import ablation, lm
from everlearn.evals.contestants import Size, choose, configuration, make
from everlearn.evals.language import books_tokens, tokenizer
from everlearn.evals.lm import BUDGETS, LM, log_likelihoods, negative_log_likelihood
from everlearn.evals.sources import Sources
from everlearn.evals.suite import run_suite

SIZE = Size(16, 1, 2, 16, {"chunk_size": 4}, (1, 64))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make(choose(["hope"], {})[0], SIZE, 20).eval()


@torch.no_grad()
def naive(model, ids):
    """Log-probability of each token after the first."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [float(F.log_softmax(logits[i], -1)[ids[i + 1]]) for i in range(len(ids) - 1)]


def test_windows_count_every_token_once(model):
    ids = torch.randint(0, 20, (23,))
    whole = [ids[0].item(), *ids.tolist()]
    windows = [whole[i : i + 9] for i in range(0, 23, 8)]
    wanted = -sum(sum(naive(model, window)) for window in windows)
    assert negative_log_likelihood(model, ids, 8) == pytest.approx(wanted, rel=1e-5)
    assert negative_log_likelihood(model, ids, 8, rows=1) == pytest.approx(wanted, rel=1e-5)
    assert negative_log_likelihood(model, ids, 100) == pytest.approx(-sum(naive(model, whole)), rel=1e-5)


def test_likelihoods_equal_naive_ones(model):
    pairs = [([1, 2, 3], [4, 5]), ([], [6, 7, 8]), ([9] * 10, [1])]
    found = log_likelihoods(model, pairs, start=0, rows=2)
    for (context, said), (value, greedy) in zip(pairs, found):
        assert value == pytest.approx(sum(naive(model, [0, *context, *said])[len(context) :]), rel=1e-4)
        logits = model(input_ids=torch.tensor([[0, *context, *said]])).logits[0].argmax(-1)
        assert greedy == (logits[len(context) : -1].tolist() == said)
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([[0, 1]])).logits[0, -1].argmax())
    assert log_likelihoods(model, [([1], [best])], start=0)[0][1] is True


class Uniform(torch.nn.Module):
    """Every token is as likely as any other."""

    def forward(self, input_ids, use_cache):
        return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 300)})


def test_measures_of_a_model_that_knows_nothing(data):
    sources = Sources.at(data)
    made = tokenizer(sources, 300)
    assert len(made) == 300
    measured = lm._Measured(Uniform(), made, BUDGETS["tiny"])
    books = {m.metric: m.value for m in lm._books(measured, sources)}
    assert books["perplexity"] == pytest.approx(300, rel=1e-4)
    ids = books_tokens(sources, "test", made)[:200]
    size = len(made.decode(ids, skip_special_tokens=True).encode())
    assert books["bits_per_byte"] == pytest.approx(200 * math.log2(300) / size, rel=1e-4)
    text = sources.wikitext()
    tokens = len(made(text)["input_ids"])
    whole = lm._Measured(Uniform(), made, BUDGETS["paper"])
    words = len(text.split()) + text.count("\n")
    wikitext = {m.metric: m.value for m in lm._wikitext2(whole, sources)}
    assert wikitext["word_perplexity"] == pytest.approx(300 ** (tokens / words), rel=1e-3)
    lambada = {m.metric: m.value for m in lm._lambada(measured, sources)}
    pieces = [len(made(f" {word}")["input_ids"]) for word in ("house", "river", "bridge")]
    assert lambada["perplexity"] == pytest.approx(300 ** (sum(pieces) / 3), rel=1e-3)
    assert lambada["accuracy"] == 0.0


def test_pairs_are_judged_by_their_sum(data, monkeypatch):
    made = tokenizer(Sources.at(data), 300)
    monkeypatch.setattr(
        lm,
        "log_likelihoods",
        lambda model, rows, start: [(-1.0, False), (-2.0, False)] * 1 + [(-3.0, True), (-2.5, True)],
    )
    found = lm._blimp(lm._Measured(None, made, BUDGETS["tiny"]), Sources.at(data))
    assert [(m.metric, m.value) for m in found] == [("accuracy", 0.5)]


def test_some_items_are_spread_over_all():
    measured = lm._Measured(None, None, BUDGETS["tiny"])
    assert measured.some(list(range(10))) == [0, 2, 5, 7]
    assert measured.some([1, 2]) == [1, 2]


def test_a_run_measures_everything(data, tmp_path):
    found = run_suite(LM, tmp_path / "r.json", models=["transformer"], seeds=1, budget="tiny", data=data)
    assert [(row["task"], row["metric"]) for row in found["rows"]] == [
        ("books", "perplexity"), ("books", "bits_per_byte"), ("wikitext2", "word_perplexity"),
        ("wikitext2", "bits_per_byte"), ("lambada", "perplexity"), ("lambada", "accuracy"), ("blimp", "accuracy"),
        ("lm", "validation"),
    ]  # fmt: skip
    assert found["rows"][0]["tokens"] == 2 * 2 * 32


def test_too_little_text_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "books_tokens", lambda *given: torch.zeros(10, dtype=torch.long))
    with pytest.raises(InvalidArgument, match="data: got 10 tokens of training books, expected more than 32"):
        run_suite(LM, tmp_path / "r.json", models=["transformer"], seeds=1, budget="tiny", data=data)
    assert not (tmp_path / "r.json").exists()


def test_a_run_that_diverges_has_no_values(data, tmp_path, monkeypatch):
    original = lm.fit
    monkeypatch.setattr(lm, "fit", lambda *given, **named: original(*given, **named)._replace(loss=None))
    found = run_suite(LM, tmp_path / "r.json", models=["transformer"], seeds=1, budget="tiny", data=data)
    assert len(found["rows"]) == 8
    assert {row["value"] for row in found["rows"]} == {None}


def test_every_row_of_the_ablation_lacks_one_part():
    size = ablation.BUDGETS["small"].size
    rows = {c.name: configuration(c, size, 300) for c in choose(None, ablation.ROWS, only_variants=True)}
    assert list(rows) == ["full", "-dgd", "-momentum", "-decay", "-cms", "-k", "-v", "-q", "-gate"]
    full = rows["full"].memory_config()
    assert (set(full.adaptive), full.rule, full.decay) == ({"q", "k", "v", "eta", "alpha"}, "dgd", True)
    assert full.momentum > 0
    assert len(rows["full"].cms_periods) > 1
    memories = {name: vars(config.memory_config()) for name, config in rows.items()}
    changed = {
        name: {key for key, value in memory.items() if value != memories["full"][key]}
        for name, memory in memories.items()
    }
    assert changed == {
        "full": set(), "-dgd": {"rule"}, "-momentum": {"momentum"}, "-decay": {"decay"}, "-cms": set(),
        "-k": {"adaptive"}, "-v": {"adaptive"}, "-q": {"adaptive"}, "-gate": {"output_gate"},
    }  # fmt: skip
    assert rows["-cms"].cms_periods == [1]
    for role in "kvq":
        assert set(full.adaptive) - set(memories[f"-{role}"]["adaptive"]) == {role}


def test_an_ablation_measures_books_only(data, tmp_path):
    found = run_suite(ablation.ABLATION, tmp_path / "r.json", models=["-cms"], seeds=1, budget="tiny", data=data)
    assert [(row["task"], row["metric"]) for row in found["rows"]] == [
        ("books", "perplexity"),
        ("books", "bits_per_byte"),
        ("lm", "validation"),
    ]
    with pytest.raises(InvalidArgument, match=r"models: got \['hope'\], expected some of full"):
        run_suite(ablation.ABLATION, tmp_path / "r.json", models=["hope"], budget="tiny", data=data)
