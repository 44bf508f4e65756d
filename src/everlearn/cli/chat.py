"""``everlearn chat``: a conversation, streamed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from everlearn.cli.options import CautionOption, Options

if TYPE_CHECKING:
    from everlearn.learner import Learner


def chat(
    options: Options,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply.")] = 128,
    caution: CautionOption = None,
) -> None:
    """Talk with it, a line a message; what you say is journalled. The end of input (Ctrl-D) ends the conversation.

    With --json each reply is a line {"message", "reply"}.
    """
    conversation: list[dict[str, str]] = []
    with options.learner(create=True, caution=caution) as (learner, progress):
        progress.close()
        for message in _messages():
            conversation.append({"role": "user", "content": message})
            _shorten(learner, conversation, max_tokens)
            reply = ""
            with contextlib.closing(learner.chat(conversation, max_new_tokens=max_tokens)) as pieces:
                for piece in pieces:
                    reply += piece
                    if not options.as_json:
                        print(piece, end="", flush=True)
            print(json.dumps({"message": message, "reply": reply}, ensure_ascii=False) if options.as_json else "")
            sys.stdout.flush()
            conversation.append({"role": "assistant", "content": reply})


def _messages() -> Iterator[str]:
    """Yield the lines that are not empty, until the end of input; with a prompt where somebody types."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is an error of that line alone
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _shorten(learner: Learner, conversation: list[dict[str, str]], max_tokens: int) -> None:
    """Drop the oldest exchanges of ``conversation``, in place, until it and a reply fit into the model's context."""
    from everlearn.learner.chat import chat_prompt

    room = getattr(learner.base.config, "max_position_embeddings", None)
    while room and len(conversation) > 1:
        prompt = chat_prompt(learner.tokenizer, conversation)
        if len(learner.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + max_tokens <= room:
            return
        del conversation[:2]
