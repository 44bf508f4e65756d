"""Transformer++ and window attention against Llama and Mistral of transformers, weight for weight."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from everlearn.models.transformer import TransformerConfig, TransformerForCausalLM

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
KINDS = {
    "attention": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)),
}


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's names and parts as ours."""
    ours = {name: state[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    ours["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(SIZES["num_hidden_layers"]):
        old, new = f"model.layers.{i}", f"model.layers.{i}"
        ours[f"{new}.mixer_norm.weight"] = state[f"{old}.input_layernorm.weight"]
        ours[f"{new}.feed_forward_norm.weight"] = state[f"{old}.post_attention_layernorm.weight"]
        parts = [state[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
        ours[f"{new}.mixer.in_proj.weight"] = torch.cat(parts)
        ours[f"{new}.mixer.out_proj.weight"] = state[f"{old}.self_attn.o_proj.weight"]
        parts = [state[f"{old}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        ours[f"{new}.feed_forward.in_proj.weight"] = torch.cat(parts)
        ours[f"{new}.feed_forward.out_proj.weight"] = state[f"{old}.mlp.down_proj.weight"]
    return ours


@pytest.mark.parametrize("mixer", KINDS)
@torch.no_grad()
def test_is_the_model_of_transformers(mixer):
    theirs = KINDS[mixer]().eval()
    for parameter in theirs.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    options = {"mixer_options": {"window": {"window": 5}}} if mixer == "window" else {}
    ours = TransformerForCausalLM(TransformerConfig(**SIZES, mixer=mixer, **options)).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    ids = torch.randint(0, 31, (2, 17))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    prompts, mask = ids[:, :9], torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(prompts, **settings), theirs.generate(prompts, **settings))
