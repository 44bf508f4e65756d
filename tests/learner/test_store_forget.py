"""MemoryStore.forget: no byte stays, what remains is kept, snapshots trained with it go."""

from __future__ import annotations

import contextlib
import os

import pytest

from everlearn.errors import InvalidArgument, StoreError
from everlearn.learner.store import Heard, MemoryStore
from everlearn.learner.store.index import INDEX, Index

SECRET = "Ottilie's PIN is 90-17-33, Größe 44"


def traces(folder, text):
    pieces = [text.encode(), text[:11].encode(), text[-11:].encode(), text.encode("utf-16-le")]
    return [str(f) for f in folder.rglob("*") if f.is_file() and any(piece in f.read_bytes() for piece in pieces)]


@pytest.fixture
def store(tmp_path):
    with MemoryStore.open(tmp_path / "ann") as opened:
        yield opened


def test_what_was_only_heard_or_dismissed_goes_without_a_rebuild(store):
    store.add_observations([Heard(SECRET), Heard(f"again: {SECRET}", meta={"why": SECRET}), Heard("stays")])
    store.commit_night(b"one", dismissed=[2], dreams={2: [SECRET]}, metrics={"seen": [SECRET, 3], "s": 1})
    assert traces(store.path, SECRET)
    assert not store.needs_rebuild([1, 2])
    assert store.forget([1, 2]) == 1
    assert traces(store.path, SECRET) == []
    assert [item.state for item in store.history()] == ["forgotten", "forgotten", "heard"]
    assert [(item.text, item.meta) for item in store.history()] == [("", {}), ("", {}), ("stays", {})]
    assert store.history()[0].forgotten_at
    assert (store.load_state(), store.dreams()) == (b"one", [])
    assert store.nights()[0].metrics == {"seen": [3], "s": 1}


def test_what_was_consolidated_needs_a_rebuild_and_takes_its_snapshots_along(store):
    a, b, c = store.add_observations([Heard("before"), Heard(SECRET), Heard("after")])
    store.commit_night(b"one", consolidated=[a], dreams={a: ["a1"]}, metrics={"note": "kept"})
    store.commit_night(b"two" + SECRET.encode(), consolidated=[b], dreams={b: [SECRET], a: ["a2"]})
    store.commit_night(b"three", consolidated=[c], dreams={c: ["c3"]})
    assert store.needs_rebuild([b])
    with pytest.raises(InvalidArgument, match="rebuilt_state"):
        store.forget([b])
    assert traces(store.path, SECRET)
    assert store.forget([b], b"rebuilt", metrics={"s": 2}) == 4
    assert traces(store.path, SECRET) == []
    assert sorted(os.listdir(store.path / "nights")) == ["0001.safetensors", "0004.safetensors"]
    assert store.load_state() == b"rebuilt"
    assert [item.state for item in store.history()] == ["consolidated", "forgotten", "consolidated"]
    assert [(item.observation, item.payload) for item in store.dreams()] == [(a, "a1"), (a, "a2"), (c, "c3")]
    for gone in (2, 3):
        with pytest.raises(StoreError, match=f"night {gone} is gone: it was trained with something that was forgotten"):
            store.rollback(gone)
    store.rollback(1)
    assert [item.state for item in store.history()] == ["consolidated", "forgotten", "heard"]
    assert store.nights()[0].metrics == {"note": "kept"}
    store.rollback(4)
    assert store.load_state() == b"rebuilt"


def test_a_rebuilt_night_counts_as_trained_with_what_it_kept(store):
    store.add_observations([Heard("first"), Heard("second"), Heard("third")])
    store.commit_night(b"one", consolidated=[1, 2, 3])
    store.forget([1], b"without first")
    assert store.needs_rebuild([2])
    store.forget([2], b"without second")
    assert store.status()["available"] == [0, 3]
    store.commit_night(b"four")
    assert [item.state for item in store.history()] == ["forgotten", "forgotten", "consolidated"]


def test_a_snapshot_on_another_branch_goes_too(store):
    store.add_observation(SECRET)
    store.commit_night(b"with", consolidated=[1])
    store.rollback(0)
    store.commit_night(b"without")
    assert not store.needs_rebuild([1])
    store.forget([1])
    assert (store.head, store.load_state(), store.status()["available"]) == (2, b"without", [0, 2])
    assert os.listdir(store.path / "nights") == ["0002.safetensors"]


def test_ids_are_checked_before_anything_happens(store):
    store.add_observations([Heard("gone"), Heard("here")])
    store.forget([1])
    before = store.status()
    for ids, message in (([9], "no observation has the id 9"), ([2, 1], "forgotten already"), (["x"], "'x'")):
        for rebuilt in (None, b"state"):
            with pytest.raises(InvalidArgument, match=message):
                store.forget(ids, rebuilt)
    assert store.status() == before
    assert store.add_observation("new") == 3


def test_forgetting_among_many_long_texts_leaves_no_byte_and_the_others_whole(store):
    texts = [f"{n:03d} person{n:03d} " * (1 + 40 * (n % 7)) for n in range(120)]
    ids = store.add_observations([Heard(text) for text in texts])
    store.commit_night(b"x", dreams={n: [f"dream{n:03d}x" * 300] for n in ids})
    store.forget(ids[::3])
    for n, (which, text) in enumerate(zip(ids, texts)):
        marks = (f"person{n:03d}", f"dream{which:03d}x")
        assert [bool(traces(store.path, mark)) for mark in marks] == ([False, False] if n % 3 == 0 else [True, True])
        assert store.history()[n].text == ("" if n % 3 == 0 else text)


def test_both_ways_in_which_sqlite_leaves_no_byte_are_used(store):
    """Either alone would do, so no search for a trace tells whether both are there."""
    store.add_observations([Heard(SECRET * 500), Heard("stays")])
    with contextlib.closing(Index(store.path / INDEX, read_only=False).connect()) as db:
        assert db.execute("PRAGMA secure_delete").fetchone() == (1,)
        db.execute("PRAGMA secure_delete=OFF")
        db.execute("UPDATE observations SET text = '' WHERE id = 1")
        assert db.execute("PRAGMA freelist_count").fetchone()[0] > 0
    store.forget([1])
    with contextlib.closing(Index(store.path / INDEX, read_only=True).connect()) as db:
        assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
    assert traces(store.path, SECRET) == []


def test_an_export_after_forgetting_has_no_byte_either(store, tmp_path):
    store.add_observations([Heard(SECRET), Heard("stays")])
    store.commit_night(b"one" + SECRET.encode(), consolidated=[1, 2])
    store.forget([1], b"rebuilt")
    store.export(tmp_path / "copy.zip")
    MemoryStore.import_(tmp_path / "copy.zip", tmp_path / "copy")
    assert traces(tmp_path, SECRET) == []
    with MemoryStore.open(tmp_path / "copy") as copy:
        assert copy.history() == store.history()
