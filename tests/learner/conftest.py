"""A learner on a tiny model, for the tests of this room."""

from __future__ import annotations

import pytest
import tiny_learner

from everlearn.learner.learner import Learner
from everlearn.models.hub import default_model_dir, load_model


@pytest.fixture(scope="session")
def default_model():
    """The folder of the default model."""
    if not default_model_dir().is_dir():
        pytest.skip("the default model is not in the cache; `everlearn model fetch` gets it")
    return default_model_dir()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load_model(str(tiny_learner.make_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def learner(pair, tmp_path, monkeypatch):
    """Open a learner on the shared base; same name, same memory."""
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    opened = []

    def open_(name: str = "m", **parts) -> Learner:
        make = tiny_learner.simple_from_pretrained()
        opened.append(make(pair[0], tokenizer=pair[1], memory=tmp_path / name, **parts))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
