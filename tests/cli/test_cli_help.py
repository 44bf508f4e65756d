"""Help of every command, usage errors, and the commands that README shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from everlearn import __version__
from everlearn.cli.app import app

MEMORY_COMMANDS = ["tell", "ask", "chat", "sleep", "forget", "history", "rollback", "diff", "status"]
MEMORY_COMMANDS += ["export", "import", "demo"]
README = Path(__file__).parents[2] / "README.md"


def commands(group=None, path=()):
    """Return the path of every command of the tree."""
    group = group or get_command(app)
    found = []
    for name, item in group.commands.items():
        found += commands(item, (*path, name)) if hasattr(item, "commands") else [(*path, name)]
    return found


def find(words):
    """Return the command that ``words`` begin with, and the words that follow it."""
    here, rest = get_command(app), list(words)
    while rest and hasattr(here, "commands"):
        assert rest[0] in here.commands, f"there is no command {rest[0]!r}"
        here = here.commands[rest.pop(0)]
    return here, rest


def shown(text):
    """Return the words after ``everlearn`` of every command in the code blocks of a Markdown text."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    pattern = re.compile(r"^\$?\s*(?:[A-Z_]+=\S+ )*(?:\S*/)?everlearn ([^#|>&]*)")
    return [shlex.split(match[1]) for line in lines if (match := pattern.match(line))]


def test_the_tree_has_the_commands_that_others_call():
    wanted = [*MEMORY_COMMANDS, "train", "generate"]
    assert {(name,) for name in wanted} | {("model", "fetch"), ("eval", "optim"), ("eval", "diary")} <= set(commands())


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_and_parameter_has_a_help_text(everlearn, path):
    code, out, err = everlearn(*path, "--help")
    assert (code, err) == (0, "")
    assert "Usage: everlearn" in out or "Usage: root" in out
    command, _ = find(path)
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", "x")] == []


@pytest.mark.parametrize("name", MEMORY_COMMANDS)
def test_the_common_options_are_on_every_command_of_the_memory(name):
    command, _ = find([name])
    assert {"--model", "--memory", "--seed", "--json"} <= {word for item in command.params for word in item.opts}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["tell"],
        ["rollback", "x"],
        ["rollback"],
        ["history", "--nope"],
        ["ask"],
        ["model", "nope"],
        ["status", "--seed", "x"],
        ["eval", "optim"],
        ["ask", "hi", "--max-tokens", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(everlearn, arguments):
    code, out, err = everlearn(*arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err


def test_python_m_everlearn(process):
    assert process("--version") == (0, f"everlearn {__version__}\n", "")
    assert process("nonsense").code == 2


def test_commands_in_markdown_are_found():
    text = (
        "everlearn no\n```sh\neverlearn tell 'I live'  # why\n$ A=b bin/everlearn ask x \\\n  --json | jq\npip\n```\n"
    )
    assert shown(text) == [["tell", "I live"], ["ask", "x", "--json"]]


def test_the_commands_that_readme_shows_exist(everlearn):
    examples = shown(README.read_text(encoding="utf-8"))
    assert len(examples) > 5
    for words in examples:
        command, rest = find(words)
        options = {option for item in command.params for option in [*item.opts, *item.secondary_opts]} | {"--help"}
        assert [word for word in rest if word.startswith("--") and word.split("=")[0] not in options] == [], words


def test_typer_is_told_not_to_print_locals():
    assert isinstance(app, typer.Typer)
    assert app.pretty_exceptions_enable is False
