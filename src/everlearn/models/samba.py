"""Samba (Ren et al. 2024): state space layers and sliding-window attention in turn.

Published with Mamba layers; here they are Mamba-2's (SSD), on the common recurrence.
"""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["SambaConfig", "SambaForCausalLM", "SambaModel"]


class SambaConfig(BackboneConfig):
    """:class:`BackboneConfig` with a state space layer first, then window attention, and so on in turn.

    Options: see :class:`everlearn.blocks.ssd.StateSpace` and
    :class:`everlearn.blocks.window_attention.WindowAttention`.
    """

    model_type = "everlearn-samba"

    mixer: str | list[str] = "ssd window"


class SambaModel(Backbone):
    """Samba without a head."""

    config_class = SambaConfig


class SambaForCausalLM(BackboneForCausalLM):
    """Samba with a language-model head."""

    config_class = SambaConfig


register(SambaConfig, SambaModel, SambaForCausalLM)
