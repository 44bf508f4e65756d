"""A three-day diary, a tiny random Llama with a word-level tokenizer, and a method that recites what it was told."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from everlearn.evals.diary_methods import Journalled

FACTS = [
    {"id": "a", "day": 1, "said": "My name is Zora.", "answer": ["zora"]},
    {"id": "b", "day": 1, "said": "I live in Bergen.", "answer": ["bergen"]},
    {"id": "c", "day": 1, "said": "My PIN is 7391.", "answer": ["7391"], "forget": True},
    {"id": "d", "day": 2, "said": "I moved from Bergen to Oslo.", "answer": ["oslo"], "updates": "b"},
    {"id": "e", "day": 2, "said": "I eat gooseberries.", "answer": ["gooseberr"]},
    {"id": "f", "day": 3, "said": "My cat is Nils.", "answer": ["nils"]},
    {"id": "g", "day": 3, "said": "I left Oslo for Turku.", "answer": ["turku"], "updates": "d"},
]
QUESTIONS = {
    "a": ["What is my name?", "What am I called?", "Who am I?"],
    "c": ["What is my PIN?", "Which digits do I type?", "What opens the machine?"],
    "e": ["What do I eat?", "Which fruit is mine?", "What is in my pie?"],
    "f": ["What is my cat called?", "Who is my cat?", "Who sits on my lap?"],
}
HOME = ["Where do I live?", "Which town is mine?", "Where does a letter reach me?"]
NEUTRAL = ["Who wrote Hamlet?", "Name a town.", "What is two plus two?"]
SMALLTALK = ["Hello there!", "Okay.", "That is funny.", "See you."]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def write_data(folder: Path, split: str = "mini") -> Path:
    """Write the diary and a text into ``folder``, laid out like the data folder."""
    diary = folder / "diary"
    diary.mkdir(parents=True)
    rows = [{**fact, "questions": QUESTIONS.get(fact["id"], HOME), "kind": "test"} for fact in FACTS]
    (diary / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"id": f"n{i}", "prompt": text, "kind": "general"} for i, text in enumerate(NEUTRAL)]
    (diary / f"{split}_neutral.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (diary / f"{split}_smalltalk.txt").write_text("\n".join(SMALLTALK) + "\n")
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text("What is my name ? Hello there ! " * 40)
    return folder


def write_model(folder: Path) -> str:
    """Save a random Llama of four layers and its tokenizer in ``folder``; return its path."""
    texts = [fact["said"] for fact in FACTS] + [q for qs in [*QUESTIONS.values(), HOME] for q in qs]
    pre = pre_tokenizers.Whitespace()
    words = [
        word for text in [*texts, *NEUTRAL, *SMALLTALK, "user assistant 7391"] for word, _ in pre.pre_tokenize_str(text)
    ]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    config = AutoConfig.for_model(
        "llama", vocab_size=len(vocab), hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Reciter(Journalled):
    """Replies with every message it was told that the question is about; the newest alone with ``newest``."""

    newest = True

    def reply(self, questions):
        """Recite."""
        return [self._recite(question) for question in questions]

    def _recite(self, question):
        said = [f.said for f in self.setting.diary.facts if question in f.questions and f.said in self.told]
        return " ".join(said[-1:] if self.newest else said) or "I do not know."
