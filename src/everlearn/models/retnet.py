"""RetNet (Sun et al. 2023): multi-scale retention in place of attention."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["RetNetConfig", "RetNetForCausalLM", "RetNetModel"]


class RetNetConfig(BackboneConfig):
    """:class:`BackboneConfig` with retention in every layer.

    Options: see :class:`everlearn.blocks.recurrent.Retention`.
    """

    model_type = "everlearn-retnet"

    mixer: str | list[str] = "retention"


class RetNetModel(Backbone):
    """RetNet without a head."""

    config_class = RetNetConfig


class RetNetForCausalLM(BackboneForCausalLM):
    """RetNet with a language-model head."""

    config_class = RetNetConfig


register(RetNetConfig, RetNetModel, RetNetForCausalLM)
