"""Published and small sizes, as functions that make a configuration; keyword arguments replace any of its fields.

A size is given for HOPE; :func:`preset` gives every family in it, equal in parameters ("retnet-tiny", "samba-760m").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everlearn.errors import InvalidArgument
from everlearn.models.backbone_config import BackboneConfig
from everlearn.models.hope import HopeConfig
from everlearn.models.registry import FAMILIES, SHARED, family_config

__all__ = ["PRESETS", "SIZES", "hope_1b3", "hope_760m", "hope_tiny", "preset"]


def hope_tiny(**changes: Any) -> HopeConfig:
    """3.7M parameters beside the embedding: four layers of 256, two levels, for one CPU."""
    fields = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 552,
        "memory": {"width": 16},
        "cms_periods": [1, 2048],
    }
    return HopeConfig(**{**fields, **changes})


def hope_760m(**changes: Any) -> HopeConfig:
    """The paper's middle size: 760M parameters, 32K vocabulary."""
    fields = {
        "vocab_size": 32000,
        "hidden_size": 1536,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "intermediate_size": 3840,
        "cms_periods": [1, 1 << 20],
    }
    return HopeConfig(**{**fields, **changes})


def hope_1b3(**changes: Any) -> HopeConfig:
    """The paper's large size: 1.3B parameters, 32K vocabulary."""
    fields = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "intermediate_size": 4816,
        "cms_periods": [1, 1 << 20],
    }
    return HopeConfig(**{**fields, **changes})


# size -> HOPE in it, to which the other families are fitted
SIZES: dict[str, Callable[..., HopeConfig]] = {"tiny": hope_tiny, "760m": hope_760m, "1b3": hope_1b3}
# names on the command line
PRESETS: tuple[str, ...] = tuple(f"{family}-{size}" for family in FAMILIES for size in SIZES)


def preset(name: str, **changes: Any) -> BackboneConfig:
    """The configuration of a preset by its name (``_`` and ``-`` are the same); raises InvalidArgument when unknown."""
    found = name.replace("_", "-")
    if found not in PRESETS:
        raise InvalidArgument(f"name: got {name!r}, expected one of {sorted(PRESETS)}")
    family, _, size = found.rpartition("-")
    if family == "hope":
        return SIZES[size](**changes)
    like = SIZES[size](**{k: v for k, v in changes.items() if k in SHARED})
    return family_config(family, like, **{k: v for k, v in changes.items() if k not in SHARED})
