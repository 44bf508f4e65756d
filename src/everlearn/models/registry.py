"""All of our model families by name, and how they are made equal in parameters.

Every family is a configuration of the one backbone. To compare them, :func:`family_config` takes the sizes and number
of parameters of one configuration and fits the width of another family's feed-forward network to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from everlearn.errors import InvalidArgument
from everlearn.models.backbone import BackboneForCausalLM
from everlearn.models.backbone_config import BackboneConfig
from everlearn.models.deltanet import DeltaNetConfig
from everlearn.models.gated_deltanet import GatedDeltaNetConfig
from everlearn.models.hope import HopeConfig
from everlearn.models.linear_attention import LinearAttentionConfig
from everlearn.models.lstm import LstmConfig
from everlearn.models.retnet import RetNetConfig
from everlearn.models.samba import SambaConfig
from everlearn.models.titans import TitansConfig
from everlearn.models.transformer import TransformerConfig

__all__ = ["FAMILIES", "build", "count_parameters", "family_config", "family_name"]


def _hope_attention(**fields: Any) -> HopeConfig:
    gated = {"attention": {"output_gate": True}}  # as HOPE's own mixer is
    return HopeConfig(**{"mixer": "attention", "mixer_options": gated, "cms_periods": [1, 8192], **fields})


def _titans_mac(**fields: Any) -> TitansConfig:
    return TitansConfig(**{"mixer": "titans-mac", **fields})


# name -> its configuration from keyword fields
FAMILIES: dict[str, Callable[..., BackboneConfig]] = {
    "hope": HopeConfig,
    "hope-attention": _hope_attention,
    "transformer": TransformerConfig,
    "retnet": RetNetConfig,
    "deltanet": DeltaNetConfig,
    "gated-deltanet": GatedDeltaNetConfig,
    "titans": TitansConfig,
    "titans-mac": _titans_mac,
    "samba": SambaConfig,
    "linear-attention": LinearAttentionConfig,
    "lstm": LstmConfig,
}

# what one family's configuration takes over from another's
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "initializer_range",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
TOLERANCE = 0.03  # how far counts of parameters may be apart in a comparison


def family_name(name: str) -> str:
    """The name as it stands in :data:`FAMILIES` (``_`` and ``-`` are the same); raises InvalidArgument when unknown."""
    found = name.replace("_", "-").lower()
    if found not in FAMILIES:
        raise InvalidArgument(f"name: got {name!r}, expected one of {sorted(FAMILIES)}")
    return found


def family_config(name: str, like: BackboneConfig, **changes: Any) -> BackboneConfig:
    """A configuration of a family with the sizes of ``like`` and, within 3%, as many parameters.

    Args:
        name: a key of :data:`FAMILIES`.
        like: the configuration to be compared with; what is returned when it is of that family already.
        changes: other fields of the configuration; with ``intermediate_size`` among them nothing is fitted.

    Raises:
        InvalidArgument: an unknown name, changes of what ``like`` gives, or a mixer that alone has more parameters.
    """
    make = FAMILIES[family_name(name)]
    if given := sorted(set(changes) & set(SHARED)):
        raise InvalidArgument(f"changes: got {given}, expected them in the configuration to be compared with")
    fields = {**{field: getattr(like, field) for field in SHARED}, **changes}
    plain = make(**fields)
    if type(plain) is type(like) and plain.mixer == like.mixer:
        return type(like)(**{**like.to_diff_dict(), **changes}) if changes else like
    if "intermediate_size" in changes:
        return plain
    target = count_parameters(like)
    step = 8 if plain.hidden_size >= 128 else len(plain.cms_periods)
    small, large = (count_parameters(make(**fields, intermediate_size=i * step)) for i in (1, 2))
    steps = max(1, round(1 + (target - small) / (large - small)))
    config = make(**fields, intermediate_size=steps * step)
    if abs((count := count_parameters(config)) - target) > TOLERANCE * target:
        raise InvalidArgument(
            f"like: got {target} parameters, expected at least about {count}, the fewest {name} has at these sizes"
        )
    return config


def count_parameters(config: BackboneConfig) -> int:
    """Parameters of the model, trainable or not, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def build(config: BackboneConfig) -> BackboneForCausalLM:
    """A new model of a configuration, with a language-model head."""
    return AutoModelForCausalLM.from_config(config)
