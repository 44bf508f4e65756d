"""Talking: how a conversation becomes a prompt, and how the reply streams back."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from everlearn.errors import InvalidArgument
from everlearn.learner.sampling import encode, pad_token
from everlearn.learner.store.records import check_json

Message = Mapping[str, str]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, conversation: str | Sequence[Message]) -> str:
    """Return the text after which the model's reply begins; a string is the first message of a new conversation.

    A tokenizer without a chat template gets plain ``User:`` and ``Assistant:`` lines.
    """
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
    if not messages or not messages[-1].get("content", "").strip():
        raise InvalidArgument("message: got nothing, expected some words")
    for message in messages:
        check_json("message", message.get("content"))
    if tokenizer.chat_template:
        plain = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    lines = [f"{message['role'].capitalize()}: {message['content'].strip()}\n" for message in messages]
    return "".join(lines) + "Assistant:"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what ends the assistant's turn: the end token, or a line end where there is no chat template."""
    return str(tokenizer.eos_token) if tokenizer.chat_template and tokenizer.eos_token else "\n"


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: str | Sequence[Message],
    *,
    max_new_tokens: int = 128,
    **generate: Any,
) -> Generator[str, None, None]:
    """Yield the reply of ``model`` piece by piece, by default greedily; ``generate`` goes to ``model.generate``.

    A failure of the model is raised here, in the caller's thread. A reply that is not read to its end (an interrupt, or
    ``close``) stops at the next token.
    """
    ids = encode(tokenizer, chat_prompt(tokenizer, conversation))[None].to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": pad_token(tokenizer), **generate}
    if not tokenizer.chat_template:
        options |= {"stop_strings": ["\n"], "tokenizer": tokenizer}
    unwanted = _Unwanted()
    options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), unwanted])
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    max_new_tokens=max_new_tokens,
                    **options,
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        unwanted.set()
        thread.join()
    if failed:
        raise failed[0]


class _Unwanted(StoppingCriteria):
    """Ends a generation once nobody reads it."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)
