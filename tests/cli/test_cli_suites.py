"""The commands of the from-scratch suites: real runs at the tiny budget, their options and errors, and report."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from everlearn.evals.suites import SUITES

TINY = ["--budget", "tiny", "--seeds", 1, "--models", "transformer"]


def test_a_suite_writes_results_table_and_plots(everlearn, tmp_path):
    out = tmp_path / "formal.json"
    command = ["eval", "formal", *TINY, "--tasks", "aa,parity", "--json", out]
    code, shown, err = everlearn(*command)
    assert code == 0
    assert shown.startswith("# formal: budget tiny\n")
    assert "parity bin2" in shown
    assert json.loads(out.read_text())["complete"] is True
    assert {path.name for path in tmp_path.glob("formal.*")} == {"formal.json", "formal.md", "formal.png", "formal.svg"}
    assert "evaluating formal: aa: transformer, seed 0" in err
    before = out.read_text()
    code, _, err = everlearn(*command)
    assert (code, "seed 0" in err) == (0, False)
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]
    code, listed, _ = everlearn("report", tmp_path)
    assert (code, listed.splitlines()[-1]) == (0, str(tmp_path / "README.md"))
    assert everlearn("report", tmp_path, "--json").json[0] == str(tmp_path / "formal.md")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["formal", *TINY[:-1], "gpt"], "everlearn: models: got ['gpt'], expected some of hope, "),
        (["mad", *TINY, "--tasks", "recall"], "everlearn: tasks: got ['recall'], expected some of in-context-recall"),
        (["lm", *TINY, "--data", "nowhere"], "everlearn: data: got nowhere, expected a folder"),
        (["mad", "--budget", "huge"], "everlearn: budget: got 'huge', expected one of tiny, small, paper"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(everlearn, tmp_path, arguments, words):
    code, shown, err = everlearn("eval", *arguments, "--json", tmp_path / "r.json")
    assert (code, shown) == (1, "")
    assert err.splitlines()[-1].startswith(words)
    assert not (tmp_path / "r.json").exists()


def test_results_of_another_protocol_are_refused(everlearn, tmp_path):
    out = tmp_path / "r.json"
    assert everlearn("eval", "formal", *TINY, "--tasks", "aa", "--json", out).code == 0
    kept = json.loads(out.read_text())
    out.write_text(json.dumps({**kept, "protocol": {**kept["protocol"], "steps": 99}}))
    code, _, err = everlearn("eval", "formal", *TINY, "--tasks", "aa", "--json", out)
    assert code == 1
    assert "was made by another protocol: steps = 99 (now 3)" in err
    code, _, err = everlearn("eval", "mad", *TINY, "--json", out)
    assert "holds results of 'formal', expected 'mad'" in err


def test_an_interrupt_keeps_what_is_finished(everlearn, tmp_path, monkeypatch):
    from everlearn.evals import formal

    suite, runs = SUITES["formal"], []

    def run(*given):
        if runs:
            raise KeyboardInterrupt
        runs.append(given)
        return formal.run(*given)

    monkeypatch.setitem(SUITES, "formal", type(suite)(**{**vars(suite), "run": run}))
    out = tmp_path / "r.json"
    assert everlearn("eval", "formal", *TINY, "--tasks", "aa,parity", "--json", out).code == 130
    kept = json.loads(out.read_text())
    assert (kept["complete"], {row["task"] for row in kept["rows"]}) == (False, {"aa"})


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(home, everlearn, tmp_path):
    out = tmp_path / "r.json"
    command = ["eval", "formal", "--budget", "tiny", "--models", "transformer", "--json", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "everlearn", *command], stderr=subprocess.DEVNULL)
    try:
        while not out.exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    kept = json.loads(out.read_text())
    first = {row["run"] for row in kept["rows"]}
    assert (kept["complete"], "summary" in kept) == (False, False)
    assert 0 < len(first) < 24
    code, _, err = everlearn(*command)
    assert (code, "parity: transformer, seed 0" in err) == (0, False)
    kept = json.loads(out.read_text())
    assert (kept["complete"], len({row["run"] for row in kept["rows"]})) == (True, 24)
    assert [path.name for path in tmp_path.glob(".r.json*")] == []


def test_every_suite_has_a_command(everlearn):
    for name in SUITES:
        help_text = everlearn("eval", name, "--help").out
        for option in ("--models", "--seeds", "--data", "--json", "--budget", "--workers"):
            assert option in help_text


def test_report_without_results(everlearn, tmp_path):
    code, shown, err = everlearn("report", tmp_path)
    assert (code, shown) == (1, "")
    assert err.startswith("everlearn: folder: there is no results file")
