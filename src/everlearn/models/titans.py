"""Titans (Behrouz, Zhong, Mirrokni 2025): a neural memory as the mixer of every layer, or as context of attention."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel"]


class TitansConfig(BackboneConfig):
    """:class:`BackboneConfig` with a neural memory in every layer; ``mixer="titans-mac"`` is memory as context.

    Options: see :class:`everlearn.blocks.titans.TitansMixer` and :class:`everlearn.blocks.titans.MemoryAsContext`.
    """

    model_type = "everlearn-titans"

    mixer: str | list[str] = "titans"


class TitansModel(Backbone):
    """Titans without a head."""

    config_class = TitansConfig


class TitansForCausalLM(BackboneForCausalLM):
    """Titans with a language-model head."""

    config_class = TitansConfig


register(TitansConfig, TitansModel, TitansForCausalLM)
