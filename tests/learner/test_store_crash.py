"""Real processes killed with SIGKILL: nothing acknowledged is lost, nothing is half done, nothing forgotten stays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from everlearn.learner.store import Heard, MemoryStore

SECRET = "Zbigniew's locker code is 4711-Ünterhose"

# argv: folder, the checkpoint at which to die ("" for none), what to do
CHILD = """
import os, signal, sys
from everlearn.learner.store import Heard, MemoryStore, durable
folder, where, task = sys.argv[1:4]

def die(name):
    if name == where:
        os.kill(os.getpid(), signal.SIGKILL)

with MemoryStore.open(folder) as store:
    print("open", flush=True)
    durable.checkpoint = die
    if task == "hear":
        store.add_observations([Heard("left"), Heard("right")])
    elif task == "sleep":
        store.commit_night(b"new" * 99999, consolidated=[2], dismissed=[3], dreams={2: ["a dream"]}, metrics={"s": 1})
    elif task == "forget":
        store.forget([1], b"rebuilt" * 9999)
    elif task == "rollback":
        store.rollback(0)
    elif task == "export":
        store.export(sys.argv[4])
    elif task == "import":
        store.close()
        MemoryStore.import_(sys.argv[4], folder, replace=True)
    elif task == "babble":
        while True:
            print(store.add_observation("word " * 300), flush=True)
    elif task == "dream":
        while True:
            print(store.commit_night(os.urandom(200_000), dreams={1: ["d" * 3000] * 9}), flush=True)
    elif task == "regret":
        for last in range(2, 40):
            store.forget([last], os.urandom(50_000))
            print(last, flush=True)
print("done", flush=True)
"""


def run_child(folder, where, task, *more):
    """Run CHILD to its end and return the words it printed; it must have died at ``where`` if that is given."""
    command = [sys.executable, "-c", CHILD, str(folder), where, task, *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if where else 0), done.stderr
    return done.stdout.split()


def run_and_kill(folder, task, seconds):
    """Run CHILD, kill it after so many seconds of work, and return what it acknowledged."""
    command = [sys.executable, "-c", CHILD, str(folder), "", task]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(seconds)
        child.kill()
        lines = child.stdout.read().split("\n")
    return [int(line) for line in lines[:-1]]  # a line without its end was not acknowledged


def traces(folder, text=SECRET):
    """Return the files below ``folder`` in which ``text``, or a piece of it, is found."""
    pieces = [piece.encode(code) for piece in (text, text[:12], text[-9:]) for code in ("utf-8", "utf-16-le")]
    return [str(f) for f in folder.rglob("*") if f.is_file() and any(piece in f.read_bytes() for piece in pieces)]


def snapshot(folder):
    with MemoryStore.open(folder) as store:
        files = sorted(os.listdir(folder / "nights"))
        assert files == sorted(night.file for night in store.nights() if night.unavailable is None)
        return store.history(), store.dreams(), store.nights(), store.head, store.load_state()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "ann"
    with MemoryStore.open(place) as store:
        filler = [Heard("filler " * 100) for _ in range(20)]
        store.add_observations([Heard(SECRET, meta={"quote": SECRET}), Heard("fact"), Heard("talk"), *filler])
        store.commit_night(
            b"old" * 999, consolidated=[1], dreams={1: [{"q": SECRET}]}, metrics={"last": SECRET, "s": 2}
        )
    return place


@pytest.mark.parametrize("where", ["observations-inserted"])
def test_killed_while_hearing_undoes_what_was_not_acknowledged(folder, where):
    before = snapshot(folder)
    run_child(folder, where, "hear")
    assert snapshot(folder) == before
    run_child(folder, "", "hear")
    assert [item.text for item in snapshot(folder)[0][-2:]] == ["left", "right"]


@pytest.mark.parametrize(
    ("where", "committed"),
    [
        ("file-written", False),
        ("file-synced", False),
        ("snapshot-written", False),
        ("night-inserted", False),
        ("night-committed", True),
    ],
)
def test_killed_while_committing_a_night_is_all_or_nothing(folder, where, committed):
    before = snapshot(folder)
    run_child(folder, where, "sleep")
    after = snapshot(folder)
    if not committed:
        assert after == before
        return
    history, dreams, nights, head, state = after
    assert [item.state for item in history[:4]] == ["consolidated", "consolidated", "dismissed", "heard"]
    assert [item.payload for item in dreams] == [{"q": SECRET}, "a dream"]
    assert (nights[:-1], nights[-1].parent, head, state) == (before[2], 1, 2, b"new" * 99999)


@pytest.mark.parametrize(
    ("where", "committed"),
    [
        ("file-synced", False),
        ("snapshot-written", False),
        ("forget-erased", False),
        ("forget-committed", True),
        ("snapshot-removed", True),
        ("before-scrub", True),
        ("after-scrub", True),
    ],
)
def test_killed_while_forgetting_is_all_or_nothing_and_leaves_no_byte(folder, where, committed):
    before = snapshot(folder)
    run_child(folder, where, "forget")
    with MemoryStore.open(folder, read_only=True) as reader:
        assert (reader.history()[0].state == "forgotten") == committed
    after = snapshot(folder)
    if not committed:
        assert after == before
        assert traces(folder)
        return
    history, dreams, nights, head, state = after
    assert (history[0].state, history[0].text, history[0].meta) == ("forgotten", "", {})
    assert dreams == []
    assert (head, state, nights[0].metrics) == (2, b"rebuilt" * 9999, {"s": 2})
    assert "forgotten" in (nights[0].unavailable or "")
    assert traces(folder) == []


@pytest.mark.parametrize(("where", "committed"), [("head-moved", False), ("rolled-back", True)])
def test_killed_while_rolling_back_is_before_or_after(folder, where, committed):
    before = snapshot(folder)
    run_child(folder, where, "rollback")
    history, dreams, nights, head, state = snapshot(folder)
    assert nights == before[2]
    if not committed:
        assert (history, dreams, head, state) == (before[0], before[1], 1, before[4])
        return
    assert (head, state, dreams) == (0, None, [])
    assert {item.state for item in history} == {"heard"}
    with MemoryStore.open(folder) as store:
        store.rollback(1)
    assert snapshot(folder) == before


def test_killed_while_exporting_leaves_the_memory_and_the_older_export_whole(folder, tmp_path):
    before, file = snapshot(folder), tmp_path / "all.zip"
    with MemoryStore.open(folder) as store:
        store.export(file)
        older = file.read_bytes()
        store.add_observation("since then")
    run_child(folder, "export-written", "export", file)
    assert file.read_bytes() == older
    assert snapshot(folder)[0][:-1] == before[0]
    run_child(folder, "", "export", file)
    MemoryStore.import_(file, tmp_path / "copy")
    assert snapshot(tmp_path / "copy") == snapshot(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.zip", "ann", "copy"]


def test_killed_at_any_moment_keeps_every_acknowledged_observation(folder):
    rng = random.Random(0)
    acknowledged = []
    for _ in range(6):
        acknowledged += run_and_kill(folder, "babble", rng.uniform(0.0, 0.25))
        with MemoryStore.open(folder) as store:
            heard = {item.id: item.text for item in store.history()}
        assert all(heard[which] == "word " * 300 for which in acknowledged)
    assert len(acknowledged) > 10


def test_killed_at_any_moment_of_a_night_leaves_the_last_one_whole(folder):
    rng = random.Random(1)
    for _ in range(5):
        acknowledged = run_and_kill(folder, "dream", rng.uniform(0.0, 0.2))
        history, dreams, nights, head, state = snapshot(folder)
        assert head in ([nights[-1].n] if not acknowledged else [acknowledged[-1], acknowledged[-1] + 1])
        assert state is not None
        assert len(dreams) == 1 + 9 * (head - 1)
        assert len(history) == 23
        assert [night.n for night in nights] == list(range(1, head + 1))


def test_killed_at_any_moment_of_forgetting_leaves_nothing_in_between(folder):
    words = {n: f"private{n:04d}word" for n in range(24, 44)}
    with MemoryStore.open(folder) as store:
        store.add_observations([Heard(f"{word} " * 200) for word in words.values()])
        store.commit_night(b"more", consolidated=words, dreams={n: [word * 3] for n, word in words.items()})
    rng = random.Random(2)
    forgotten = set()
    for turn in range(4):
        script = CHILD.replace("range(2, 40)", f"range({24 + 5 * turn}, {29 + 5 * turn})")
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder), "", "regret"], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.15))
            child.kill()
        history, dreams, _, _, _ = snapshot(folder)
        states = {item.id: item.state for item in history}
        owners = {item.observation for item in dreams}
        for n, word in words.items():
            if states[n] == "forgotten":
                forgotten.add(n)
                assert traces(folder, word) == []
            else:
                assert states[n] == "consolidated"
                assert n in owners
                assert history[n - 1].text == f"{word} " * 200
    assert forgotten
    assert len(forgotten) < len(words)


def test_killed_while_making_a_memory_can_be_made_again(tmp_path):
    run = [sys.executable, "-c", CHILD.replace("with Mem", "durable.checkpoint = die\nwith Mem", 1)]
    for where in ("file-written", "file-synced"):
        done = subprocess.run([*run, str(tmp_path / "ann"), where, "hear"], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert "memory.json" not in os.listdir(tmp_path / "ann")
    with MemoryStore.open(tmp_path / "ann", base={"name": "tiny"}) as store:
        assert store.add_observation("hello") == 1
    assert sorted(os.listdir(tmp_path / "ann")) == ["index.sqlite", "lock", "memory.json", "nights"]


@pytest.mark.parametrize(
    ("where", "replaced"),
    [("import-unpacked", False), ("import-aside", False), ("import-moved", True)],
)
def test_killed_while_importing_leaves_the_old_or_the_new(folder, tmp_path, where, replaced):
    with MemoryStore.open(tmp_path / "other") as other:
        other.add_observation("another life")
        other.export(tmp_path / "other.zip")
    before = snapshot(folder)
    run_child(folder, where, "import", tmp_path / "other.zip")
    history = snapshot(folder)[0]
    if replaced:
        assert [item.text for item in history] == ["another life"]
    else:
        assert history == before[0]
    assert sorted(os.listdir(tmp_path)) == ["ann", "other", "other.zip"]
