"""What is measured on a causal LM in an empty context: greedy replies, likelihoods, locality, perplexity and speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument
from everlearn.evals.results import write_json
from everlearn.learner.chat import chat_prompt
from everlearn.learner.sampling import Prompt, common_start, encode, pad_left, pad_token
from everlearn.models.hub import quiet_transformers

REPLY_TOKENS = 20
WINDOW = 512  # tokens of text read at once for perplexity
SPEED_TOKENS, SPEED_ROUNDS = 32, 2
BATCH = 16


def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Return the greedy continuation of each prompt, cut after ``REPLY_TOKENS`` tokens.

    All begin alike, as chat prompts do; what they share is read once, and equal prompts are answered once.
    """
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        return []
    rows = [encode(tokenizer, prompt) for prompt in distinct]
    shared = common_start(rows)
    made = Prompt(model, tokenizer, rows[0][:shared]).sample(
        [row[shared:] for row in rows],
        max_new_tokens=REPLY_TOKENS,
        generator=torch.Generator(),
        temperature=0,
        stop=None if tokenizer.chat_template else "\n",
    )
    said = dict(zip(distinct, made, strict=True))
    return [said[prompt] for prompt in prompts]


@torch.no_grad()
def continuation_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each prompt and the text read after it, the text's tokens [n] and the logits [n + 1, vocab].

    Row i of the logits predicts token i of the text; the last one what comes after it.
    """
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        spoken = [encode(tokenizer, text) for text in texts[part]]
        rows = [torch.cat([encode(tokenizer, p), t]) for p, t in zip(prompts[part], spoken, strict=True)]
        ids, mask = pad_left(rows, pad_token(tokenizer))
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=max(map(len, spoken)) + 1,
        ).logits
        for row, tokens in zip(logits, spoken, strict=True):
            yield tokens, row[len(row) - len(tokens) - 1 :]


def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[float]:
    """Return the mean log-likelihood, in nats per token, of each answer read as the reply to its prompt."""
    return [
        float(logits[:-1].log_softmax(-1).gather(1, tokens[:, None]).mean())
        for tokens, logits in continuation_logits(model, tokenizer, prompts, answers)
    ]


@dataclass(frozen=True)
class Locality:
    """Agreement with the base: share of positions with the same likeliest token, and mean KL(base || model) in nats."""

    top1: float
    kl: float


def locality(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    base_prompts: Sequence[str],
    texts: Sequence[str],
) -> Locality:
    """Compare ``model`` after ``prompts`` with ``base`` after ``base_prompts``, both reading the same ``texts``.

    Every position counts alike: those that predict a token of a text and the one after it.
    """
    same, divergence, count = 0, 0.0, 0
    ours = continuation_logits(model, tokenizer, prompts, texts)
    theirs = continuation_logits(base, tokenizer, base_prompts, texts)
    for (_, logits), (_, reference) in zip(ours, theirs, strict=True):
        same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        p, q = reference.log_softmax(-1), logits.log_softmax(-1)
        divergence += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        count += len(logits)
    return Locality(same / count, max(divergence / count, 0.0))


@torch.no_grad()
def text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> float:
    """Return the mean next-token loss, in nats, on the first ``tokens`` of ``text`` in windows read one by one."""
    with quiet_transformers():
        ids = encode(tokenizer, text[: 16 * tokens])[:tokens]
    total, count = 0.0, 0
    for window in ids.split(WINDOW):
        if len(window) > 1:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    if not count:
        raise InvalidArgument(f"text: got {len(ids)} tokens, expected at least 2")
    return total / count


def speeds(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[PreTrainedModel, str]]) -> list[float]:
    """Return tokens per second while each (model, prompt) writes one reply; taken in turns, the best round counts."""
    best = [0.0] * len(pairs)
    for _ in range(SPEED_ROUNDS):
        for index, (model, prompt) in enumerate(pairs):
            ids = encode(tokenizer, prompt)[None]
            began = time.perf_counter()
            model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=SPEED_TOKENS,
                max_new_tokens=SPEED_TOKENS,
                pad_token_id=pad_token(tokenizer),
            )
            best[index] = max(best[index], SPEED_TOKENS / (time.perf_counter() - began))
    return best


class Reference:
    """What the base model says and how likely it finds things: computed once, kept in a JSON file.

    Args:
        base: the base model.
        tokenizer: its tokenizer.
        path: the file; whoever changes the base or the data takes another.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        self.base, self.tokenizer, self.path = base, tokenizer, path
        self._kept: dict[str, dict[str, Any]] = {"replies": {}, "likelihoods": {}, "losses": {}}
        if path.is_file():
            self._kept = json.loads(path.read_text(encoding="utf-8"))

    def replies(self, questions: Sequence[str]) -> list[str]:
        """Return the base's replies to ``questions``."""
        return self._fill("replies", questions, lambda new: replies(self.base, self.tokenizer, self.prompts(new)))

    def log_likelihoods(self, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the base's mean log-likelihood of each answer to its question."""
        pairs = [f"{question}\n{answer}" for question, answer in zip(questions, answers, strict=True)]
        found = dict(zip(pairs, zip(questions, answers, strict=True), strict=True))

        def compute(new: Sequence[str]) -> list[float]:
            prompts = self.prompts([found[key][0] for key in new])
            return log_likelihoods(self.base, self.tokenizer, prompts, [found[key][1] for key in new])

        return self._fill("likelihoods", pairs, compute)

    def text_loss(self, text: str, tokens: int) -> float:
        """Return the base's loss on the first ``tokens`` of ``text``."""
        key = str(tokens)
        return self._fill("losses", [key], lambda new: [text_loss(self.base, self.tokenizer, text, tokens)])[0]

    def prompts(self, questions: Sequence[str]) -> list[str]:
        """Return the plain chat prompt of each question."""
        return [chat_prompt(self.tokenizer, question) for question in questions]

    def _fill(self, kind: str, keys: Sequence[str], compute: Callable[[list[str]], list[Any]]) -> list[Any]:
        known = self._kept[kind]
        new = [key for key in dict.fromkeys(keys) if key not in known]
        if new:
            known.update(zip(new, compute(new), strict=True))
            write_json(self.path, self._kept)
        return [known[key] for key in keys]
