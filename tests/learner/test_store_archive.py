"""Export to one file and import from it: complete, verified, all or nothing."""

from __future__ import annotations

import json
import os
import zipfile

import pytest

from everlearn.errors import InvalidArgument, StoreCorrupt, StoreError, StoreLocked
from everlearn.learner.store import Heard, MemoryStore, archive, durable

BASE = {"name": "tiny", "fingerprint": "f00"}


def look(path):
    with MemoryStore.open(path) as store:
        states = [store.load_state(n) for n in store.status()["available"]]
        return store.history(), store.dreams(), store.nights(), store.head, states, store.base, store.settings


@pytest.fixture
def ann(tmp_path):
    with MemoryStore.open(tmp_path / "ann", base=BASE) as store:
        store.add_observations([Heard("Ann plays the viola 🎻"), Heard("hm"), Heard("later")])
        store.update_settings(width=8)
        store.commit_night(os.urandom(5000), consolidated=[1], dismissed=[2], dreams={1: [{"q": "viola?"}]})
        store.commit_night(os.urandom(5000), consolidated=[3])
        store.rollback(1)
        store.export(tmp_path / "ann.zip")
    return tmp_path / "ann"


def rewrite(source, target, change):
    """Copy a zip; ``change(members, manifest)`` edits its content on the way."""
    with zipfile.ZipFile(source) as old:
        members = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(members, manifest)
    with zipfile.ZipFile(target, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
        new.writestr("manifest.json", json.dumps(manifest))


def test_everything_arrives(ann, tmp_path):
    with zipfile.ZipFile(tmp_path / "ann.zip") as packed:
        assert sorted(packed.namelist()) == [
            "index.sqlite",
            "manifest.json",
            "memory.json",
            "nights/0001.safetensors",
            "nights/0002.safetensors",
        ]
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new" / "place", tmp_path / "empty"):
        MemoryStore.import_(tmp_path / "ann.zip", target)
        assert look(target) == look(ann)
    with MemoryStore.open(tmp_path / "empty") as copy:
        assert copy.add_observation("goes on") == 4
        assert copy.commit_night(b"goes on") == 3


def test_peek_tells_what_is_inside(ann, tmp_path):
    found = MemoryStore.peek(tmp_path / "ann.zip")
    assert found["base"] == BASE
    assert found["status"]["observations"] == {"heard": 1, "consolidated": 1, "dismissed": 1, "forgotten": 0}
    assert (found["status"]["head"], found["damaged"]) == (1, [])
    assert "path" not in found["status"]
    with MemoryStore.open(ann, read_only=True) as reader:
        assert reader.export(tmp_path / "again.zip")["members"] == found["members"]


def test_export_replaces_an_older_file_only_when_complete(ann, tmp_path, monkeypatch):
    old = (tmp_path / "ann.zip").read_bytes()

    def interrupt(name):
        raise KeyboardInterrupt

    with MemoryStore.open(ann) as store:
        store.add_observation("new")
        monkeypatch.setattr(durable, "checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.export(tmp_path / "ann.zip")
        assert (tmp_path / "ann.zip").read_bytes() == old
        monkeypatch.undo()
        store.export(tmp_path / "ann.zip")
        assert MemoryStore.peek(tmp_path / "ann.zip")["status"]["observations"]["heard"] == 2
        with pytest.raises(InvalidArgument, match="inside the memory"):
            store.export(ann / "ann.zip")
        with pytest.raises(StoreError, match="nowhere"):
            store.export(tmp_path / "nowhere" / "ann.zip")
    assert sorted(os.listdir(tmp_path)) == ["ann", "ann.zip"]


def test_an_export_during_which_something_is_forgotten_is_not_written(ann, tmp_path, monkeypatch):
    check = archive._check_unchanged
    with MemoryStore.open(ann) as store, MemoryStore.open(ann, read_only=True) as reader:

        def forget_first(index, copy):
            store.forget([3])
            check(index, copy)

        monkeypatch.setattr(archive, "_check_unchanged", forget_first)
        with pytest.raises(StoreError, match="export again"):
            reader.export(tmp_path / "late.zip")
    assert sorted(os.listdir(tmp_path)) == ["ann", "ann.zip"]


def test_a_folder_in_use_or_not_empty_is_not_touched(ann, tmp_path):
    with MemoryStore.open(tmp_path / "bob") as bob:
        bob.add_observation("Bob")
        with pytest.raises(StoreLocked):
            MemoryStore.import_(tmp_path / "ann.zip", tmp_path / "bob", replace=True)
    with pytest.raises(StoreError, match="is not empty"):
        MemoryStore.import_(tmp_path / "ann.zip", tmp_path / "bob")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(StoreError, match=r"more than a memory \(chapter\)"):
        MemoryStore.import_(tmp_path / "ann.zip", tmp_path / "thesis", replace=True)
    with pytest.raises(StoreError, match="is a file"):
        MemoryStore.import_(tmp_path / "ann.zip", tmp_path / "ann.zip", replace=True)
    assert look(tmp_path / "bob")[0][0].text == "Bob"
    MemoryStore.import_(tmp_path / "ann.zip", tmp_path / "bob", replace=True)
    assert look(tmp_path / "bob") == look(ann)
    assert sorted(os.listdir(tmp_path)) == ["ann", "ann.zip", "bob", "thesis"]


def test_a_failure_at_the_last_step_puts_the_old_memory_back(ann, tmp_path, monkeypatch):
    with MemoryStore.open(tmp_path / "bob") as bob:
        bob.add_observation("Bob")

    def fail(name):
        if name == "import-aside":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "checkpoint", fail)
    with pytest.raises(StoreError, match="disk full"):
        MemoryStore.import_(tmp_path / "ann.zip", tmp_path / "bob", replace=True)
    assert look(tmp_path / "bob")[0][0].text == "Bob"
    assert sorted(os.listdir(tmp_path)) == ["ann", "ann.zip", "bob"]


def slip(members, manifest):
    members["../evil"] = b"x"
    manifest["members"]["../evil"] = {"sha256": "", "bytes": 1}


def absolute(members, manifest):
    members["/tmp/evil"] = b"x"
    manifest["members"]["/tmp/evil"] = {"sha256": "", "bytes": 1}


def extra(members, manifest):
    members["nights/0009.safetensors"] = b"x"


def another_snapshot(members, manifest):
    members["nights/0001.safetensors"] = b"x" * 5000


def bloated(members, manifest):
    members["nights/0001.safetensors"] += b"\0" * 50_000_000


def missing_snapshot(members, manifest):
    del members["nights/0001.safetensors"], manifest["members"]["nights/0001.safetensors"]


def no_index(members, manifest):
    del members["index.sqlite"], manifest["members"]["index.sqlite"]


def another_kind(members, manifest):
    manifest["kind"] = "photos"


def odd_members(members, manifest):
    manifest["members"]["index.sqlite"] = 7


def lock_inside(members, manifest):
    members["lock"] = b"1"
    manifest["members"]["lock"] = {"sha256": "", "bytes": 1}


CHANGES = [slip, absolute, extra, another_snapshot, bloated, missing_snapshot]
CHANGES += [no_index, another_kind, odd_members, lock_inside]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_tampered_with_is_refused(ann, tmp_path, change):
    rewrite(tmp_path / "ann.zip", tmp_path / "bad.zip", change)
    before = look(ann)
    with pytest.raises(StoreCorrupt, match=r"bad\.zip"):
        MemoryStore.import_(tmp_path / "bad.zip", ann, replace=True)
    with pytest.raises(StoreCorrupt):
        MemoryStore.import_(tmp_path / "bad.zip", tmp_path / "new")
    assert look(ann) == before
    assert sorted(os.listdir(tmp_path)) == ["ann", "ann.zip", "bad.zip"]


@pytest.mark.parametrize("keep", [0, 10, 3000, -40])
def test_a_truncated_file_is_refused(ann, tmp_path, keep):
    (tmp_path / "bad.zip").write_bytes((tmp_path / "ann.zip").read_bytes()[:keep])
    for call in (MemoryStore.peek, lambda file: MemoryStore.import_(file, tmp_path / "new")):
        with pytest.raises(StoreCorrupt, match=r"bad\.zip"):
            call(tmp_path / "bad.zip")
    assert not (tmp_path / "new").exists()


def test_bytes_flipped_anywhere_are_found(ann, tmp_path):
    content = (tmp_path / "ann.zip").read_bytes()
    before = look(ann)
    for place in range(40, len(content), 997):
        (tmp_path / "bad.zip").write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            MemoryStore.import_(tmp_path / "bad.zip", tmp_path / "new")
        except StoreError:
            assert not (tmp_path / "new").exists()
        else:  # a field of the zip that carries no content
            assert look(tmp_path / "new") == before
            os.rename(tmp_path / "new", tmp_path / f"fine{place}")


def test_a_missing_file_is_named(tmp_path):
    for call in (MemoryStore.peek, lambda file: MemoryStore.import_(file, tmp_path / "new")):
        with pytest.raises(StoreError, match=r"gone\.zip"):
            call(tmp_path / "gone.zip")
    assert os.listdir(tmp_path) == []


def test_a_newer_export_is_refused_as_such(ann, tmp_path):
    rewrite(tmp_path / "ann.zip", tmp_path / "new.zip", lambda members, manifest: manifest.update(format=2))
    with pytest.raises(StoreError, match=r"new\.zip has format 2; this everlearn reads 1"):
        MemoryStore.peek(tmp_path / "new.zip")


def test_what_killed_imports_left_is_cleared_when_a_writer_opens(ann, tmp_path):
    dead = tmp_path / ".ann.importing-dead"
    dead.mkdir()
    (dead / "index.sqlite").write_bytes(b"somebody's words")
    live = tmp_path / ".ann.importing-live"
    live.mkdir()
    lock = durable.FolderLock(live)
    with MemoryStore.open(ann):
        assert sorted(os.listdir(tmp_path)) == [".ann.importing-live", "ann", "ann.zip"]
    lock.release()
