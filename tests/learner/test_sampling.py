"""Batched sampling behind a shared prompt is what each text would give alone."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.errors import InvalidArgument
from everlearn.learner.sampling import Prompt, choose, common_start, encode, pad_left
from everlearn.models.hub import load_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load_model(str(tiny_learner.make_model(tmp_path_factory.mktemp("model"))))


TAILS = ["Where", "What is your name? The", "I live in a small", "The parrot sings in"]


def alone(model, tokenizer, text: str, tokens: int) -> str:
    """Greedy, token by token, without a cache."""
    ids, made = encode(tokenizer, text)[None], []
    for _ in range(tokens):
        new = model(input_ids=ids).logits[0, -1].argmax()
        if int(new) in tokenizer.all_special_ids:
            break
        made.append(int(new))
        ids = torch.cat([ids, new[None, None]], dim=1)
    return tokenizer.decode(made).strip()


def test_greedy_batch_is_what_each_gives_alone(pair):
    model, tokenizer = pair
    head = "I have a parrot."
    got = Prompt(model, tokenizer, head).sample(
        TAILS, max_new_tokens=12, generator=torch.Generator(), temperature=0, stop=None
    )
    with torch.no_grad():
        assert got == [alone(model, tokenizer, head + tail, 12) for tail in TAILS]


def test_a_line_that_ends_early_does_not_disturb_the_others(pair):
    model, tokenizer = pair
    prompt = Prompt(model, tokenizer, "I have a parrot.")
    options = {"max_new_tokens": 10, "temperature": 0, "generator": torch.Generator()}
    whole = prompt.sample(TAILS, stop=None, **options)
    stop = next(text for text in whole if text)[0]
    cut = prompt.sample(TAILS, stop=stop, **options)
    assert cut != whole
    assert [text.split(stop)[0].strip() for text in whole] == cut


def test_sampling_follows_the_generator(pair):
    prompt = Prompt(*pair, "I have a parrot.")

    def draw(seed: int) -> list[str]:
        return prompt.sample(TAILS, max_new_tokens=8, generator=torch.Generator().manual_seed(seed), temperature=1.0)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_log_likelihood_is_that_of_the_whole_text(pair):
    model, tokenizer = pair
    targets = [" by the sea", " name", " house and it sings", " the"]
    got = Prompt(model, tokenizer, "I have a parrot.").log_likelihood(TAILS, targets)
    for tail, target, scores in zip(TAILS, targets, got, strict=True):
        before = torch.cat([encode(tokenizer, "I have a parrot."), encode(tokenizer, tail)])
        want = encode(tokenizer, target)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([before, want])[None]).logits[0].log_softmax(-1)
        expected = logits[len(before) - 1 : -1].gather(1, want[:, None])[:, 0]
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)


def test_nucleus_keeps_the_likeliest_only():
    logits = torch.tensor([[4.0, 1.0, 0.0, -1.0]]).repeat(200, 1)
    chosen = choose(logits, torch.Generator().manual_seed(0), 1.0, 0.9)
    assert set(chosen.tolist()) == {0}
    wide = choose(logits, torch.Generator().manual_seed(0), 3.0, 0.99)
    assert len(set(wide.tolist())) > 2


def test_small_parts(pair):
    rows = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 5])]
    assert common_start(rows) == 2
    assert common_start([rows[0]]) == 3
    ids, mask = pad_left(rows, 9)
    assert ids.tolist() == [[1, 2, 3, 4], [9, 1, 2, 5]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    with pytest.raises(InvalidArgument, match="empty"):
        Prompt(*pair, "")
