"""The sequence mixers a layer of the backbone can have, by name, and their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from everlearn.blocks.attention import Attention
from everlearn.blocks.hope import SelfModifyingMixer
from everlearn.blocks.lstm import Lstm
from everlearn.blocks.recurrent import DeltaNet, GatedDeltaNet, LinearAttention, Retention
from everlearn.blocks.ssd import StateSpace
from everlearn.blocks.titans import MemoryAsContext, TitansMixer
from everlearn.blocks.window_attention import WindowAttention
from everlearn.errors import InvalidArgument

if TYPE_CHECKING:
    from everlearn.models.backbone_config import BackboneConfig

__all__ = ["MIXERS", "check_options", "make_mixer"]

# name in the config -> a module (x, state, context) -> (y, state), made with the sizes and options it has names for
MIXERS: dict[str, Callable[..., nn.Module]] = {
    "hope": SelfModifyingMixer,
    "attention": Attention,
    "window": WindowAttention,
    "linear-attention": LinearAttention,
    "retention": Retention,
    "delta": DeltaNet,
    "gated-delta": GatedDeltaNet,
    "ssd": StateSpace,
    "titans": TitansMixer,
    "titans-mac": MemoryAsContext,
    "lstm": Lstm,
}


def _given(config: BackboneConfig) -> dict[str, Any]:
    """What a mixer takes from the model's configuration, by the names of its arguments."""
    return {
        "config": config.memory_config(),
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "chunk_size": config.chunk_size,
        "rope_theta": config.rope_theta,
        "eps": config.rms_norm_eps,
    }


def make_mixer(name: str, config: BackboneConfig) -> nn.Module:
    """The mixer of one layer; raises InvalidArgument on a size that does not fit."""
    takes = inspect.signature(MIXERS[name]).parameters
    given = {key: value for key, value in _given(config).items() if key in takes}
    return MIXERS[name](**given, **(config.mixer_options or {}).get(name, {}))


def check_options(options: Mapping[str, Any], config: BackboneConfig) -> None:
    """Raise InvalidArgument where ``mixer_options`` name a mixer or an option that is not there."""
    if unknown := set(options) - set(MIXERS):
        raise InvalidArgument(f"mixer_options: got {sorted(unknown)}, expected names out of {sorted(MIXERS)}")
    for name, own in options.items():
        free = set(inspect.signature(MIXERS[name]).parameters) - set(_given(config))
        if not isinstance(own, Mapping) or set(own) - free:
            raise InvalidArgument(f"mixer_options: got {own!r} for {name!r}, expected options out of {sorted(free)}")
