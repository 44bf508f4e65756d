"""The folder itself: what belongs into it, its first making, ``memory.json``, and the end of an interrupted import."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from ...errors import StoreCorrupt, StoreError, StoreLocked
from .durable import LOCK, FolderLock, sync_folder, write_file
from .index import INDEX, Index, nights, observations

ABOUT = "memory.json"
NIGHTS = "nights"
FORMAT = 1


def resolve(path: str | Path) -> Path:
    """Return ``path`` absolute, ``~`` and symbolic links followed, so that its siblings are known."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def strangers(path: Path) -> list[str]:
    """Return the names in folder ``path`` that are not of a memory's making."""
    return sorted(
        name for name in os.listdir(path) if name not in (LOCK, NIGHTS) and not name.startswith((ABOUT, INDEX))
    )


def require(path: Path) -> None:
    """Raise StoreError unless there is a memory, damaged or not, at ``path``."""
    if not path.is_dir() or not ((path / ABOUT).exists() or (path / INDEX).exists()):
        raise StoreError(f"there is no memory at {path}")


def prepare(path: Path) -> FolderLock:
    """Lock the memory at ``path``, making it first if there is none, and return the lock."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; expected a folder")
    if not (path / ABOUT).exists() and path.exists() and (others := strangers(path)):
        raise StoreError(f"{path} is not a memory and not empty (it holds {', '.join(others[:3])})")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FolderLock(path)
    try:
        if not (path / ABOUT).exists():
            _make(path)
        (path / NIGHTS).mkdir(exist_ok=True)
        clear_leftovers(path)
    except BaseException:
        lock.release()
        raise
    return lock


def _make(path: Path) -> None:
    """Make the index, then ``memory.json``: where that is, a memory is complete."""
    index = Index(path / INDEX, read_only=False)
    index.create()
    with index.read() as db:
        if db.scalar(select(func.count()).select_from(observations)) or db.scalar(select(func.count(nights.c.n))):
            raise _corrupt(path / ABOUT, "it is missing")
    (path / NIGHTS).mkdir(exist_ok=True)
    write_about(path, {"format": FORMAT, "base": None, "settings": {}})
    sync_folder(path.parent)


def read_about(path: Path) -> dict[str, Any]:
    """Return the content of ``memory.json``: "format", "base" and "settings"."""
    return parse_about(path / ABOUT, (path / ABOUT).read_bytes() if (path / ABOUT).is_file() else b"")


def parse_about(file: Path, content: bytes) -> dict[str, Any]:
    """Return the parsed ``content`` of a ``memory.json`` or raise StoreCorrupt (about ``file``)."""
    if not content:
        raise _corrupt(file, "it is missing or empty")
    try:
        about = json.loads(content)
    except ValueError as error:
        raise _corrupt(file, f"not JSON: {error}") from None
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise _corrupt(file, "no format number")
    if about["format"] != FORMAT:
        raise StoreError(f"{file} has format {about['format']}; this everlearn reads {FORMAT}")
    if not isinstance(about.get("settings"), dict) or not isinstance(about.get("base", 0), dict | None):
        raise _corrupt(file, "base or settings are not JSON objects")
    return about


def write_about(path: Path, about: Mapping[str, Any]) -> None:
    """Replace ``memory.json`` durably."""
    write_file(path / ABOUT, (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())


def _corrupt(file: Path, why: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{file} is damaged ({why}); import an export over this memory, or put a backup of the file back"
    )


def size(path: Path) -> int:
    """Return the bytes of all files of a memory, leaving out those that vanish meanwhile."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def aside(path: Path) -> Path:
    """Return where a memory waits while an import takes its place."""
    return path.with_name(f".{path.name}.replaced")


def staging_prefix(path: Path) -> str:
    """Return how the names of folders begin in which imports for ``path`` are unpacked."""
    return f".{path.name}.importing-"


def recover(path: Path) -> None:
    """Undo an import that was killed between moving the old memory aside and putting the new one in its place."""
    if aside(path).exists() and not path.exists():
        os.rename(aside(path), path)
        sync_folder(path.parent)


def clear_leftovers(path: Path) -> None:
    """Remove what killed imports left beside ``path``; the caller holds its lock."""
    for part in [item for item in path.parent.iterdir() if item.name.startswith(staging_prefix(path))]:
        with contextlib.suppress(StoreLocked):  # still being unpacked by another process
            lock = FolderLock(part)
            shutil.rmtree(part)
            lock.release()
    if aside(path).exists():
        shutil.rmtree(aside(path))
    for part in path.glob("*.tmp"):
        part.unlink()
