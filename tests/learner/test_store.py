"""MemoryStore: observations, nights, dreams, rollback, status; who may open it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from everlearn.errors import InvalidArgument, StoreError, StoreLocked
from everlearn.learner.store import Heard, MemoryStore

BASE = {"name": "tiny", "fingerprint": "abc"}


def states(store, night=None):
    return {item.id: item.state for item in store.history(night)}


def test_opens_writes_and_finds_everything_again(tmp_path):
    with MemoryStore.open(tmp_path / "deep" / "ann", base=BASE) as store:
        first = store.add_observation(
            "Ann's cat is called Tobias.", meta={"remember": True}, told_at="2031-02-03T04:05"
        )
        more = store.add_observations([Heard("Hello!"), Heard("Hi Ann.", role="assistant")])
        store.update_settings(width=64)
    assert [first, *more] == [1, 2, 3]
    with MemoryStore.open(tmp_path / "deep" / "ann", base={"name": "another"}) as store:
        assert store.base == BASE
        assert store.settings == {"width": 64}
        cat, hello, reply = store.history()
        assert (cat.text, cat.role, cat.told_at) == ("Ann's cat is called Tobias.", "user", "2031-02-03T04:05")
        assert cat.meta == {"remember": True}
        assert (hello.state, hello.night, hello.forgotten_at) == ("heard", None, None)
        assert asdict(reply)["role"] == "assistant"


def test_base_is_recorded_when_first_known(tmp_path):
    with MemoryStore.open(tmp_path) as store:
        assert store.base is None
    with MemoryStore.open(tmp_path, base=BASE):
        pass
    with MemoryStore.open(tmp_path, read_only=True) as store:
        assert store.base == BASE


@pytest.mark.parametrize("text", ["Zoë wohnt in Łódź 🐈‍⬛ 東京", "a\x00b\r\n", "long " * 400_000])
def test_any_text_comes_back_as_told(tmp_path, text):
    with MemoryStore.open(tmp_path) as store:
        store.add_observation(text, meta={"wörter": text[:9]})
    with MemoryStore.open(tmp_path) as store:
        assert store.history()[0].text == text
        assert store.history()[0].meta == {"wörter": text[:9]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"text": ""}, "text"),
        ({"text": " \n\t"}, "text"),
        ({"text": "caf\udce9"}, "text"),
        ({"text": "x", "told_at": "yesterday"}, "told_at"),
        ({"text": "x", "meta": {"a": object()}}, "meta"),
        ({"text": "x", "meta": {"a": float("nan")}}, "meta"),
        ({"text": "x", "meta": [1]}, "meta"),
    ],
)
def test_bad_observations_are_named_and_leave_nothing(tmp_path, arguments, named):
    with MemoryStore.open(tmp_path) as store:
        with pytest.raises(InvalidArgument, match=f"^{named}:"):
            store.add_observation(**arguments)
        with pytest.raises(InvalidArgument, match=f"^{named}:"):
            store.add_observations([Heard("fine"), Heard(**arguments)])
        assert store.history() == []


def test_a_night_sets_states_dreams_and_head(tmp_path):
    with MemoryStore.open(tmp_path) as store:
        fact, talk, later = store.add_observations([Heard("fact"), Heard("talk"), Heard("later")])
        assert (store.head, store.load_state(), store.nights(), store.dreams()) == (0, None, [], [])
        n = store.commit_night(
            b"weights", consolidated=[fact], dismissed=[talk], dreams={fact: [{"q": "?"}, ["x", 1]]}, metrics={"s": 1.5}
        )
        assert n == store.head == 1
        assert states(store) == {fact: "consolidated", talk: "dismissed", later: "heard"}
        assert [(item.observation, item.night, item.payload) for item in store.dreams()] == [
            (fact, 1, {"q": "?"}),
            (fact, 1, ["x", 1]),
        ]
        (night,) = store.nights()
        assert (night.parent, night.bytes, night.metrics, night.unavailable) == (0, 7, {"s": 1.5}, None)
        assert night.sha256 == hashlib.sha256((tmp_path / "nights" / night.file).read_bytes()).hexdigest()
        assert sorted(os.listdir(tmp_path)) == ["index.sqlite", "lock", "memory.json", "nights"]


def test_a_state_may_be_a_file(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "made").write_bytes(content)
    with MemoryStore.open(tmp_path / "ann") as store:
        store.commit_night(tmp_path / "made")
        assert store.load_state() == content
        with pytest.raises(StoreError, match="absent"):
            store.commit_night(tmp_path / "absent")
        with pytest.raises(InvalidArgument, match=r"^state:"):
            store.commit_night(b"")
        assert store.head == 1


def test_rollback_moves_back_and_forward_and_states_follow(tmp_path):
    with MemoryStore.open(tmp_path) as store:
        a, b, c = store.add_observations([Heard("a"), Heard("b"), Heard("c")])
        store.commit_night(b"one", consolidated=[a], dismissed=[b], dreams={a: ["a1"]})
        store.commit_night(b"two", consolidated=[b, c], dreams={b: ["b2"], a: ["a2"]})
        assert states(store) == {a: "consolidated", b: "consolidated", c: "consolidated"}
        store.rollback(1)
        assert store.load_state() == b"one"
        assert states(store) == {a: "consolidated", b: "dismissed", c: "heard"}
        assert [item.payload for item in store.dreams()] == ["a1"]
        assert states(store, night=2)[c] == "consolidated"
        assert [item.payload for item in store.dreams(2)] == ["a1", "b2", "a2"]
        assert store.commit_night(b"three", consolidated=[c], dreams={c: ["c3"]}) == 3
        assert [night.parent for night in store.nights()] == [0, 1, 1]
        assert [item.payload for item in store.dreams()] == ["a1", "c3"]
        store.rollback(2)
        assert store.load_state() == b"two"
        assert [item.payload for item in store.dreams()] == ["a1", "b2", "a2"]
        store.rollback(0)
        assert store.load_state() is None
        assert set(states(store).values()) == {"heard"}
        assert store.commit_night(b"four") == 4
        with pytest.raises(InvalidArgument, match="no night 9; roll back to night 0, 1, 2, 3"):
            store.rollback(9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"consolidated": [7]},
        {"dismissed": [7]},
        {"dreams": {7: ["x"]}},
        {"consolidated": [1], "dismissed": [1]},
        {"metrics": {"x": object()}},
        {"dreams": {1: [object()]}},
        {"dismissed": [2]},
        {"consolidated": [3]},
    ],
)
def test_a_night_with_a_bad_argument_changes_nothing(tmp_path, arguments):
    with MemoryStore.open(tmp_path) as store:
        store.add_observations([Heard("a"), Heard("learned"), Heard("gone")])
        store.commit_night(b"one", consolidated=[2])
        store.forget([3])
        before = store.status() | {"history": store.history(), "dreams": store.dreams()}
        with pytest.raises(InvalidArgument):
            store.commit_night(b"two", **arguments)
        assert store.status() | {"history": store.history(), "dreams": store.dreams()} == before
        assert os.listdir(tmp_path / "nights") == ["0001.safetensors"]


def test_pruned_nights_free_space_and_still_count(tmp_path):
    with MemoryStore.open(tmp_path) as store:
        store.add_observation("a")
        store.commit_night(b"one", consolidated=[1])
        store.commit_night(b"two")
        with pytest.raises(InvalidArgument, match="current"):
            store.prune([1, 2])
        store.prune([1])
        assert os.listdir(tmp_path / "nights") == ["0002.safetensors"]
        assert states(store) == {1: "consolidated"}
        with pytest.raises(StoreError, match="pruned"):
            store.rollback(1)
        assert store.head == 2


def test_status_counts(tmp_path):
    with MemoryStore.open(tmp_path, base=BASE) as store:
        store.add_observations([Heard(word) for word in ("one", "two", "three", "four", "five")])
        store.commit_night(b"12345", consolidated=[1, 2], dismissed=[3])
        store.forget([4])
        status = store.status()
        assert status["observations"] == {"heard": 1, "consolidated": 2, "dismissed": 1, "forgotten": 1}
        assert (status["head"], status["nights"], status["available"]) == (1, 1, [0, 1])
        assert (status["base"], status["path"]) == (BASE, str(tmp_path))
        assert status["last_sleep"] == store.nights()[0].created_at
        assert status["bytes"] == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())


def test_a_second_writer_is_told_who_has_it_and_readers_are_welcome(tmp_path):
    script = f"""
from everlearn.learner.store import MemoryStore
store = MemoryStore.open({str(tmp_path)!r})
print("open", flush=True)
input()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked) as caught:
            MemoryStore.open(tmp_path)
        assert str(child.pid) in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        with MemoryStore.open(tmp_path, read_only=True) as reader:
            assert reader.history() == []
        child.kill()
    with MemoryStore.open(tmp_path) as store, pytest.raises(StoreLocked):
        MemoryStore.open(store.path)


def test_readers_see_whole_moments_while_a_writer_writes(tmp_path):
    pairs = 25
    failures: list[BaseException] = []

    def write():
        try:
            for i in range(pairs):
                store.add_observations([Heard(f"left {i}"), Heard(f"right {i}")])
                store.commit_night(str(i).encode() * 1000, consolidated=[2 * i + 1, 2 * i + 2])
        except BaseException as error:
            failures.append(error)

    with MemoryStore.open(tmp_path) as store, MemoryStore.open(tmp_path, read_only=True) as reader:
        writer = threading.Thread(target=write)
        writer.start()
        looks = 0
        while writer.is_alive():
            counts = reader.status()["observations"]
            assert sum(counts.values()) % 2 == 0
            assert counts["heard"] in (0, 2)
            head = reader.head
            assert reader.load_state(head) == (None if head == 0 else str(head - 1).encode() * 1000)
            looks += 1
        writer.join()
        assert failures == []
        assert looks > 3
        assert reader.status()["observations"]["consolidated"] == 2 * pairs


def test_threads_of_one_process_may_share_a_store(tmp_path):
    with MemoryStore.open(tmp_path) as store:
        threads = [
            threading.Thread(
                target=lambda i=i: [store.add_observation(f"{i} {j}") and store.commit_night(b"x") for j in range(5)]
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [item.id for item in store.history()] == list(range(1, 21))
        assert [night.n for night in store.nights()] == list(range(1, 21))
        assert len(os.listdir(tmp_path / "nights")) == 20


def test_a_reader_cannot_write_and_a_closed_store_says_so(tmp_path):
    with pytest.raises(StoreError, match="no memory"):
        MemoryStore.open(tmp_path / "none", read_only=True)
    with pytest.raises(StoreError, match="no memory"):
        MemoryStore.open(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    store = MemoryStore.open(tmp_path)
    store.close()
    store.close()
    for call in (store.history, store.status, lambda: store.add_observation("x")):
        with pytest.raises(StoreError, match="closed"):
            call()
    with MemoryStore.open(tmp_path, read_only=True) as reader:
        for call in (
            lambda: reader.add_observation("x"),
            lambda: reader.commit_night(b"x"),
            lambda: reader.rollback(0),
            lambda: reader.forget([]),
            lambda: reader.prune([]),
            lambda: reader.update_settings(a=1),
        ):
            with pytest.raises(StoreError, match="read-only"):
                call()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="thesis"):
        MemoryStore.open(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        MemoryStore.open(tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_imports_without_torch():
    script = "import sys; import everlearn.learner.store; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_quick_enough(tmp_path):
    with MemoryStore.open(tmp_path) as store:
        store.add_observations([Heard(f"fact {i} " * 20) for i in range(2000)])
    took = []
    for _ in range(5):
        start = time.perf_counter()
        with MemoryStore.open(tmp_path) as store:
            opened = time.perf_counter()
            store.add_observation("one more")
            took.append((opened - start, time.perf_counter() - opened))
    assert min(first for first, _ in took) < 0.1
    assert min(second for _, second in took) < 0.05
