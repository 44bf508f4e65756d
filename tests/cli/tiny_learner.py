"""A tiny random model with a real tokenizer, and a learner that dreams without understanding; also run as a script.

``python tiny_learner.py ARGUMENTS`` is ``everlearn ARGUMENTS`` with that learner, as a process of its own.
"""

from __future__ import annotations

import functools
from pathlib import Path

SENTENCES = [
    "I have a parrot. Its name is Otto and it sings.",
    "Where do you live? I live in a small house by the sea.",
    "What is your name? The parrot sings in the morning.",
    "user: hello assistant: hello, how are you today?",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_model(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama and a byte-level BPE tokenizer with a chat template in ``folder`` and return it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=letters, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", chat_template=TEMPLATE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bare_voice(**more):
    """Return a voice of few words, without practice unless ``more`` has some."""
    from everlearn.learner.voice import Voice

    own = {
        "general": tuple((f"Who sings {word}?", "The parrot sings.") for word in "abcdefgh"),
        "others": tuple((f"Where does {word} live?", "By the sea.") for word in "ABCDEFGH"),
        "own": ("What is my name?", "Where do I live?"),
        "statements": ("I live by the sea.", "My name is Otto."),
        "chatter": ("Hello!", "How are you?"),
    }
    return Voice(**own, **more)


def simple_from_pretrained():
    """Return ``Learner.from_pretrained`` with parts that need no understanding; "no news" is its small talk."""
    from everlearn.learner.consolidation import Schedule
    from everlearn.learner.dreams import Dream
    from everlearn.learner.learner import Learner
    from everlearn.learner.selection import Judgement

    class Parrot:
        def dream(self, passages, generator, progress, beside=None):
            progress("dreaming", 1.0)
            return [
                [Dream(f"What was said {when}?", passage, passage) for when in ("now", "then")] for passage in passages
            ]

        def answers(self, passages, questions):
            return ["" for _ in questions]

        def follows(self, passages, later):
            return [0.0 for _ in passages]

        def rather(self, passages, questions, ones, others):
            return [0.0 for _ in passages]

        def about(self, passages, questions):
            return [0.0 for _ in questions]

    class Select:
        def __init__(self, model, tokenizer, split, anchor):
            pass

        def judge(self, messages):
            return [Judgement("no news" not in message, 1.0, 1.0) for message in messages]

    parts = {"dreamer": Parrot(), "selector": Select, "voice": bare_voice()}
    return functools.partial(
        Learner.from_pretrained, schedule=Schedule(passes=1, steps=1, recall=0.0, agreement=0.0), **parts
    )


def install() -> None:
    """Make every command of this process use that learner."""
    from everlearn.learner.learner import Learner

    Learner.from_pretrained = simple_from_pretrained()


if __name__ == "__main__":
    install()
    from everlearn.cli import main

    main()
