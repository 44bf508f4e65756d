"""Which models take part in a suite, and how they are made equal in parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from everlearn.errors import InvalidArgument
from everlearn.models.backbone_config import BackboneConfig
from everlearn.models.hope import HopeConfig
from everlearn.models.registry import FAMILIES, build, count_parameters, family_config

__all__ = ["Contestant", "Size", "choose", "make"]


@dataclass(frozen=True)
class Contestant:
    """A model under test: a family of the registry with changes to its configuration."""

    name: str
    family: str
    changes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Size:
    """The sizes all models of a suite share.

    Args:
        hidden_size, layers, heads: as everywhere.
        intermediate_size: of HOPE's feed-forward network; the others' are fitted to HOPE's number of parameters.
        memory: fields of HOPE's :class:`SelfModifyingConfig`, ``chunk_size`` among them.
        cms_periods: of HOPE.
        others: changes to the configurations of other families, by name.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    memory: Mapping[str, Any]
    cms_periods: tuple[int, ...] = (1,)
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def hope(self, vocab_size: int, *, tied: bool = True) -> HopeConfig:
        """HOPE's configuration, which the others are compared with."""
        memory = dict(self.memory)
        return HopeConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            chunk_size=memory.pop("chunk_size", None),
            projection_chunk_size=memory.pop("projection_chunk_size", None),
            memory=memory,
            cms_periods=list(self.cms_periods),
            tie_word_embeddings=tied,
        )


def choose(
    names: Sequence[str] | None,
    variants: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    left_out: Sequence[str] = (),
    only_variants: bool = False,
) -> list[Contestant]:
    """Return the models of the given names; None is all families but those left out, and all variants.

    Raises:
        InvalidArgument: a name of neither, or no name at all.
    """
    own = [Contestant(name, family, tuple(changes.items())) for name, (family, changes) in variants.items()]
    families = [] if only_variants else [Contestant(name, name) for name in FAMILIES]
    known = {contestant.name: contestant for contestant in (*families, *own)}
    if names is None:
        return [contestant for name, contestant in known.items() if name not in left_out]
    wanted = [name.replace("_", "-").lower() for name in names]
    odd = [name for name in wanted if name not in known]
    if odd or not wanted:
        raise InvalidArgument(f"models: got {odd or 'none'}, expected some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


def configuration(
    contestant: Contestant,
    size: Size,
    vocab_size: int,
    *,
    tied: bool = True,
    memory: Mapping[str, Any] | None = None,
) -> BackboneConfig:
    """Return the contestant's configuration, as many parameters as HOPE of that size has, within 3%.

    Args:
        contestant: a family of the registry with changes.
        size: the sizes all share.
        vocab_size: of the tokens.
        tied: whether the output layer is the embedding.
        memory: a memory that HOPE has in place of ``size.memory``, its feed-forward network fitted to make up for it.
    """
    like, changes = size.hope(vocab_size, tied=tied), dict(contestant.changes)
    if contestant.family != "hope":
        return family_config(contestant.family, like, **{**size.others.get(contestant.family, {}), **changes})
    if memory is not None:
        like = _as_large(like, replace(size, memory=memory), vocab_size, tied)
    if "memory" in changes:
        changes["memory"] = {**(like.memory or {}), **changes["memory"]}
    return HopeConfig(**{**like.to_diff_dict(), **changes})


def _as_large(like: HopeConfig, size: Size, vocab_size: int, tied: bool) -> HopeConfig:
    """HOPE of a size with the number of parameters that ``like`` has: its feed-forward width is fitted."""
    found = size.hope(vocab_size, tied=tied)
    unit = 3 * size.hidden_size * size.layers
    missing = round((count_parameters(like) - count_parameters(found)) / unit)
    return replace(size, intermediate_size=size.intermediate_size + missing).hope(vocab_size, tied=tied)


def make(contestant: Contestant, size: Size, vocab_size: int, **given: Any) -> Any:
    """Return a new model, drawn from torch's seed; arguments as of :func:`configuration`."""
    return build(configuration(contestant, size, vocab_size, **given))
