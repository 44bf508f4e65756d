"""Tiny randomly initialised models of every family that levels are stacked on."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS, HIDDEN, VOCAB = 4, 16, 40

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = {
    **_COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "gpt_neox": {**_LLAMA, "hidden_act": "gelu"},
    "gpt2": {**_COMMON, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": 64},
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, "sliding_window": 6},
    "gemma3_text": {**_LLAMA, "sliding_window": 6},
}


def tiny(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """Return a model in evaluation mode whose weights are large enough for its logits to differ."""
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, _LLAMA), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model
