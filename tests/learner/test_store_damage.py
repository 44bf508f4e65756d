"""Damaged files and full disks: a clear error, nothing lost, and what is intact stays within reach."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from everlearn.errors import StoreCorrupt, StoreError
from everlearn.learner.store import Heard, MemoryStore

# a limit on the size of any file is a real "no room": the kernel refuses the write in the middle
FULL = """
import errno, os, resource, sys
from everlearn.errors import StoreError
from everlearn.learner.store import Heard, MemoryStore
folder, task, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = MemoryStore.open(folder)

def look():
    return store.history(), store.dreams(), store.nights(), store.head, store.load_state(), sorted(os.listdir(folder))

before = look()
open_ended = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (room, open_ended))
try:
    if task == "hear":
        store.add_observations([Heard("brief"), Heard("words " * 200_000)])
    elif task == "sleep":
        store.commit_night(b"x" * 4_000_000, consolidated=[1])
    elif task == "dreams":
        store.commit_night(b"x", consolidated=[1], dreams={1: ["y" * 4_000_000]})
    elif task == "settings":
        store.update_settings(essay="z" * 4_000_000)
    elif task == "export":
        store.export(folder + ".zip")
    elif task == "forget":
        store.forget([1], b"x" * 4_000_000)
except StoreError as error:
    assert error.errno == errno.ENOSPC, error
    assert "disk full" in str(error) and "nothing was lost" in str(error), error
else:
    sys.exit("no error")
assert look() == before
assert sorted(os.listdir(folder + "/nights")) == ["0001.safetensors"]
resource.setrlimit(resource.RLIMIT_FSIZE, (open_ended, open_ended))
store.close()
with MemoryStore.open(folder) as store:
    assert look() == before
    store.add_observation("room again")
print("fine")
"""


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "ann"
    with MemoryStore.open(place, base={"name": "tiny"}) as store:
        store.add_observations([Heard("Ann likes figs. " * 50), Heard("heard only")])
        store.commit_night(os.urandom(60_000), consolidated=[1], dreams={1: ["figs?"]})
    return place


@pytest.mark.parametrize(
    ("task", "room"),
    [
        ("hear", 200_000),
        ("sleep", 1_000_000),
        ("dreams", 1_000_000),
        ("settings", 1_000_000),
        ("export", 30_000),
        ("forget", 1_000_000),
    ],
)
def test_a_full_disk_loses_nothing(folder, task, room):
    command = [sys.executable, "-c", FULL, str(folder), task, str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("fine\n", "")
    assert os.listdir(folder.parent) == ["ann"]


def test_sqlite_out_of_room_is_the_same_error(folder, monkeypatch):
    with MemoryStore.open(folder) as store:
        plain = store._index.connect

        def cramped():
            connection = plain()
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages}")
            return connection

        before = store.history()
        with monkeypatch.context() as patch:
            patch.setattr(store._index._engine.pool, "_creator", cramped)
            with pytest.raises(StoreError, match="disk full") as caught:
                store.add_observation("words " * 100_000)
        assert caught.value.errno == errno.ENOSPC
        assert store.history() == before


def test_forgetting_without_room_to_scrub_is_finished_by_a_later_opening(folder, monkeypatch):
    with MemoryStore.open(folder) as store:

        def no_room():
            from everlearn.learner.store.durable import no_room

            raise no_room(folder / "index.sqlite") from OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store._index, "vacuum", no_room)
        with pytest.raises(StoreError, match=r"are forgotten, but .* could not be scrubbed yet .*No space left"):
            store.forget([1], b"rebuilt")
        assert store.history()[0].state == "forgotten"
    monkeypatch.undo()
    with MemoryStore.open(folder) as store:
        assert [item.state for item in store.history()] == ["forgotten", "heard"]
        assert (store.load_state(), store.dreams()) == (b"rebuilt", [])
    assert b"figs" not in (folder / "index.sqlite").read_bytes()


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def garbage(content):
    return b"\x93garbage" * (len(content) // 8)


@pytest.mark.parametrize("damage", [truncate, garbage, lambda content: b"", None])
@pytest.mark.parametrize("name", ["index.sqlite", "memory.json"])
def test_a_damaged_index_or_memory_json_is_named_with_a_way_out(folder, tmp_path, name, damage):
    with MemoryStore.open(folder) as store:
        store.export(tmp_path / "copy.zip")
        before = store.history()
    content = (folder / name).read_bytes()
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage(content))
    found = {item: (folder / item).read_bytes() for item in os.listdir(folder) if (folder / item).is_file()}
    for read_only in (False, True):
        with pytest.raises(StoreCorrupt, match="import an export") as caught:
            MemoryStore.open(folder, read_only=read_only)
        assert str(folder / name) in str(caught.value)
    left = {item: (folder / item).read_bytes() for item in os.listdir(folder) if (folder / item).is_file()}
    assert left | {"lock": b""} == found | {"lock": b""}  # nothing was "repaired" away
    (folder / name).write_bytes(content)
    with MemoryStore.open(folder) as store:
        assert store.history() == before
    (folder / name).write_bytes(b"")
    MemoryStore.import_(tmp_path / "copy.zip", folder, replace=True)
    with MemoryStore.open(folder) as store:
        assert store.history() == before


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"format": "1"}', b'{"format": 1}', b'{"format": 1, "settings": 3}']
)
def test_memory_json_of_another_shape_is_damaged(folder, content):
    (folder / "memory.json").write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"memory\.json"):
        MemoryStore.open(folder)


def test_a_newer_format_is_refused_as_such(folder):
    text = (folder / "memory.json").read_text()
    (folder / "memory.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError, match="has format 2; this everlearn reads 1"):
        MemoryStore.open(folder)


def test_a_page_of_garbage_inside_the_index_is_found_when_opened_for_writing(folder):
    with MemoryStore.open(folder) as store:
        store.add_observations([Heard("filler " * 500) for _ in range(50)])
    content = bytearray((folder / "index.sqlite").read_bytes())
    for page in range(3, len(content) // 4096):
        content[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    (folder / "index.sqlite").write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"index\.sqlite is damaged"):
        MemoryStore.open(folder)


@pytest.mark.parametrize("damage", [truncate, flip, None])
def test_a_damaged_current_snapshot_holds_nothing_else_back(folder, tmp_path, damage):
    with MemoryStore.open(folder) as store:
        intact = store.load_state()
        store.commit_night(b"two" * 5000, consolidated=[2])
    snapshot = folder / "nights" / "0002.safetensors"
    if damage is None:
        snapshot.unlink()
    else:
        snapshot.write_bytes(damage(snapshot.read_bytes()))
    with MemoryStore.open(folder) as store:
        for call in (store.load_state, lambda: store.load_state(2), lambda: store.rollback(2)):
            with pytest.raises(StoreCorrupt, match="roll back to night 0, 1, or import an export") as caught:
                call()
            assert "0002.safetensors" in str(caught.value)
        assert [item.state for item in store.history()] == ["consolidated", "consolidated"]
        assert store.status()["head"] == 2
        assert store.export(tmp_path / "copy.zip")["damaged"] == [2]
        MemoryStore.import_(tmp_path / "copy.zip", tmp_path / "copy")
        with MemoryStore.open(tmp_path / "copy") as copy:
            assert copy.history() == store.history()
            with pytest.raises(StoreError, match="damaged when the memory was exported"):
                copy.load_state()
            copy.rollback(1)
            assert copy.load_state() == intact
        store.rollback(1)
        assert store.load_state() == intact
        assert [item.state for item in store.history()] == ["consolidated", "heard"]


def test_a_crashed_transaction_is_undone_by_a_reader_too(folder):
    script = f"""
import os, signal, sqlite3
db = sqlite3.connect({str(folder / "index.sqlite")!r}, isolation_level=None)
db.execute("PRAGMA cache_size=1")
db.execute("BEGIN")
db.execute("UPDATE observations SET text = 'half done'")
for n in range(200):  # more than the cache holds: pages reach the file before the commit
    db.execute("INSERT INTO observations (text, role, told_at, meta) VALUES (?, 'user', 'x', '{{}}')", ("spill" * 900,))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with MemoryStore.open(folder, read_only=True) as reader:
        before = reader.history()
    subprocess.run([sys.executable, "-c", script])
    assert b"spill" in (folder / "index.sqlite").read_bytes()
    with MemoryStore.open(folder, read_only=True) as reader:
        assert reader.history() == before
