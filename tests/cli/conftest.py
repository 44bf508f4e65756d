"""A memory folder, and ways to run the command line: in this process, and as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_learner
from typer.testing import CliRunner

from everlearn.cli.app import app


class Done(NamedTuple):
    """The end of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's places, all in ``tmp_path``."""
    monkeypatch.setenv("EVERLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVERLEARN_MEMORY", str(tmp_path / "memory"))
    monkeypatch.delenv("EVERLEARN_MODEL", raising=False)
    return tmp_path


@pytest.fixture
def everlearn(home):
    """Run a command in this process; an exception that is no exit is a failure of the test."""

    def run(*arguments, stdin: str | bytes | None = None) -> Done:
        result = CliRunner().invoke(app, list(map(str, arguments)), input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process(home):
    """Run a command as a process: plain, or (``tiny``) with the learner of ``tiny_learner``."""

    def run(*arguments, tiny: bool = False, stdin: str | bytes = b"", timeout: float = 240) -> Done:
        entry = [str(Path(tiny_learner.__file__))] if tiny else ["-m", "everlearn"]
        done = subprocess.run(
            [sys.executable, *entry, *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=timeout,
            env={**os.environ, "TERM": "dumb"},
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny random model."""
    return tiny_learner.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(home, tiny_model, monkeypatch):
    """Commands of this process use the tiny model and a learner that dreams without understanding."""
    from everlearn.learner.learner import Learner

    monkeypatch.setenv("EVERLEARN_MODEL", str(tiny_model))
    monkeypatch.setattr(Learner, "from_pretrained", tiny_learner.simple_from_pretrained())
    return tiny_model
