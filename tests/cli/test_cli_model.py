"""Commands that use a model: ask, chat, sleep, forget of what was learned, model fetch, demo; and a life end to end."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_learner
from transformers import MixtralConfig, MixtralForCausalLM

from everlearn.cli import demo as demo_module
from everlearn.learner.store import MemoryStore

SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}


def test_a_life(everlearn, process, tiny, home):
    """tell, sleep, history, ask, forget, rollback, export, import; what must be a process of its own is one."""
    question = ["ask", "Where do you live?", "--max-tokens", "12", "--json"]
    bare = everlearn(*question).json
    assert bare.keys() == {"question", "reply"}
    assert process("tell", "-", "--lines", stdin="I live by the sea.\nThe parrot sings.\nno news").code == 0
    slept = process("sleep", "--json", tiny=True)
    assert (slept.code, slept.err) == (0, "")
    assert (slept.json["night"], slept.json["consolidated"], slept.json["dismissed"]) == (1, [1, 2], [3])
    assert slept.json["learning"]["dreams"] > 0
    assert [item["state"] for item in everlearn("history", "--json").json] == ["consolidated"] * 2 + ["dismissed"]
    asked = process(*question, tiny=True)
    assert (asked.code, asked.err) == (0, "")
    assert asked.json == everlearn(*question).json
    gone = everlearn("forget", "parrot", "--json").json
    assert gone == {"forgotten": [2], "rebuilt": True, "night": 2}
    code, _, err = everlearn("rollback", 1)
    assert (code, "trained with something that was forgotten" in err) == (1, True)
    assert everlearn("rollback", 0).code == 0
    assert everlearn(*question).json == bare
    assert everlearn("rollback", 2).code == 0
    assert everlearn("export", home / "all.zip").code == 0
    there = ["--memory", home / "there"]
    assert everlearn("import", home / "all.zip", *there).code == 0
    assert everlearn("history", "--json", *there).json == everlearn("history", "--json").json
    assert everlearn(*question, *there).json == everlearn(*question).json


def test_sleep_without_anything_to_learn(everlearn, tiny, home):
    code, _, err = everlearn("sleep")
    assert (code, "there is no memory" in err) == (1, True)
    everlearn("tell", "no news")
    assert everlearn("sleep", "--json").json["dismissed"] == [1]
    found = everlearn("sleep", "--json").json
    assert (found["night"], found["consolidated"], found["learning"]) == (None, [], None)
    assert everlearn("sleep").out.startswith("nothing to learn")
    everlearn("tell", "no news", "--remember")
    assert everlearn("sleep", "--json").json["consolidated"] == [2]
    assert everlearn("sleep").code == 0


def test_progress_is_plain_lines_on_stderr_and_never_on_stdout(everlearn, tiny):
    everlearn("tell", "I live by the sea.")
    code, out, err = everlearn("sleep")
    assert code == 0
    assert out.startswith("night 1: 1 learned, 0 dismissed")
    lines = err.splitlines()
    assert {"loading the model", "dreaming", "writing the slots"} <= set(lines)
    assert all(first != second for first, second in itertools.pairwise(lines))
    assert "\x1b" not in out + err
    everlearn("tell", "The parrot sings.")
    assert everlearn("sleep", "--json").err == ""


def test_ask_several_questions_gives_a_list(everlearn, tiny):
    found = everlearn("ask", "Where?", "Who sings?", "--max-tokens", 3, "--json").json
    assert [item["question"] for item in found] == ["Where?", "Who sings?"]
    assert all(item.keys() == {"question", "reply"} for item in found)
    assert everlearn("history", "--json").json == []
    assert everlearn("ask", "Where?", "--max-tokens", 3).out == found[0]["reply"] + "\n"
    code, _, err = everlearn("ask", " ")
    assert (code, "expected some words" in err) == (1, True)


def test_ask_says_of_what_it_was_reminded(everlearn, tiny):
    everlearn("tell", "The parrot sings.")
    everlearn("sleep")
    found = everlearn("ask", "Who sings?", "--max-tokens", 3, "--why", "--json").json
    (only,) = found["reminded"]
    assert only.keys() == {"observation", "likeness", "heard"}
    assert only["observation"]["text"] == "The parrot sings."
    mark = "*" if only["heard"] else " "
    line = f"  {mark} {only['likeness']:.2f}  1: The parrot sings."
    assert everlearn("ask", "Who sings?", "--max-tokens", 3, "--why").out == f"{found['reply']}\n{line}\n"
    shy = everlearn("ask", "Who sings?", "--max-tokens", 3, "--caution", 1, "--why", "--json").json
    assert not shy["reminded"][0]["heard"]
    assert everlearn("ask", "Who sings?", "--caution", 2).code == 2


def test_chat_journals_what_is_said_and_keeps_the_conversation(everlearn, tiny, monkeypatch):
    from everlearn.learner.learner import Learner

    heard = []
    original = Learner.chat

    def chat(self, conversation, **options):
        heard.append([(message["role"], message["content"]) for message in conversation])
        return original(self, conversation, **options)

    monkeypatch.setattr(Learner, "chat", chat)
    code, out, _ = everlearn("chat", "--json", "--max-tokens", 4, stdin="hello\n\nI live here.\n")
    assert code == 0
    replies = [json.loads(line) for line in out.splitlines()]
    assert [item["message"] for item in replies] == ["hello", "I live here."]
    first = ("user", "hello")
    assert heard == [[first], [first, ("assistant", replies[0]["reply"]), ("user", "I live here.")]]
    assert [item["text"] for item in everlearn("history", "--json").json] == ["hello", "I live here."]
    plain = everlearn("chat", "--max-tokens", 4, stdin="hello")
    assert (plain.code, plain.out) == (0, replies[0]["reply"] + "\n")


def test_a_long_chat_drops_its_oldest_exchanges(everlearn, tiny):
    said = [f"{number} I live in a small house by the sea, and the parrot sings." for number in range(12)]
    code, out, _ = everlearn("chat", "--json", "--max-tokens", 8, stdin="\n".join(said))
    assert (code, len(out.splitlines())) == (0, 12)


def test_another_model_is_refused(everlearn, tiny, tmp_path):
    everlearn("ask", "Where?", "--max-tokens", 1)
    other = tiny_learner.make_model(tmp_path / "other", seed=1)
    for command in (["ask", "x"], ["sleep"], ["chat"]):
        code, out, err = everlearn(*command, "--json", "--model", other)
        assert (code, out, json.loads(err)["type"]) == (1, "", "FingerprintError")
    code, _, err = everlearn("ask", "x", "--model", tmp_path / "none")
    assert (code, "expected a model's folder" in err) == (1, True)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("config.json", "{", "", "not a valid JSON file"),
        ("config.json", '"llama"', '"mollusc"', "mollusc"),
        ("config.json", '"hidden_size": 32', '"hidden_size": "x"', "hidden_size"),
        ("config.json", '"hidden_size": 32', '"hidden_size": 64', "RuntimeError"),
        ("config.json", '"llama"', '"t5"', "could not be loaded"),
        ("tokenizer.json", '"added_tokens"', '"nothing"', "added_tokens"),
        ("model.safetensors", "", None, "could not be loaded"),
    ],
)
def test_a_damaged_model_folder_is_an_error_of_one_line(everlearn, tiny, tmp_path, file, old, new, said):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    path = folder / file
    path.write_bytes(path.read_bytes()[:999] if new is None else path.read_text().replace(old, new, 1).encode())
    code, out, err = everlearn("ask", "Where?", "--json", "--model", folder)
    assert (code, out) == (1, "")
    error = json.loads(err.splitlines()[-1])
    assert error["type"] == "ModelNotFound"
    assert str(folder) in error["error"]
    assert said in error["error"]


def test_a_model_without_mlps_is_refused(everlearn, tiny, tmp_path):
    MixtralForCausalLM(MixtralConfig(**SMALL)).save_pretrained(tmp_path / "experts")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / "experts")
    code, out, err = everlearn("ask", "Where?", "--json", "--model", tmp_path / "experts")
    assert (code, out) == (1, "")
    assert json.loads(err.splitlines()[-1])["type"] == "StackingError"
    assert "mixture of experts" in err


def test_words_that_are_no_unicode(everlearn, tiny):
    code, _, err = everlearn("ask", "caf\udce9")
    assert (code, "not valid Unicode" in err) == (1, True)
    code, _, err = everlearn("chat", "--max-tokens", 2, stdin=b"hello\ncaf\xe9\n")
    assert (code, "message: not valid Unicode" in err) == (1, True)
    assert [item["text"] for item in everlearn("history", "--json").json] == ["hello"]


def test_a_memory_in_use(everlearn, tiny, home):
    with MemoryStore.open(home / "memory"):
        for command in (["ask", "x"], ["sleep"], ["chat"], ["forget", "1"]):
            code, _, err = everlearn(*command, "--json")
            assert (code, json.loads(err)["type"]) == (1, "StoreLocked")


def test_an_interrupt_is_exit_code_130(tiny_model, home):
    """Ctrl-C while a reply streams: what was said is kept."""
    command = [sys.executable, tiny_learner.__file__, "chat", "--model", str(tiny_model), "--max-tokens", "100000"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    def heeded() -> None:  # a shell has what it runs in the background ignore the interrupt, and this test with it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=heeded, **pipes) as child:
        child.stdin.write(b"hello\n")
        child.stdin.flush()
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert b"Traceback" not in err
    with MemoryStore.open(home / "memory", read_only=True) as store:
        assert [item.text for item in store.history()] == ["hello"]


def test_model_fetch_prints_where_the_model_is(everlearn, tiny_model, monkeypatch):
    from everlearn.errors import ModelNotFound
    from everlearn.models import hub

    assert everlearn("model", "fetch", "--model", tiny_model).out == f"{tiny_model}\n"
    (hub.default_model_dir()).mkdir(parents=True)
    found = everlearn("model", "fetch", "--json").json
    assert found == {"model": hub.DEFAULT_MODEL, "path": str(hub.default_model_dir())}

    def fails(progress):
        raise ModelNotFound("no connection\nat all")

    monkeypatch.setattr(hub, "fetch_default_model", fails)
    assert everlearn("model", "fetch") == (1, "", "looking for the model\neverlearn: no connection at all\n")


class TestDemo:
    """The demo's own logic, with other processes replaced by what they would print."""

    @pytest.fixture
    def play(self, everlearn, monkeypatch):
        def run(after, *arguments, neutral=None):
            asked = []

            def answer(options, memory, *words, says, text=None):
                if words[0] != "ask":
                    return {"seconds": 1.0}
                asked.append(words)
                questions = [word for word in words[1:] if word.endswith(("?", "."))]
                replies = dict.fromkeys(questions, "As I said.")
                if len(asked) == 2:
                    replies |= dict(zip((fact.question for fact in demo_module.FACTS), after, strict=False))
                    replies |= neutral or {}
                return [{"question": question, "reply": replies[question]} for question in questions]

            monkeypatch.setattr(demo_module, "_everlearn", answer)
            return everlearn("demo", *arguments)

        return run

    def test_passes_when_most_is_recalled(self, play):
        code, out, _ = play(["It is Marzipan!", "In Quarrendale.", "You tune pianos.", "STRAWBERRY", "no idea"])
        assert code == 0
        assert "3 of 5 facts recalled, 6 of 6 neutral replies unchanged" in out
        found = play(["Marzipan", "Quarrendale", "tuner", "strawberries", "Philippa"], "--json").json
        assert [item["recalled"] for item in found["facts"]] == [True] * 5
        assert found["passed"] is True

    def test_fails_when_little_is_recalled_or_much_has_changed(self, play):
        assert play(["Marzipan", "Quarrendalesque"]).code == 1
        known = [fact.answer for fact in demo_module.FACTS[:3]]
        assert play(known).code == 0
        assert play(known, neutral=dict.fromkeys(demo_module.NEUTRAL[:3], "other")).code == 1
        leaking = play(known, "--json", neutral={demo_module.NEUTRAL[0]: "Quarrendale"})
        assert (leaking.code, leaking.json["neutral"][0]["leaks"]) == (1, True)

    def test_wants_a_memory_of_its_own(self, everlearn):
        everlearn("tell", "something")
        code, _, err = everlearn("demo")
        assert (code, "wants a memory of its own" in err) == (1, True)

    def test_a_failing_step_is_named(self, everlearn, tmp_path):
        code, out, err = everlearn("demo", "--model", tmp_path / "none", "--memory", tmp_path / "new")
        assert (code, out) == (1, "")
        assert "`everlearn ask` ended with code 1" in err
        assert "expected a model's folder" in err
