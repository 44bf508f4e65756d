"""``generate``: continue a text with a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import everlearn.models.registry  # noqa: F401  (makes all configurations known to the Auto classes)
from everlearn.errors import InvalidArgument, ModelNotFound

__all__ = ["generate"]


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
) -> str:
    """Continue ``prompt``.

    Args:
        model: a folder with a model and its tokenizer, as :func:`everlearn.train.train` leaves it.
        prompt: the text to continue; empty starts a document.
        max_new_tokens: longest continuation.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this probability.
        seed: makes sampling repeatable.

    Returns:
        the continuation, without the prompt.

    Raises:
        ModelNotFound: no model there.
        InvalidArgument: numbers out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise InvalidArgument(
            f"max_new_tokens, temperature, top_p: got {max_new_tokens}, {temperature}, {top_p}, "
            "expected at least 1, at least 0, and in (0, 1]"
        )
    if not (Path(model) / "config.json").is_file():
        raise ModelNotFound(f"model: {model} holds no model (config.json is missing)")
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    made: Any = AutoModelForCausalLM.from_pretrained(str(model)).eval()
    ids = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    out = made.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
