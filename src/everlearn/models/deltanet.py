"""DeltaNet (Yang et al. 2024): a matrix memory a head, written by the delta rule."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["DeltaNetConfig", "DeltaNetForCausalLM", "DeltaNetModel"]


class DeltaNetConfig(BackboneConfig):
    """:class:`BackboneConfig` with the delta rule in every layer.

    Options: see :class:`everlearn.blocks.recurrent.DeltaNet`.
    """

    model_type = "everlearn-deltanet"

    mixer: str | list[str] = "delta"


class DeltaNetModel(Backbone):
    """DeltaNet without a head."""

    config_class = DeltaNetConfig


class DeltaNetForCausalLM(BackboneForCausalLM):
    """DeltaNet with a language-model head."""

    config_class = DeltaNetConfig


register(DeltaNetConfig, DeltaNetModel, DeltaNetForCausalLM)
