"""Measures of the diary against their naive twins: one prompt at a time, no padding, transformers' own generate."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_diary import NEUTRAL, QUESTIONS, write_model

from everlearn.errors import InvalidArgument
from everlearn.evals import diary_measures
from everlearn.evals.diary_measures import Reference, locality, log_likelihoods, replies, speeds, text_loss
from everlearn.learner.chat import chat_prompt
from everlearn.learner.sampling import encode
from everlearn.levels import Level
from everlearn.models.hub import load_model
from everlearn.models.stacking import memory_parameters, stack_levels

ASKED = [*NEUTRAL, *QUESTIONS["a"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def moved(base):
    """A stack on the base whose memories say something."""
    stacked = stack_levels(base[0], [Level("slow")])
    with torch.no_grad():
        for index, parameter in enumerate(memory_parameters(stacked).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return stacked


@pytest.mark.parametrize("which", ["base", "moved"])
def test_replies_are_those_of_generate(base, moved, which):
    model, tokenizer = (base[0] if which == "base" else moved), base[1]
    prompts = [chat_prompt(tokenizer, question) for question in [*ASKED, ASKED[0]]]
    naive = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt)[None]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        naive.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert replies(model, tokenizer, prompts) == naive
    assert replies(model, tokenizer, []) == []


def test_likelihoods_are_those_of_one_sequence_at_a_time(base, moved):
    tokenizer = base[1]
    prompts = [chat_prompt(tokenizer, question) for question in ASKED]
    answers = ["Zora", "Zora eat Bergen", "7391", "my cat Nils", "Oslo", "a"]
    naive = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head, spoken = encode(tokenizer, prompt), encode(tokenizer, answer)
        with torch.no_grad():
            logits = moved(torch.cat([head, spoken])[None]).logits[0].log_softmax(-1)
        naive.append(float(logits[len(head) - 1 : -1].gather(1, spoken[:, None]).mean()))
    torch.testing.assert_close(torch.tensor(log_likelihoods(moved, tokenizer, prompts, answers)), torch.tensor(naive))


def test_locality_is_exact_for_the_base_and_counts_every_position(base, moved):
    model, tokenizer = base
    prompts = [chat_prompt(tokenizer, question) for question in NEUTRAL]
    said = replies(model, tokenizer, prompts)
    same = locality(model, model, tokenizer, prompts, prompts, said)
    assert (same.top1, same.kl) == (1.0, 0.0)
    other = locality(moved, model, tokenizer, prompts, prompts, said)
    agreed, divergence, count = 0, 0.0, 0
    for prompt, text in zip(prompts, said, strict=True):
        head, spoken = encode(tokenizer, prompt), encode(tokenizer, text)
        ids = torch.cat([head, spoken])[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(head) - 1 :].log_softmax(-1) for m in (model, moved))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
        count += len(p)
    assert other.top1 == agreed / count
    assert other.kl == pytest.approx(divergence / count, rel=1e-4)
    assert other.kl > 0


def test_text_loss_reads_window_by_window(base, monkeypatch):
    monkeypatch.setattr(diary_measures, "WINDOW", 5)
    model, tokenizer = base
    text = "What is my name ? Hello there ! " * 3
    ids = encode(tokenizer, text)[:12]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="sum")
            for w in ids.split(5)
        ]
    assert text_loss(model, tokenizer, text, 12) == pytest.approx(float(sum(losses)) / 9, rel=1e-5)
    with pytest.raises(InvalidArgument, match="text: got 1 tokens"):
        text_loss(model, tokenizer, "What", 12)


def test_speeds_are_positive(base, monkeypatch):
    monkeypatch.setattr(diary_measures, "SPEED_TOKENS", 2)
    model, tokenizer = base
    made = speeds(tokenizer, [(model, chat_prompt(tokenizer, NEUTRAL[0]))] * 2)
    assert all(0 < speed < math.inf for speed in made)


def test_the_reference_computes_once_and_is_kept(base, tmp_path, monkeypatch):
    model, tokenizer = base
    first = Reference(model, tokenizer, tmp_path / "base.json")
    said = first.replies(NEUTRAL)
    likely = first.log_likelihoods(QUESTIONS["a"], ["Zora"] * 3)
    loss = first.text_loss("What is my name ?", 5)
    assert likely == log_likelihoods(model, tokenizer, first.prompts(QUESTIONS["a"]), ["Zora"] * 3)

    def fail(*args):
        raise AssertionError("computed again")

    for name in ("replies", "log_likelihoods", "text_loss"):
        monkeypatch.setattr(diary_measures, name, fail)
    again = Reference(model, tokenizer, tmp_path / "base.json")
    assert again.replies(NEUTRAL[::-1]) == said[::-1]
    assert again.log_likelihoods(QUESTIONS["a"][:1], ["Zora"]) == likely[:1]
    assert again.text_loss("What is my name ?", 5) == loss
