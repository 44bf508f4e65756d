"""The linear Transformer (Katharopoulos et al. 2020): attention with a feature map and a running sum."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["LinearAttentionConfig", "LinearAttentionForCausalLM", "LinearAttentionModel"]


class LinearAttentionConfig(BackboneConfig):
    """:class:`BackboneConfig` with linear attention in every layer."""

    model_type = "everlearn-linear-attention"

    mixer: str | list[str] = "linear-attention"


class LinearAttentionModel(Backbone):
    """A linear Transformer without a head."""

    config_class = LinearAttentionConfig


class LinearAttentionForCausalLM(BackboneForCausalLM):
    """A linear Transformer with a language-model head."""

    config_class = LinearAttentionConfig


register(LinearAttentionConfig, LinearAttentionModel, LinearAttentionForCausalLM)
