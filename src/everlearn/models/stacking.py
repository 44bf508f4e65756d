"""Ad-hoc level stacking (*Nested Learning*, section 7.3): any pretrained decoder becomes a HOPE-attention model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from everlearn.errors import InvalidArgument, StackingError
from everlearn.levels import Level, check_levels
from everlearn.memories.carried import carry_through
from everlearn.memories.continuum import Continuum, check_wiring
from everlearn.memories.residual import DEFAULT_WIDTH, ResidualMemory
from everlearn.models.structure import Decoder, find_decoder

Model = TypeVar("Model", bound=PreTrainedModel)
MemoryFactory = Callable[[int], nn.Module]

INITS = ("residual", "pretrained")
_ATTRIBUTE = "_everlearn_stack"
_seeding = threading.Lock()  # the global generator is put back only if no other thread seeds it meanwhile


@dataclass(frozen=True)
class Stack:
    """How a stacked model was made: its base (the user's own object), levels, init, wiring and continua by layer."""

    base: PreTrainedModel
    levels: tuple[Level, ...]
    init: str
    wiring: str
    paths: Mapping[int, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return self  # a copy of a stacked model still stands on the same base


def stack_levels(
    model: Model,
    levels: Sequence[Level],
    *,
    init: str = "residual",
    wiring: str = "sequential",
    layers: Sequence[int] | None = None,
    memory: MemoryFactory | Mapping[str, MemoryFactory] | None = None,
    width: int = DEFAULT_WIDTH,
    seed: int = 0,
) -> Model:
    """Return a new model of the same class whose MLPs carry levels; ``model`` itself stays as it is and usable.

    All weights and buffers of ``model`` are shared, not copied: two stacks on one base hold two memories and one set of
    base weights. The stacked model sees them through frozen aliases (new ``Parameter`` objects on the same storage), so
    the base is never written and the ``requires_grad`` flags of ``model`` are left alone; whoever trains ``model`` in
    place changes what its stacks stand on. ``save_pretrained`` is refused; ``models.memory_file`` saves what was
    learned. The logits are those of ``model`` to the last bit until a level is updated.

    Args:
        model: a Hugging Face decoder-only causal LM.
        levels: the levels, in the order of the chain.
        init: ``"residual"``: each chosen layer gets one new memory a level, chained after its MLP, which stays frozen.
            ``"pretrained"``: the chosen layers' MLPs themselves are assigned to the levels, in equal runs from the
            lowest layer up (wired ``independent``: each to all levels); the levels train their own copies.
        wiring: ``"sequential"``, ``"nested"`` or ``"independent"``; see :class:`~everlearn.memories.Continuum`.
        layers: indices of the blocks that get levels; default: the last third.
        memory: hidden_size -> module, the memory of one level in one layer; one for all levels, or one for each by its
            name; default: ``ResidualMemory`` of ``width``. Called lowest layer first.
        width: hidden units of the default memory.
        seed: of the memories' start; the global generator is not touched.

    Raises:
        StackingError: the model's structure does not allow it, or it is stacked already.
        InvalidArgument: levels, init, wiring, layers or memory out of range.
    """
    levels = check_levels(levels)
    check_wiring(wiring)
    if init not in INITS:
        raise InvalidArgument(f"init: got {init!r}, expected one of {INITS}")
    if init == "pretrained" and memory is not None:
        raise InvalidArgument('memory: got a factory with init="pretrained", where the MLPs are the memories')
    if is_stacked(model):
        raise StackingError("the model is stacked already; stack on its base, stack_of(model).base")
    decoder = find_decoder(model)
    chosen = _choose_layers(layers, len(decoder.mlps))
    stacked = _share(model)
    if init == "pretrained":
        _assign_pretrained(stacked, decoder, chosen, levels, wiring)
    else:
        factories = _factories(memory or (lambda hidden_size: ResidualMemory(hidden_size, width)), levels)
        _chain_memories(stacked, decoder, chosen, levels, wiring, factories, seed)
    stacked.save_pretrained = _not_saved_whole
    setattr(stacked, _ATTRIBUTE, Stack(model, levels, init, wiring, {layer: decoder.mlps[layer] for layer in chosen}))
    return stacked


def is_stacked(model: nn.Module) -> bool:
    """Say whether ``model`` was made by :func:`stack_levels`."""
    return isinstance(getattr(model, _ATTRIBUTE, None), Stack)


def stack_of(model: nn.Module) -> Stack:
    """Return how ``model`` was stacked; raises InvalidArgument for a model that is not."""
    if not is_stacked(model):
        raise InvalidArgument(f"model: got a {type(model).__name__} without levels, expected one made by stack_levels")
    return getattr(model, _ATTRIBUTE)


def continua(model: nn.Module) -> dict[int, Continuum]:
    """Return the continuum of each layer that has levels, lowest layer first."""
    found = {layer: model.get_submodule(path) for layer, path in stack_of(model).paths.items()}
    return {layer: module for layer, module in found.items() if isinstance(module, Continuum)}


def memory_parameters(model: nn.Module, level: str | None = None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of one level, or of all, as ``"layer.level.name"`` -> parameter."""
    names = _level_names(model, level)
    return {
        f"{layer}.{name}.{key}": parameter
        for layer, continuum in continua(model).items()
        for name in names
        for key, parameter in continuum.level_parameters(name).items()
    }


def memory_state(model: nn.Module, level: str | None = None) -> dict[str, Tensor]:
    """Return what one level, or all, hold: the live tensors, detached, by ``"layer.level.name"``; no base weights."""
    names = _level_names(model, level)
    return {
        f"{layer}.{name}.{key}": tensor.detach()
        for layer, continuum in continua(model).items()
        for name in names
        for key, tensor in continuum.level_state(name).items()
    }


@torch.no_grad()
def load_memory_state(model: nn.Module, state: Mapping[str, Tensor], level: str | None = None) -> None:
    """Write ``state`` into the level, or all, in place (optimisers keep their parameters); all or nothing.

    Raises:
        InvalidArgument: names or shapes differ from the model's; nothing was written.
    """
    own = memory_state(model, level)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise InvalidArgument(f"state: {len(odd)} names are not those of the model's levels, the first {odd[0]!r}")
    for key, tensor in own.items():
        layer, name, _ = key.split(".", 2)
        rows = 1 if continua(model)[int(layer)].grows(name) else 0
        if tensor.ndim != state[key].ndim or tensor.shape[rows:] != state[key].shape[rows:]:
            raise InvalidArgument(f"state: {key} has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")
    for layer, continuum in continua(model).items():
        for name in _level_names(model, level):
            start = f"{layer}.{name}."
            continuum.write(name, {key[len(start) :]: state[key] for key in own if key.startswith(start)})


def snapshot(model: nn.Module, level: str | None = None) -> dict[str, Tensor]:
    """Return a copy of :func:`memory_state` that later updates do not touch; undo with :func:`restore`."""
    return {key: tensor.clone() for key, tensor in memory_state(model, level).items()}


restore = load_memory_state


def reset_level(model: nn.Module, level: str | None = None) -> None:
    """Send one level, or all, back to their start, in place."""
    for name in _level_names(model, level):
        for continuum in continua(model).values():
            continuum.reset(name)


def _level_names(model: nn.Module, level: str | None) -> list[str]:
    names = [own.name for own in stack_of(model).levels]
    if level is None:
        return names
    if level not in names:
        raise InvalidArgument(f"level: got {level!r}, expected one of {names}")
    return [level]


def _choose_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count - -(-count // 3), count))
    chosen = sorted({layer + count if layer < 0 else layer for layer in layers})
    if not chosen or len(chosen) < len(layers) or chosen[0] < 0 or chosen[-1] >= count:
        raise InvalidArgument(f"layers: got {list(layers)}, expected different blocks out of 0..{count - 1}")
    return chosen


def _factories(memory: MemoryFactory | Mapping[str, MemoryFactory], levels: Sequence[Level]) -> list[MemoryFactory]:
    if not isinstance(memory, Mapping):
        return [memory] * len(levels)
    names = [level.name for level in levels]
    if set(memory) != set(names):
        raise InvalidArgument(f"memory: got factories for {sorted(memory)}, expected one for each of {sorted(names)}")
    return [memory[name] for name in names]


def _share(model: Model) -> Model:
    """Copy the module tree of ``model`` but not its weights: every parameter becomes a frozen alias of its own."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    shared = copy.deepcopy(model, memo)
    head, own = model.get_output_embeddings(), shared.get_output_embeddings()
    if isinstance(head, nn.Module) and isinstance(own, nn.Module) and any(p.requires_grad for p in head.parameters()):
        own.register_forward_pre_hook(_contiguous)
    return shared


def _not_saved_whole(*arguments: Any, **options: Any) -> None:
    """Stand in for ``save_pretrained``: the folder would load as a plain model whose MLPs are made up anew."""
    raise StackingError(
        "a stacked model is not saved as one: save the memory with models.memory_file.save_memory(model, path), and the"
        " base, if need be, with stack_of(model).base.save_pretrained(folder)"
    )


def _contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay out the head's input as torch itself does for a trainable weight.

    For a frozen weight and a strided input, such as the last positions that ``generate`` slices out, torch chooses
    another matrix product, which rounds differently; the logits would then differ from the base's in the last bit.
    """
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)


def _chain_memories(
    stacked: PreTrainedModel,
    decoder: Decoder,
    layers: Sequence[int],
    levels: Sequence[Level],
    wiring: str,
    factories: Sequence[MemoryFactory],
    seed: int,
) -> None:
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            mlp = stacked.get_submodule(decoder.mlps[layer])
            memories = [make(decoder.hidden_size).to(_device(mlp)).train(mlp.training) for make in factories]
            chain = Continuum([level.name for level in levels], memories, wiring=wiring, base=mlp)
            stacked.set_submodule(decoder.mlps[layer], chain.train(mlp.training))
    carry_through(stacked)


def _assign_pretrained(
    stacked: PreTrainedModel, decoder: Decoder, layers: Sequence[int], levels: Sequence[Level], wiring: str
) -> None:
    if len(layers) < len(levels) and wiring != "independent":
        raise StackingError(f"{len(layers)} layers cannot be assigned to {len(levels)} levels; choose more layers")
    for position, layer in enumerate(layers):
        mlp = stacked.get_submodule(decoder.mlps[layer])
        own = levels if wiring == "independent" else [levels[position * len(levels) // len(layers)]]
        copies = [copy.deepcopy(mlp).requires_grad_(True) for _ in own]
        starts = [mlp.state_dict() for _ in own]
        chain = Continuum([level.name for level in own], copies, wiring=wiring, starts=starts)
        stacked.set_submodule(decoder.mlps[layer], chain.train(mlp.training))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
