"""kill -9 in the middle of a sleep, in real processes: nothing that was heard is lost and the memory opens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_learner

from everlearn.learner.store import MemoryStore

SCRIPT = Path(tiny_learner.__file__)
CHECKPOINTS = ("snapshot-written", "night-inserted", "night-committed")
KILLED_AT = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from everlearn.learner.store import durable
def kill(name):
    if name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
durable.checkpoint = kill
import tiny_learner
tiny_learner.install()
from everlearn.cli import main
main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_learner.make_model(folder / "model")
    return folder


def environment(world: Path, memory: Path) -> dict[str, str]:
    own = {"EVERLEARN_CACHE": str(world / "cache"), "EVERLEARN_MEMORY": str(memory)}
    return {**os.environ, **own, "EVERLEARN_MODEL": str(world / "model"), "OMP_NUM_THREADS": "1"}


def hear(memory: Path) -> None:
    with MemoryStore.open(memory) as store:
        for text in ("My parrot is Otto.", "I live by the sea.", "no news"):
            store.add_observation(text)


def check(world: Path, memory: Path, states: tuple[str, ...]) -> None:
    """All is there, in one of the two states it may be in, and a sleep goes through."""
    with MemoryStore.open(memory) as store:
        assert [item.text for item in store.history()] == ["My parrot is Otto.", "I live by the sea.", "no news"]
        assert store.history()[0].state in states
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "sleep"], env=environment(world, memory), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with MemoryStore.open(memory) as store:
        assert [item.state for item in store.history()] == ["consolidated", "consolidated", "dismissed"]
        assert store.load_state()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_killed_at_each_step_of_the_commit(world, tmp_path, name):
    memory = tmp_path / "m"
    hear(memory)
    code = KILLED_AT.format(folder=str(SCRIPT.parent), name=name)
    done = subprocess.run(
        [sys.executable, "-c", code, "sleep"], env=environment(world, memory), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    check(world, memory, ("consolidated",) if name == "night-committed" else ("heard",))


@pytest.mark.parametrize("seconds", [2.0, 5.0, 6.5])
def test_killed_at_any_time(world, tmp_path, seconds):
    memory = tmp_path / "m"
    hear(memory)
    process = subprocess.Popen([sys.executable, str(SCRIPT), "sleep"], env=environment(world, memory))
    time.sleep(seconds)
    process.kill()
    process.wait()
    check(world, memory, ("heard", "consolidated"))
