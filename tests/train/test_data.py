"""Reading, tokenizing and packing text."""

from __future__ import annotations

import json

import pytest
import torch

from everlearn.errors import InvalidArgument
from everlearn.train.data import load_corpus, load_tokenizer, pack, train_tokenizer


def test_a_folder_of_documents(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t * 50}) for t in "yz"), encoding="utf-8")
    (tmp_path / "notes.md").write_text("no", encoding="utf-8")
    corpus = load_corpus(tmp_path, 0.1)
    assert corpus.train == ["x" * 90, "y" * 45, "z" * 45]
    assert corpus.held_out == ["x" * 10, "y" * 5, "z" * 5]
    assert load_corpus(tmp_path, ["b*"]).held_out == ["y" * 50, "z" * 50]
    (tmp_path / "valid.txt").write_text("w", encoding="utf-8")
    assert load_corpus(tmp_path).held_out == ["w"]
    assert load_corpus(tmp_path / "a.txt", 0.5).train == ["x" * 50]


def test_bad_data_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match="held_out"):
        load_corpus(tmp_path, 0.9)
    with pytest.raises(InvalidArgument, match="expected some of both"):
        load_corpus(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}', encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"line 1 .* 'text'"):
        load_corpus(tmp_path)
    with pytest.raises(InvalidArgument, match="no dataset could be loaded"):
        load_corpus(str(tmp_path / "nowhere"))


def test_tokenizer_keeps_any_text(tmp_path):
    texts = ["the cat sat on the mat, the cat sat"] * 5
    for size in (257, 265):
        tokenizer = train_tokenizer(texts, size)
        assert len(tokenizer) == size
        text = " naïve 猫\n\tthe cat"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InvalidArgument, match="vocab_size"):
        train_tokenizer(texts, 100)


def test_packing():
    tokenizer = train_tokenizer(["a"], 257)
    rows = pack(["abc", "de", "fghi"], tokenizer, 4)
    end = tokenizer.eos_token_id
    a, d, f = (tokenizer(t)["input_ids"] for t in ("abc", "de", "fghi"))
    assert len(rows) == 3
    assert torch.equal(rows.tokens.flatten(), torch.tensor([*a, end, *d, end, *f, end][:12]))
    assert rows[1]["document_ids"].tolist() == [1, 1, 1, 2]
    assert torch.equal(rows[1]["input_ids"], rows[1]["labels"])
    with pytest.raises(InvalidArgument, match="length"):
        pack(["abc"], tokenizer, 50)
