"""Gated DeltaNet (Yang et al. 2025): the delta rule with a decay that depends on the input."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["GatedDeltaNetConfig", "GatedDeltaNetForCausalLM", "GatedDeltaNetModel"]


class GatedDeltaNetConfig(BackboneConfig):
    """:class:`BackboneConfig` with the gated delta rule in every layer.

    Options: see :class:`everlearn.blocks.recurrent.GatedDeltaNet`.
    """

    model_type = "everlearn-gated-deltanet"

    mixer: str | list[str] = "gated-delta"


class GatedDeltaNetModel(Backbone):
    """Gated DeltaNet without a head."""

    config_class = GatedDeltaNetConfig


class GatedDeltaNetForCausalLM(BackboneForCausalLM):
    """Gated DeltaNet with a language-model head."""

    config_class = GatedDeltaNetConfig


register(GatedDeltaNetConfig, GatedDeltaNetModel, GatedDeltaNetForCausalLM)
