"""What a gist is read with: how common words are, with the chat template around them, and where they lie."""

from __future__ import annotations

import functools
import json

import pytest
import tiny_learner
import torch
from tiny_families import tiny
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from everlearn.learner.metric import whitener
from everlearn.learner.sampling import encode
from everlearn.learner.words import RARE, RIDGE, learn_words, read_gists
from everlearn.memories.carried import embedded
from everlearn.memories.gist import MARK, Gist
from everlearn.models.hub import load_model

TEXTS = ["I have a parrot.", "I live by the sea.", "The parrot sings.", "I sing."]


@pytest.fixture
def parts(tmp_path):
    return load_model(str(tiny_learner.make_model(tmp_path)))


def test_words_weigh_by_how_few_texts_have_them_and_those_of_the_template_hardly(parts):
    model, tokenizer = parts
    weights = learn_words(model, tokenizer, TEXTS)["weights"]
    assert len(weights) == len(tokenizer)
    (parrot,) = encode(tokenizer, " parrot").tolist()
    assert weights[parrot] == pytest.approx(RARE / (RARE + 2.5 / 4))
    prompts = [set(encode(tokenizer, f"user: {text}<end>assistant: ").tolist()) for text in TEXTS]
    around, never = set.intersection(*prompts), set(range(len(weights))) - set.union(*prompts)
    ends = tokenizer.eos_token_id
    assert len(around) > 2
    assert all(weights[token] == pytest.approx(RARE / (RARE + 4.5 / 4)) for token in around - {ends})
    assert all(weights[token] == pytest.approx(RARE / (RARE + 0.5 / 4)) for token in never)
    assert weights[ends] == MARK


def test_words_are_centred_and_whitened_as_they_occur(parts):
    model, tokenizer = parts
    made = learn_words(model, tokenizer, TEXTS)
    words = model.get_input_embeddings().weight.detach()[torch.cat([encode(tokenizer, text) for text in TEXTS])]
    torch.testing.assert_close(made["center"], words.mean(0))
    torch.testing.assert_close(made["whitener"], whitener(torch.cov(words.T), RIDGE))


def test_the_question_counts_and_not_what_the_template_puts_around_it(parts):
    model, tokenizer = parts
    gist = Gist(model.config.hidden_size)
    gist.fill(learn_words(model, tokenizer, TEXTS * 30))
    assert gist.behind == 1
    asked = gist.asked(
        encode(tokenizer, "user: hello<end>assistant: Where?<end>user: Where is Otto?<end>assistant: Hm")
    )
    assert tokenizer.decode(asked) == "user: Where is Otto?"
    (alone,), (within,) = (
        read_gists(model, tokenizer, gist, ["Where is Otto?"]),
        gist([asked], functools.partial(embedded, model)),
    )
    assert alone @ within > 0.99
    assert alone.norm() == pytest.approx(1.0)
    assert read_gists(model, tokenizer, gist, []).shape == (0, model.config.hidden_size)


def test_every_special_token_ends_a_part_but_one_for_what_is_unknown(parts):
    """Llama 3's tokens around a turn are special, though none of the tokenizer's named ones."""
    model, tokenizer = parts
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<word>"), AddedToken("<?>", special=True)])
    tokenizer.unk_token = "<?>"
    model.resize_token_embeddings(len(tokenizer))
    (turn,) = encode(tokenizer, "<turn>").tolist()
    tokenizer.chat_template = "{{ messages[0]['content'] }}<turn>header<turn>"
    learned = learn_words(model, tokenizer, TEXTS)
    assert (learned["weights"] == MARK).nonzero()[:, 0].tolist() == sorted({turn, tokenizer.eos_token_id})
    assert learned["behind"] == 2


def test_a_tokenizer_without_special_tokens_has_one_part(parts):
    model, tokenizer = parts
    bare = json.loads(tokenizer.backend_tokenizer.to_str())
    bare["added_tokens"] = []
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(bare)))
    learned = learn_words(model, plain, TEXTS)
    assert (learned["weights"] > 0).all()
    assert learned["behind"] == 0


def test_embeddings_are_those_that_the_model_reads():
    """Gemma scales them."""
    model = tiny("gemma3_text")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 3, "b": 4, "c": 5}, unk_token="c")))
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    read = model.get_input_embeddings()(torch.tensor([3, 4, 5, 5])).detach()
    torch.testing.assert_close(learn_words(model, tokenizer, ["a b c c"])["center"], read.mean(0))


def test_without_texts_and_for_embeddings_of_another_size_a_gist_says_nothing(parts):
    model, tokenizer = parts
    for size, texts in ((None, []), (7, TEXTS)):
        if size is not None:
            model.set_input_embeddings(torch.nn.Embedding(len(tokenizer), size))
        gist = Gist(model.config.hidden_size)
        gist.fill(learn_words(model, tokenizer, texts))
        assert not read_gists(model, tokenizer, gist, ["Where?"]).any()
