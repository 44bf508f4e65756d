"""Transformer++: rotary positions, RMSNorm and SwiGLU on the same backbone, the baseline to measure against."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["TransformerConfig", "TransformerForCausalLM", "TransformerModel"]


class TransformerConfig(BackboneConfig):
    """:class:`BackboneConfig` as it is: attention in every layer, one feed-forward level."""

    model_type = "everlearn-transformer"


class TransformerModel(Backbone):
    """Transformer++ without a head."""

    config_class = TransformerConfig


class TransformerForCausalLM(BackboneForCausalLM):
    """Transformer++ with a language-model head."""

    config_class = TransformerConfig


register(TransformerConfig, TransformerModel, TransformerForCausalLM)
