"""Memories on disk: one safetensors file without base weights, tied to its base model by a fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from everlearn.errors import FingerprintError, StoreCorrupt, StoreError
from everlearn.models.stacking import continua, is_stacked, load_memory_state, memory_state, stack_of

FORMAT = "everlearn-memory"
VERSION = 1

_RUNS, _RUN = 16, 64  # few runs touch few pages of a memory-mapped checkpoint


def fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that tell a base model from any other; a stacked model gives its base's.

    SHA-256 over the class's name and each parameter's name, shape and 16 evenly spaced runs of 64 values (all of a
    small one) as float32: one checkpoint loaded in any precision that holds it exactly is still the same model.
    """
    if is_stacked(model):
        model = stack_of(model).base
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"\n{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel() > _RUNS * _RUN:
            flat = flat.unfold(0, _RUN, (flat.numel() - _RUN) // (_RUNS - 1))
        digest.update(_bytes(flat.float()))
    return digest.hexdigest()[:32]


def layout(model: nn.Module, level: str | None = None) -> dict[str, Any]:
    """Return what must agree for a memory to mean the same: init, wiring, levels, layers, memories, shared buffers.

    The levels' periods and optimisers may change. ``shared`` is a digest of what the memories need but do not hold
    (their non-persistent buffers, such as an input whitening). Of one ``level``, the other levels do not count.
    """
    stack = stack_of(model)
    levels = [own.name for own in stack.levels if level in (None, own.name)]
    memories: set[str] = set()
    shared = hashlib.sha256()
    for layer, continuum in continua(model).items():
        for name, memory in zip(continuum.names, continuum.memories, strict=True):
            if name not in levels:
                continue
            memories.add(repr(memory))
            kept = memory.state_dict().keys()
            for key, buffer in memory.named_buffers():
                if key not in kept:
                    shared.update(f"{layer}.{name}.{key} {tuple(buffer.shape)}".encode() + _bytes(buffer))
    return {
        "init": stack.init,
        "wiring": stack.wiring,
        "levels": levels,
        "layers": list(stack.paths),
        "memories": sorted(memories),
        "shared": shared.hexdigest()[:32],
    }


def memory_bytes(
    model: nn.Module,
    metadata: Mapping[str, Any] | None = None,
    *,
    level: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Return the memory of a stacked model as the content of a memory file.

    Args:
        model: made by ``stack_levels``.
        metadata: anything JSON, given back by :func:`load_memory`.
        level: of this level alone; default: all.
        state: in place of the model's present memory, e.g. an earlier ``snapshot(model, level)``.
    """
    tensors = {key: value.contiguous() for key, value in (state or memory_state(model, level)).items()}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "base_fingerprint": fingerprint(model),
        "base_name": _name(stack_of(model).base),
        "layout": json.dumps(layout(model, level), sort_keys=True),
        "level": json.dumps(level),
        "metadata": json.dumps(dict(metadata or {})),
    }
    header["digest"] = _digest(tensors, header)
    return to_safetensors(tensors, metadata=header)


def save_memory(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None, **what: Any
) -> None:
    """Write the memory of a stacked model to ``path``: after a crash either the old file is there, or the new one.

    Args:
        model: made by ``stack_levels``.
        path: the file; its folder must exist.
        metadata: anything JSON, given back by :func:`load_memory`.
        what: ``level`` and ``state``, see :func:`memory_bytes`.

    Raises:
        StoreError: the file cannot be written (no folder, no permission, disk full); an old one is untouched.
    """
    atomic_write(path, memory_bytes(model, metadata, **what))


def load_memory(model: nn.Module, source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """Read a memory, a file or its content, into a stacked model, in place; return the metadata it was saved with.

    A memory of one level leaves the other levels as they are.

    Raises:
        FingerprintError: it was made on another base or layout; says both; the model is untouched.
        StoreCorrupt: it is damaged, cut short, or no memory.
        StoreError: the file cannot be read, or a newer everlearn wrote it.
    """
    state, header = read_memory(source)
    base, what = stack_of(model).base, _called(source)
    ours = fingerprint(base)
    if header["base_fingerprint"] != ours:
        raise FingerprintError(
            f"{what} was made on {header['base_name']} (fingerprint {header['base_fingerprint']}), but the model here"
            f" is {_name(base)} (fingerprint {ours}); load the memory on its own base model"
        )
    level = header["level"]
    if level is not None and level not in [own.name for own in stack_of(model).levels]:
        raise FingerprintError(f"{what} holds the level {level!r}, which the model here does not have")
    found, expected = header["layout"], layout(model, level)
    for key in expected:
        if found.get(key) != expected[key]:
            raise FingerprintError(
                f"{what} (base {header['base_name']}, fingerprint {ours}) was made with {key} = {found.get(key)}, but"
                f" the model here ({_name(base)}, same base) was stacked with {key} = {expected[key]}"
            )
    load_memory_state(model, _completed(model, state), level)
    return header["metadata"]


def _completed(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state``, as any version wrote it, with what its memories hold today."""
    made = dict(state)
    for layer, continuum in continua(model).items():
        for name, memory in zip(continuum.names, continuum.memories, strict=True):
            start, complete = f"{layer}.{name}.", getattr(memory, "completed", None)
            own = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
            if own and complete is not None:
                made = {key: tensor for key, tensor in made.items() if not key.startswith(start)}
                made |= {f"{start}{key}": tensor for key, tensor in complete(own).items()}
    return made


def read_memory(source: str | os.PathLike[str] | bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a memory, a file or its content, without a model: its tensors, and what its header says.

    The header has base_fingerprint, base_name, layout, level and metadata.

    Raises:
        StoreCorrupt: it is damaged, cut short, or no memory; names it.
        StoreError: the file cannot be read, or a newer everlearn wrote it.
    """
    what = _called(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise StoreError(f"{what} cannot be read: {error}") from error
    try:
        tensors = from_safetensors(content)
        size = int.from_bytes(content[:8], "little")
        header = dict(json.loads(content[8 : 8 + size]).get("__metadata__") or {})
    except SafetensorError as error:
        raise StoreCorrupt(f"{what} is damaged or no memory file ({error}); use a copy or a snapshot") from error
    if header.get("format") != FORMAT:
        raise StoreCorrupt(f"{what} is a safetensors file but no everlearn memory")
    if header.pop("digest", None) != _digest(tensors, header):
        raise StoreCorrupt(f"{what} is damaged: its contents do not match their checksum; use a copy or a snapshot")
    if int(header["version"]) > VERSION:
        raise StoreError(f"{what} has format version {header['version']}, expected at most {VERSION}; update everlearn")
    return tensors, {**header, **{key: json.loads(header[key]) for key in ("layout", "level", "metadata")}}


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Put ``data`` at ``path`` by temporary file, fsync, rename and fsync of the folder; raises StoreError."""
    path = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _called(source: str | os.PathLike[str] | bytes) -> str:
    return "the memory" if isinstance(source, bytes) else os.fspath(source)


def _name(model: nn.Module) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(dict(header), sort_keys=True).encode(), digest_size=16)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Return the tensor's values as bytes, whatever its dtype and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
