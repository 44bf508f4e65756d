"""An LSTM in every layer of the backbone, the sequential baseline of the formal languages."""

from __future__ import annotations

from everlearn.models.backbone import Backbone, BackboneForCausalLM, register
from everlearn.models.backbone_config import BackboneConfig

__all__ = ["LstmConfig", "LstmForCausalLM", "LstmModel"]


class LstmConfig(BackboneConfig):
    """:class:`BackboneConfig` with an LSTM in every layer."""

    model_type = "everlearn-lstm"

    mixer: str | list[str] = "lstm"


class LstmModel(Backbone):
    """An LSTM without a head."""

    config_class = LstmConfig


class LstmForCausalLM(BackboneForCausalLM):
    """An LSTM with a language-model head."""

    config_class = LstmConfig


register(LstmConfig, LstmModel, LstmForCausalLM)
