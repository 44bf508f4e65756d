"""Published and small sizes, as functions that make a configuration; keyword arguments replace any of its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everlearn.errors import InvalidArgument
from everlearn.models.backbone_config import BackboneConfig
from everlearn.models.hope import HopeConfig
from everlearn.models.transformer import TransformerConfig

__all__ = ["PRESETS", "hope_1b3", "hope_760m", "hope_attention_tiny", "hope_tiny", "preset", "transformer_tiny"]


def hope_tiny(**changes: Any) -> HopeConfig:
    """3.6M parameters beside the embedding: four layers of 256, for one CPU."""
    fields = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 640,
        "memory": {"width": 32},
    }
    return HopeConfig(**{**fields, **changes})


def hope_attention_tiny(**changes: Any) -> HopeConfig:
    """HOPE-Attention of the size of :func:`hope_tiny`: attention and a continuum memory of two levels."""
    fields = {**_transformer_fields(), "mixer": "attention", "cms_periods": [1, 8192]}
    return HopeConfig(**{**fields, **changes})


def transformer_tiny(**changes: Any) -> TransformerConfig:
    """A Transformer++ of as many parameters as :func:`hope_tiny`."""
    return TransformerConfig(**{**_transformer_fields(), **changes})


def _transformer_fields() -> dict[str, Any]:
    return {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 928,
    }


def hope_760m(**changes: Any) -> HopeConfig:
    """The paper's middle size: 760M parameters, 32K vocabulary."""
    fields = {
        "vocab_size": 32000,
        "hidden_size": 1536,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "intermediate_size": 4352,
    }
    return HopeConfig(**{**fields, **changes})


def hope_1b3(**changes: Any) -> HopeConfig:
    """The paper's large size: 1.3B parameters, 32K vocabulary."""
    fields = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "intermediate_size": 5504,
    }
    return HopeConfig(**{**fields, **changes})


# name on the command line -> what makes the configuration
PRESETS: dict[str, Callable[..., BackboneConfig]] = {
    "hope-tiny": hope_tiny,
    "hope-attention-tiny": hope_attention_tiny,
    "transformer-tiny": transformer_tiny,
    "hope-760m": hope_760m,
    "hope-1b3": hope_1b3,
}


def preset(name: str, **changes: Any) -> BackboneConfig:
    """The configuration of a preset by its name (``_`` and ``-`` are the same); raises InvalidArgument when unknown."""
    found = PRESETS.get(name.replace("_", "-"))
    if found is None:
        raise InvalidArgument(f"name: got {name!r}, expected one of {sorted(PRESETS)}")
    return found(**changes)
