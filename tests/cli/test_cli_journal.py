"""Commands that need no model: tell, history, status, rollback, diff, export, import, forget of what was only heard."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from everlearn.learner.store import Heard, MemoryStore


@pytest.fixture
def slept(home):
    """A memory of two nights: night 1 learned 1 and dismissed 2, night 2 learned 3; 4 is still heard."""
    with MemoryStore.open(home / "memory", base={"name": "some-model", "fingerprint": "f"}) as store:
        for text in ("I live in Ulm.", "Hello!", "My cat is Mitzi.", "I sing."):
            store.add_observation(text)
        store.commit_night(b"first", consolidated=[1], dismissed=[2])
        store.commit_night(b"second night", consolidated=[3])
    return home / "memory"


def test_tell_prints_the_id_of_what_it_kept(everlearn, home):
    assert everlearn("tell", "I live in Ulm.") == (0, "1\n", "")
    told = everlearn("tell", "Ich heiße [bold]Ørjan[/bold] 🐦", "--remember", "--json").json
    assert (told["id"], told["text"], told["state"]) == (2, "Ich heiße [bold]Ørjan[/bold] 🐦", "heard")
    with MemoryStore.open(home / "memory", read_only=True) as store:
        assert [item.text for item in store.history()] == ["I live in Ulm.", "Ich heiße [bold]Ørjan[/bold] 🐦"]
        assert [item.meta for item in store.history()] == [{}, {"remember": True}]


def test_tell_reads_standard_input_whole_or_by_line(everlearn):
    assert everlearn("tell", "-", stdin="First line\nsecond line\n").out == "1\n"
    assert everlearn("tell", "-", "--lines", stdin="a b\n\n  c d\n").out == "2\n3\n"
    texts = [item["text"] for item in everlearn("history", "--json").json]
    assert texts == ["First line\nsecond line", "a b", "c d"]
    assert [item["id"] for item in everlearn("tell", "e", "--lines", "--json").json] == [4]


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["  "], b"", "expected words"),
        (["-", "--lines"], b"\n \n", "no line with words"),
        (["-"], b"caf\xe9", "not UTF-8"),
    ],
)
def test_tell_refuses_what_it_cannot_keep(everlearn, home, arguments, stdin, said):
    code, out, err = everlearn("tell", *arguments, stdin=stdin)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1
    if (home / "memory").exists():
        assert everlearn("history", "--json").json == []


def test_history_lists_every_observation_with_its_state(everlearn, slept):
    found = everlearn("history", "--json").json
    keys = {"id", "text", "role", "told_at", "meta", "state", "night", "forgotten_at"}
    assert all(set(item) == keys for item in found)
    states = [(item["id"], item["state"], item["night"]) for item in found]
    assert states == [(1, "consolidated", 1), (2, "dismissed", 1), (3, "consolidated", 2), (4, "heard", None)]
    shown = everlearn("history").out
    assert all(text in shown for text in ("I live in Ulm.", "consolidated", "dismissed", "heard"))
    nights = everlearn("history", "--nights", "--json").json
    assert [(night["n"], night["parent"], night["bytes"]) for night in nights] == [(1, 0, 5), (2, 1, 12)]
    assert "current" in everlearn("history", "--nights").out


def test_a_long_history_is_listed_at_once(process, home):
    """Thousands of observations, in less than a second of computing, imports and all."""
    with MemoryStore.open(home / "memory") as store:
        store.add_observations([Heard(f"My neighbour {n}\nkeeps {n} bees.") for n in range(5000)])
    for command in (["history"], ["history", "--json"], ["status"], ["export", home / "all"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = process(*command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.code == 0
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used < 1.0, (command, used)
    lines = process("history").out.splitlines()
    assert len(lines) == 5001
    assert lines[-1].split()[0] == "5000"
    assert lines[-1].endswith("  heard                My neighbour 4999 keeps 4999 bees.")


def test_a_memory_in_the_home_folder(everlearn, home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    assert everlearn("tell", "I live in Ulm.", "--memory", "~/ann").code == 0
    assert (home / "ann" / "memory.json").is_file()
    assert everlearn("export", "~/ann.zip", "--memory", "~/ann").code == 0
    assert everlearn("import", "~/ann.zip", "--memory", "~/twin", "--json").json["path"] == str(home / "twin")


def test_status(everlearn, slept):
    found = everlearn("status", "--json").json
    assert found["observations"] == {"heard": 1, "consolidated": 2, "dismissed": 1, "forgotten": 0}
    assert (found["head"], found["nights"], found["memory_bytes"]) == (2, 2, 12)
    assert found["path"] == str(slept)
    assert "some-model" in everlearn("status").out


def test_rollback_moves_to_a_night_and_back(everlearn, slept):
    assert everlearn("rollback", 1, "--json").json["head"] == 1
    states = [item["state"] for item in everlearn("history", "--json").json]
    assert states == ["consolidated", "dismissed", "heard", "heard"]
    assert everlearn("rollback", 0).code == 0
    assert "2" in everlearn("rollback", 2).out
    with MemoryStore.open(slept, read_only=True) as store:
        assert store.load_state() == b"second night"


def test_diff_of_the_last_night_by_default(everlearn, slept):
    found = everlearn("diff", "--json").json
    assert (found["old"], found["new"], found["unchanged"]) == (1, 2, 1)
    assert found["learned"] == [{"id": 3, "text": "My cat is Mitzi."}]
    back = everlearn("diff", 2, 0, "--json").json
    assert [item["id"] for item in back["unlearned"]] == [1, 3]
    assert "+ 3 My cat is Mitzi." in everlearn("diff", 0).out


def test_export_then_import_gives_the_same_memory(everlearn, slept, home):
    manifest = everlearn("export", home / "all.zip", "--json").json
    assert manifest["file"] == str(home / "all.zip")
    assert manifest["damaged"] == []
    assert everlearn("export", home / "again.zip").code == 0
    before = everlearn("history", "--json").json
    found = everlearn("import", home / "all.zip", "--memory", home / "other", "--json").json
    assert (found["path"], found["head"]) == (str(home / "other"), 2)
    assert everlearn("history", "--memory", home / "other", "--json").json == before
    everlearn("tell", "later", "--memory", home / "other")
    code, _, err = everlearn("import", home / "all.zip", "--memory", home / "other")
    assert (code, "not empty" in err) == (1, True)
    assert everlearn("import", home / "all.zip", "--memory", home / "other", "--replace").code == 0
    assert everlearn("history", "--memory", home / "other", "--json").json == before


def test_forget_by_id_or_by_words_what_was_only_heard(everlearn, slept):
    assert everlearn("forget", "i SING.", "--json").json == {"forgotten": [4], "rebuilt": False, "night": 2}
    assert everlearn("forget", 2).code == 0
    found = everlearn("history", "--json").json
    assert [item["state"] for item in found] == ["consolidated", "forgotten", "consolidated", "forgotten"]
    assert found[3]["text"] == ""
    assert found[3]["forgotten_at"] is not None
    everlearn("tell", "My code is 4711.")
    assert everlearn("forget", 4711, "--json").json["forgotten"] == [5]
    for what, said in (
        ("sing", "nothing that was told"),
        ("i", "observations, name one"),
        ("99", "99"),
        ("2", "already"),
    ):
        code, out, err = everlearn("forget", what)
        assert (code, out) == (1, ""), what
        assert said in err


ERRORS = [
    (["rollback", "7"], "InvalidArgument", "there is no night 7"),
    (["rollback", "9" * 30], "InvalidArgument", "there is no night 9"),
    (["tell", "caf\udce9"], "InvalidArgument", "not valid Unicode"),
    (["forget", "caf\udce9"], "InvalidArgument", "nothing that was told"),
    (["diff", "0", "9"], "InvalidArgument", "there is no night 9"),
    (["import", "missing.zip", "--replace"], "StoreError", "missing.zip"),
    (["status", "--memory", "/nonexistent/place"], "StoreError", "there is no memory"),
]


@pytest.mark.parametrize(("arguments", "kind", "said"), ERRORS)
def test_an_error_is_one_line_on_stderr_and_exit_code_1(everlearn, slept, arguments, kind, said):
    code, out, err = everlearn(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("everlearn: ")
    assert said in err
    assert err.count("\n") == 1
    code, out, err = everlearn(*arguments, "--json")
    assert (code, out) == (1, "")
    found = json.loads(err)
    assert found.keys() == {"error", "type"}
    assert found["type"] == kind
    assert said in found["error"]


def test_a_memory_in_use_can_be_read_but_not_written(process, slept):
    with MemoryStore.open(slept):
        code, out, err = process("tell", "too soon")
        assert (code, out) == (1, "")
        assert "in use by another process" in err
        assert "Traceback" not in err
        assert len(process("history", "--json").json) == 4
    assert process("tell", "now").out == "5\n"


def test_damage_is_said_clearly(process, slept):
    (slept / "nights" / "0001.safetensors").write_bytes(b"other")
    code, _, err = process("rollback", 1)
    assert (code, "damaged" in err, "Traceback" in err) == (1, True, False)
    (slept / "index.sqlite").write_bytes(b"garbage" * 1000)
    for command in (["history"], ["tell", "x"], ["status"], ["rollback", "1"]):
        code, out, err = process(*command)
        assert (code, out, "Traceback" in err) == (1, "", False), command
        assert "index.sqlite" in err


SILENT = """
import sys
sys.argv[0] = "everlearn"
from everlearn.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
heavy = {"torch", "transformers", "numpy", "safetensors"} & sys.modules.keys()
print("code", code, "heavy", sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["sleep", "--help"],
        ["tell", "hello"],
        ["history"],
        ["status", "--json"],
        ["rollback", "1"],
        ["diff"],
        ["export", "all.zip"],
        ["import", "exported.zip", "--replace"],
        ["forget", "4"],
    ],
    ids=" ".join,
)
def test_no_model_is_loaded_where_none_is_needed(slept, arguments):
    with MemoryStore.open(slept) as store:
        store.export(slept.parent / "exported.zip")
    done = subprocess.run(
        [sys.executable, "-c", SILENT, *arguments], cwd=slept.parent, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "code 0 heavy []\n"


def test_a_reader_that_goes_away_is_no_traceback(slept):
    command = f"{sys.executable} -m everlearn history --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, "Traceback" in done.stderr) == ("[", False)
