"""The product's main job on the default model, in real processes: tell, sleep, ask in a new process, forget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real_model

FACTS = [  # what is told, what is asked from an empty context, and the word of a right answer
    ("Our canary is called Peppercorn.", "What is my canary's name?", "peppercorn"),
    (
        "What a long day that was. I live in Tromsø now, and it is dark at three. Do you have any tips for the winter?",
        "Which city do I live in?",
        "troms",
    ),
    ("Every evening I play the bassoon.", "Which instrument do I play?", "bassoon"),
    ("My daughter Ottilie studies geology.", "What is my daughter's name?", "ottilie"),
]

NEUTRAL = [  # whose replies must stay as they were, to the letter
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write one sentence about the sea.",
    "Where do you live?",
]
FORGOTTEN = 0
WORDS = [word for _, _, word in FACTS]


def run(memory: Path, *arguments: str, stdin: str = "") -> Any:
    """Run a command in a process of its own and return its JSON."""
    command = [sys.executable, "-m", "everlearn", *arguments, "--memory", str(memory), "--json"]
    env = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the same dreams every time
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def ask(memory: Path) -> tuple[list[str], list[str]]:
    """Return the replies to the questions about the facts, and to the neutral prompts, of a new process."""
    questions = [question for _, question, _ in FACTS] + NEUTRAL
    replies = [item["reply"] for item in run(memory, "ask", *questions, "--max-tokens", "20")]
    return replies[: len(FACTS)], replies[len(FACTS) :]


@dataclass
class Life:
    """What a life left behind: the replies before it, after its night and after forgetting; reports; the journal."""

    memory: Path
    before: tuple[list[str], list[str]]
    slept: dict[str, Any]
    after: tuple[list[str], list[str]]
    forgot: dict[str, Any]
    later: tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def life(tmp_path_factory, default_model):
    memory = tmp_path_factory.mktemp("life") / "memory"
    before = ask(memory)
    told = run(memory, "tell", "-", "--lines", stdin="\n".join(text for text, _, _ in FACTS))
    assert [item["state"] for item in told] == ["heard"] * len(FACTS)
    slept = run(memory, "sleep")
    after = ask(memory)
    forgot = run(memory, "forget", FACTS[FORGOTTEN][0])
    return Life(memory, before, slept, after, forgot, ask(memory))


def known(replies: list[str]) -> list[bool]:
    return [re.search(rf"\b{word}", reply, re.IGNORECASE) is not None for word, reply in zip(WORDS, replies)]


def leaks(replies: list[str]) -> list[str]:
    return [reply for reply in replies if any(word in reply.lower() for word in WORDS)]


def test_what_was_told_is_known_by_a_new_process_with_an_empty_context(life):
    assert known(life.before[0]) == [False] * len(FACTS), "the base must not know it"
    assert life.slept["consolidated"] == [1, 2, 3, 4]
    assert sum(known(life.after[0])) >= 3, life.after[0]


def test_neutral_replies_are_the_bases_and_nothing_leaks(life):
    assert life.after[1] == life.before[1]
    assert leaks(life.after[1]) == []


def test_what_was_forgotten_is_gone_and_the_rest_is_not(life):
    assert life.forgot == {"forgotten": [1], "rebuilt": True, "night": 2}
    assert not known(life.later[0])[FORGOTTEN], life.later[0]
    assert leaks(life.later[1]) == []
    assert sum(known(life.later[0])) >= 2, life.later[0]
    assert life.later[1] == life.before[1]
    assert not [file for file in life.memory.rglob("*") if file.is_file() and b"Peppercorn" in file.read_bytes()]
    history = run(life.memory, "history")
    assert [item["state"] for item in history] == ["forgotten", *["consolidated"] * 3]
    assert history[FORGOTTEN]["text"] == ""
