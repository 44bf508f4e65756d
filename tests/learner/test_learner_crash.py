"""kill -9 of whole processes, asleep, forgetting and chatting: nothing that was heard is lost and the memory opens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_learner

from everlearn.learner.store import MemoryStore
from everlearn.models.hub import load_model

TOLD = ["My parrot is Otto.", "I live by the sea.", "no news"]
# `everlearn ARGUMENTS` on the tiny model, which kills itself at a checkpoint of the store
CHILD = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from everlearn.learner.store import durable
def kill(name):
    if name == {where!r}:
        os.kill(os.getpid(), signal.SIGKILL)
durable.checkpoint = kill
import tiny_learner
tiny_learner.install()
from everlearn.cli import main
main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, and a cache in which its anchor stays."""
    folder = tmp_path_factory.mktemp("world")
    tiny_learner.make_model(folder / "model")
    return folder, load_model(str(folder / "model"))


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """The environment of a user who was told three things; returns the memory's folder."""
    monkeypatch.setenv("EVERLEARN_CACHE", str(world[0] / "cache"))
    monkeypatch.setenv("EVERLEARN_MEMORY", str(tmp_path / "m"))
    monkeypatch.setenv("EVERLEARN_MODEL", str(world[0] / "model"))
    with MemoryStore.open(tmp_path / "m") as store:
        for text in TOLD:
            store.add_observation(text)
    return tmp_path / "m"


def learner(world, place):
    base, tokenizer = world[1]
    return tiny_learner.simple_from_pretrained()(base, tokenizer=tokenizer, memory=place)


def start(*arguments: str, where: str = "") -> subprocess.Popen[str]:
    code = CHILD.format(folder=str(Path(tiny_learner.__file__).parent), where=where)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def die(*arguments: str, stage: str = "", where: str = "") -> None:
    """Run a command and kill it when it reports ``stage``, or let it kill itself at the checkpoint ``where``."""
    with start(*arguments, where=where) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line.strip())
            if stage and line.startswith(stage):
                os.kill(child.pid, signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL, said


def heard(place: Path) -> tuple[list[str], list[str]]:
    """Return the texts and the states, which anybody may read at once."""
    with MemoryStore.open(place, read_only=True) as store:
        items = store.history()
    return [item.text for item in items], [item.state for item in items]


@pytest.mark.parametrize(
    ("stage", "where", "committed"),
    [
        ("dreaming", "", False),
        ("writing the slots", "", False),
        ("", "night-inserted", False),
        ("", "night-committed", True),
    ],
)
def test_killed_asleep(world, place, stage, where, committed):
    die("sleep", stage=stage, where=where)
    done = ["consolidated", "consolidated", "dismissed"]
    assert heard(place) == (TOLD, done if committed else ["heard"] * 3)
    with learner(world, place) as one:
        assert one.store.head == (1 if committed else 0)
        one.sleep()
        assert one.store.head == 1
        assert one.store.load_state()
    assert heard(place) == (TOLD, done)
    assert sorted(file.name for file in (place / "nights").iterdir()) == ["0001.safetensors"]


@pytest.mark.parametrize(
    ("stage", "where", "committed"),
    [("writing the slots", "", False), ("", "forget-erased", False), ("", "forget-committed", True)],
)
def test_killed_forgetting_what_was_learned(world, place, stage, where, committed):
    with learner(world, place) as one:
        one.sleep()
    die("forget", "1", stage=stage, where=where)
    texts, states = heard(place)
    assert states == ["forgotten" if committed else "consolidated", "consolidated", "dismissed"]
    assert texts == ["" if committed else TOLD[0], *TOLD[1:]]
    with learner(world, place) as one:
        assert one.store.head == (2 if committed else 1)
        if not committed:
            one.forget(1)
    assert not [file for file in place.rglob("*") if file.is_file() and b"Otto" in file.read_bytes()]
    assert [file.name for file in (place / "nights").iterdir()] == ["0002.safetensors"]


def test_killed_while_a_reply_streams(place):
    """What was said is on disk before the first piece of the reply."""
    with start("chat", "--max-tokens", "100000") as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("I sing in the morning.\n")
        child.stdin.flush()
        assert child.stdout.read(1)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert heard(place)[0] == [*TOLD, "I sing in the morning."]
