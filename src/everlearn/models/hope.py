"""HOPE (*Nested Learning*, section 8.3): self-modifying memories and a continuum memory system.

``HopeConfig(mixer="attention")`` is HOPE-Attention: softmax attention in the first half of every layer.
"""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["HopeConfig", "HopeForCausalLM", "HopeModel"]


class HopeConfig(BackboneConfig):
    """:class:`BackboneConfig` with a self-modifying memory in every layer."""

    model_type = "everlearn-hope"

    mixer: str | list[str] = "hope"


class HopeModel(Backbone):
    """HOPE without a head."""

    config_class = HopeConfig


class HopeForCausalLM(BackboneForCausalLM):
    """HOPE with a language-model head."""

    config_class = HopeConfig


register(HopeConfig, HopeModel, HopeForCausalLM)
