"""Finding the feed-forward networks of a pretrained decoder by its structure, not by a list of class names."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from everlearn.errors import StackingError


@dataclass(frozen=True)
class Decoder:
    """What stacking needs to know of a model: its hidden size, and the path of each block's MLP, lowest block first."""

    hidden_size: int
    mlps: tuple[str, ...]


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the decoder blocks of ``model`` and the MLP in each.

    The blocks are the one ``ModuleList`` of the configuration's ``num_hidden_layers`` modules in each of which a direct
    child is an MLP. An MLP is a module that takes hidden states and nothing else, returns a tensor of the same shape,
    and is made of at least two linear layers (``Linear``, GPT-2's ``Conv1D`` or the like). Where a block has several,
    the largest counts.

    Raises:
        StackingError: there is no such list, or more than one; says what was found instead.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise StackingError(f"{name} has no Hugging Face configuration; expected a Hugging Face causal language model")
    if getattr(config, "is_encoder_decoder", False):
        raise StackingError(f"{name} is an encoder-decoder; levels are stacked on decoder-only language models")
    text = config.get_text_config()
    count, hidden = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not count or not hidden:
        raise StackingError(f"{name}: its configuration has no num_hidden_layers and hidden_size")
    found: list[tuple[str, ...]] = []
    misses: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            try:
                found.append(tuple(_mlp_path(block, f"{path}.{i}", hidden) for i, block in enumerate(module)))
            except StackingError as error:
                misses.append(str(error))
    if len(found) == 1:
        return Decoder(hidden, found[0])
    if found:
        raise StackingError(f"{name}: {len(found)} lists of {count} blocks have MLPs, expected one")
    why = "; ".join(misses) or f"it has no ModuleList of {count} blocks"
    raise StackingError(f"levels cannot be stacked on {name}: {why}")


def why_not_mlp(module: nn.Module, hidden_size: int) -> str | None:
    """Return None when ``module`` is an MLP in the sense of :func:`find_decoder`, else the first reason it is not."""
    if any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()):
        return "convolves over time"
    lists = any(isinstance(part, nn.ModuleList) for part in module.modules())
    if lists or any(parameter.ndim > 2 for parameter in module.parameters()):
        return "is a mixture of experts"
    sizes = [size for part in module.modules() if (size := _linear_size(part)) is not None]
    if len(sizes) < 2:
        return "has fewer than two linear layers"
    if hidden_size not in {i for i, _ in sizes} or hidden_size not in {o for _, o in sizes}:
        return f"does not map the hidden size {hidden_size} to itself"
    taken = list(inspect.signature(module.forward).parameters.values())
    if len(taken) != 1 or taken[0].kind not in (taken[0].POSITIONAL_ONLY, taken[0].POSITIONAL_OR_KEYWORD):
        return f"takes {', '.join(str(p).split(':')[0] for p in taken) or 'nothing'}, not hidden states alone"
    return _shape_trouble(module, hidden_size)


def _mlp_path(block: nn.Module, path: str, hidden_size: int) -> str:
    reasons = {name: why_not_mlp(child, hidden_size) for name, child in block.named_children()}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if not fitting:
        told = ", ".join(f"{name} {reason}" for name, reason in reasons.items()) or "it has no parts"
        raise StackingError(f"no MLP in {path} ({type(block).__name__}): {told}")
    return f"{path}.{max(fitting, key=lambda name: sum(p.numel() for p in block.get_submodule(name).parameters()))}"


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear-like module, None for any other; GPT-2's Conv1D names them nx and nf."""
    for inward, outward in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, inward) and hasattr(module, outward):
            return int(getattr(module, inward)), int(getattr(module, outward))
    return None


def _shape_trouble(module: nn.Module, hidden_size: int) -> str | None:
    """Run a copy of ``module`` on shapes alone (meta tensors: nothing is computed, no weight is copied).

    A copy, since ``torch.func.functional_call`` would put meta tensors into ``module`` while other threads use it.
    """
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    hidden = torch.empty(1, 2, hidden_size, dtype=dtype, device="meta")
    try:
        blank = copy.deepcopy(module, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})
        with torch.no_grad():
            out = blank(hidden)
    except Exception as error:
        return f"cannot be run on hidden states alone ({type(error).__name__})"
    if not isinstance(out, torch.Tensor):
        return f"returns {type(out).__name__}, not a tensor"
    return None if out.shape == hidden.shape else f"maps {tuple(hidden.shape)} to {tuple(out.shape)}"
