"""EleutherAI's harness runs a saved model from its command line, with no word of everlearn, and gets our numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from everlearn.models.registry import FAMILIES, build

TASKS = Path(__file__).parent / "harness"
PAIRS = [("the cats sleep", "the cats sleeps"), ("she sees him", "she see him"), ("a dog barks", "a dog bark it")]
TEXTS = ["the cats see a dog", "she sees a dog and a dog sees him", "him"]
QUESTIONS = ["she", "a dog sees the cats and"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text in [*sum(PAIRS, ()), *TEXTS, *QUESTIONS] for word in text.split()})
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "<unk>", *words])}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<s>", unk_token="<unk>", bos_token="<s>")


def model_of(family: str, encoder: PreTrainedTokenizerFast):
    config = FAMILIES[family](
        vocab_size=len(encoder), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def log_probability(model, encoder, context: str, text: str) -> float:
    """Of ``text`` after ``context``, or after the token that begins a document."""
    before = encoder(context)["input_ids"] or [encoder.bos_token_id]
    after = encoder(text)["input_ids"]
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logits[torch.arange(len(after)), after].sum().item()


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_saved_folder_loads_without_everlearn_being_imported(tmp_path):
    model = model_of("titans-mac", tokenizer())
    model.save_pretrained(tmp_path)
    assert "auto_map" not in AutoConfig.from_pretrained(tmp_path).to_diff_dict()
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "print(type(model).__module__, model(torch.arange(5)[None]).logits.sum().item())\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    module, total = done.stdout.split()
    assert module == type(model).__module__
    assert float(total) == pytest.approx(model(torch.arange(5)[None]).logits.sum().item(), rel=1e-4, abs=1e-4)


def test_the_harness_gets_our_numbers(tmp_path):
    """BLiMP, LAMBADA and generation from local files: ``lm_eval --model hf --model_args pretrained=DIR``."""
    pytest.importorskip("lm_eval")
    encoder = tokenizer()
    model = model_of("hope", encoder)
    model.save_pretrained(tmp_path / "model")
    encoder.save_pretrained(tmp_path / "model")
    lines(tmp_path / "blimp.jsonl", [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS])
    lines(tmp_path / "lambada.jsonl", [{"text": text} for text in TEXTS[:2]])
    answers = []
    for question in QUESTIONS:
        ids = encoder(question, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answers.append(encoder.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    lines(tmp_path / "answers.jsonl", [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers)])
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32",
        "--tasks", "local_blimp,local_lambada,local_answers", "--include_path", str(TASKS),
        "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "out.json"), "--log_samples",
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = tmp_path.glob("out*.json")
    results = json.loads(report.read_text())["results"]

    good, bad = ([log_probability(model, encoder, "", pair[side]) for pair in PAIRS] for side in (0, 1))
    better = sum(a > b for a, b in zip(good, bad))
    assert results["local_blimp"]["acc,none"] == pytest.approx(better / len(PAIRS))
    last = [log_probability(model, encoder, *text.rsplit(" ", 1)) for text in TEXTS[:2]]
    expected = torch.tensor(last).mean().neg().exp().item()
    assert results["local_lambada"]["perplexity,none"] == pytest.approx(expected, rel=1e-3)
    assert results["local_answers"]["exact_match,none"] == 1.0
