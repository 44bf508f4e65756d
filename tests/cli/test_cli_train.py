"""train and generate, at a tiny size."""

from __future__ import annotations

import pytest

TINY = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=16"]
SMALL = ["--tokens", "256", "--length", "16", "--batch-size", "4", "--vocab-size", "257", "--cpu", "--log-every", "1"]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book"
    path.mkdir()
    (path / "a.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    return path


def test_train_then_generate(everlearn, book, tmp_path):
    fields = [word for field in TINY for word in ("--set", field)]
    wish = ["train", "--model", "transformer-tiny", "--data", book, "--out", tmp_path / "out", *SMALL, *fields]
    done = everlearn(*wish, "--seed", 3, "--json")
    assert done.code == 0, done.err
    assert (done.json["tokens"], done.json["steps"], done.json["out"]) == (256, 4, str(tmp_path / "out"))
    assert "loss" in done.err
    wish = ["generate", tmp_path / "out", "the cat", "--max-tokens", 4, "--temperature", 0]
    found = everlearn(*wish, "--json").json
    assert found["prompt"] == "the cat"
    assert everlearn(*wish).out == "the cat" + found["text"] + "\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "nonsense"], "expected FIELD=VALUE"),
        (["--set", "no_such_field=1"], "no_such_field"),
        (["--set", "lr=1"], "expected fields of the preset"),
        (["--length", "0"], "length"),
    ],
)
def test_train_refuses_what_it_does_not_know(everlearn, book, tmp_path, more, said):
    code, out, err = everlearn(
        "train", "--model", "hope-tiny", "--data", book, "--tokens", 9, "--out", tmp_path / "out", *more
    )
    assert (code, out) == (1, "")
    assert said in err


def test_an_unknown_preset_or_folder(everlearn, book, tmp_path):
    code, _, err = everlearn("train", "--model", "hop-tiny", "--data", book, "--tokens", 9, "--out", tmp_path / "out")
    assert (code, "hop-tiny" in err) == (1, True)
    code, _, err = everlearn("generate", tmp_path)
    assert (code, "holds no model" in err) == (1, True)
