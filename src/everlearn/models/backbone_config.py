"""The configuration all of our decoders share; a model family is a few defaults of it."""

from __future__ import annotations

import dataclasses
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from everlearn.errors import InvalidArgument
from everlearn.memories.continuum import check_wiring
from everlearn.memories.self_modifying_config import SelfModifyingConfig
from everlearn.models.mixers import MIXERS, check_options

__all__ = ["BackboneConfig"]

FINDER = "everlearn_model"  # module in a saved folder


class BackboneConfig(PreTrainedConfig):
    """A decoder of ``num_hidden_layers`` layers, each a sequence mixer and a feed-forward network.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads: as everywhere in transformers.
        intermediate_size: width of the feed-forward network, all its levels together; None is 8/3 of ``hidden_size``.
        mixer: the sequence mixer of every layer, a key of ``mixers.MIXERS``; several names with spaces between them
            take turns; or a list with one name a layer.
        chunk_size: chunk of the self-modifying and of Titans' memories; None is the default of
            :class:`SelfModifyingConfig`.
        projection_chunk_size: chunk of their projections' memories; None is ``chunk_size``.
        memory: every other field of :class:`SelfModifyingConfig` that differs from its default.
        mixer_options: for each mixer by its name, the options of its class that differ from their defaults, such as
            ``{"window": {"window": 128}}``.
        cms_periods: tokens between updates of each level of the continuum memory, fastest first; one level is the
            plain feed-forward network. Level 1 with period 1 is updated at every step of the optimiser.
        cms_wiring: ``"sequential"``, ``"nested"`` or ``"independent"``.
        rope_theta: base of the wavelengths of rotary positions, where a mixer uses them.

    Raises:
        InvalidArgument: sizes that do not divide, or names and fields that are not known.
    """

    model_type = "everlearn-backbone"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    mixer: str | list[str] = "attention"
    chunk_size: int | None = None
    projection_chunk_size: int | None = None
    memory: dict[str, Any] | None = None
    mixer_options: dict[str, dict[str, Any]] | None = None
    cms_periods: list[int] | tuple[int, ...] = (1,)
    cms_wiring: str = "sequential"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = max(8, round(self.hidden_size * 8 / 3 / 8) * 8)
        self.memory = dict(self.memory or {})
        self.mixer_options = {name: dict(own) for name, own in (self.mixer_options or {}).items()}
        self.cms_periods = list(self.cms_periods)
        memory = self.memory_config()
        self.chunk_size, self.projection_chunk_size = memory.chunk_size, memory.projection_chunk_size
        self.mixers()
        check_options(self.mixer_options, self)
        check_wiring(self.cms_wiring)
        whole = all(isinstance(p, int) and not isinstance(p, bool) and p >= 1 for p in self.cms_periods)
        if not self.cms_periods or not whole or any(a >= b for a, b in pairwise(self.cms_periods)):
            raise InvalidArgument(f"cms_periods: got {self.cms_periods}, expected rising whole numbers of at least 1")
        kwargs.pop("auto_map", None)  # made anew when saved
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as everywhere in transformers, with a module through which programs that do not know everlearn load it.

        They pass ``trust_remote_code=True``; all that the module does is to import this package.
        """
        names = [type(self).__name__.removesuffix("Config") + end for end in ("Config", "Model", "ForCausalLM")]
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        source = f"from {type(self).__module__} import {', '.join(names)}\n"
        (Path(save_directory) / f"{FINDER}.py").write_text(source, encoding="utf-8")
        auto = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        self.auto_map = {key: f"{FINDER}.{name}" for key, name in zip(auto, names)}
        try:
            super().save_pretrained(save_directory, push_to_hub, **kwargs)
        finally:
            del self.auto_map

    def memory_config(self) -> SelfModifyingConfig:
        """The configuration of one layer's self-modifying memory."""
        fields = {field.name for field in dataclasses.fields(SelfModifyingConfig)}
        own = {"hidden_size": self.hidden_size, "num_heads": self.num_attention_heads}
        if self.chunk_size is not None:
            own |= {"chunk_size": self.chunk_size, "projection_chunk_size": self.projection_chunk_size}
        memory = self.memory or {}
        if unknown := set(memory) - fields | set(memory) & {*own, "chunk_size", "projection_chunk_size"}:
            raise InvalidArgument(
                f"memory: got {sorted(unknown)}, expected fields of SelfModifyingConfig that HopeConfig does not have"
            )
        return SelfModifyingConfig(**own, **memory)

    def mixers(self) -> list[str]:
        """The mixer of each layer."""
        if isinstance(self.mixer, str) and (turns := self.mixer.split()):
            named = [turns[i % len(turns)] for i in range(self.num_hidden_layers)]
        else:
            named = list(self.mixer)
        if len(named) != self.num_hidden_layers:
            raise InvalidArgument(
                f"mixer: got {len(named)} names, expected num_hidden_layers = {self.num_hidden_layers}"
            )
        if unknown := set(named) - set(MIXERS):
            raise InvalidArgument(f"mixer: got {sorted(unknown)}, expected names out of {sorted(MIXERS)}")
        return named

    def level_names(self) -> list[str]:
        """Names of the continuum memory's levels, fastest first."""
        return [f"level{i + 1}" for i in range(len(self.cms_periods))]
