"""Practice: what is most like a passage."""

from __future__ import annotations

import pytest
import tiny_learner
import torch

from everlearn.learner.practice import Practice, load_practice
from everlearn.models.hub import load_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))


def test_what_practice_reads_like_is_kept_and_made_anew_when_damaged(tmp_path, monkeypatch):
    parts = load_model(str(tiny_learner.make_model(tmp_path)))
    known = Practice(*parts)._known
    (path,) = (tmp_path / "cache" / "practice").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Practice, "_read", lambda self, texts: pytest.fail("read again"))
        assert torch.equal(Practice(*parts)._known, known)
    path.write_bytes(b"damaged")
    assert torch.equal(Practice(*parts)._known, known)
    assert torch.equal(Practice(*parts)._known, known)
    monkeypatch.setattr("everlearn.learner.practice.READ_AT", 1 / 3)  # elsewhere it reads like something else
    assert not torch.equal(Practice(*parts)._known, known)
    assert len(list(path.parent.iterdir())) == 2


def test_practice_shows_what_is_most_like_the_passage_last(tmp_path):
    practice = Practice(*load_model(str(tiny_learner.make_model(tmp_path))))
    records = load_practice()
    assert all(_in(record.answer, record.said) and len(record.questions) == 4 for record in records)
    for shown, record in zip(practice.nearest([records[3].said, records[50].said], 5), (records[3], records[50])):
        assert len(shown) == 5
        assert shown[-1] == record


def _in(answer: str, said: str) -> bool:
    return answer.casefold() in said.casefold()
