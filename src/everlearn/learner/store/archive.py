"""One file that holds a whole memory: a zip of ``manifest.json`` and the members that it lists with size and sha256.

manifest.json            {"kind", "format", "created_at", "base", "status", "damaged": [night], "members": {name: ...}}
memory.json, index.sqlite, nights/NNNN.safetensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import InvalidArgument, StoreCorrupt, StoreError
from . import durable, folder, ledger
from .durable import CHUNK, FolderLock, sync_folder
from .index import INDEX, Index
from .records import timestamp

MANIFEST = "manifest.json"
KIND = "everlearn-memory"
FORMAT = 1
_MEMBER = re.compile(rf"{re.escape(folder.ABOUT)}|{re.escape(INDEX)}|{folder.NIGHTS}/[0-9]{{4,}}\.safetensors")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, LookupError, TypeError, ValueError, RuntimeError)


def export(path: Path, index: Index, about: Mapping[str, Any], status: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Write the memory at ``path`` to ``file`` and return the manifest."""
    if file.is_relative_to(path):
        raise InvalidArgument(f"file: {file} lies inside the memory; expected a place outside")
    part = file.with_name(file.name + ".tmp")
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b") as out:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
                manifest = _write_members(path, index, about, target)
                manifest |= {"kind": KIND, "format": FORMAT, "created_at": timestamp(), "base": about["base"]}
                manifest |= {"status": {key: value for key, value in status.items() if key != "path"}}
                target.writestr(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))
            out.flush()
            os.fsync(out.fileno())
        durable.checkpoint("export-written")
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)
    return manifest


def _write_members(path: Path, index: Index, about: Mapping[str, Any], target: zipfile.ZipFile) -> dict[str, Any]:
    members: dict[str, dict[str, Any]] = {}
    damaged: list[int] = []

    def add(name: str, content: bytes) -> None:
        members[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        # a snapshot is noise to a compressor
        how = zipfile.ZIP_STORED if name.startswith(folder.NIGHTS) else zipfile.ZIP_DEFLATED
        target.writestr(name, content, how)

    with contextlib.closing(sqlite3.connect(":memory:")) as copy:
        index.copy_into(copy)
        for n, name, sha256 in copy.execute("SELECT n, file, sha256 FROM nights WHERE unavailable IS NULL").fetchall():
            snapshot = path / folder.NIGHTS / name
            content = snapshot.read_bytes() if snapshot.is_file() else b""
            if hashlib.sha256(content).hexdigest() == sha256:
                add(f"{folder.NIGHTS}/{name}", content)
            else:
                damaged.append(n)
                why = f"it was damaged when the memory was exported on {timestamp()}"
                copy.execute("UPDATE nights SET unavailable = ? WHERE n = ?", (why, n))
        copy.commit()
        copy.execute("VACUUM")
        add(INDEX, copy.serialize())
        _check_unchanged(index, copy)
    add(folder.ABOUT, json.dumps(about, indent=2, ensure_ascii=False).encode())
    return {"damaged": damaged, "members": members}


def _check_unchanged(index: Index, copy: sqlite3.Connection) -> None:
    """Raise if something was forgotten while it was being exported: then it must not live on in the export."""
    query = "SELECT count(forgotten_at) FROM observations"
    with index.read() as db:
        if db.exec_driver_sql(query).scalar() != copy.execute(query).fetchone()[0]:
            raise StoreError("something was forgotten during the export; nothing was written, export again")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as source:
            yield source
    except _ZIP_ERRORS as error:
        raise StoreCorrupt(f"{file} is damaged or not an export of a memory ({error}); nothing was changed") from error


def peek(file: Path) -> dict[str, Any]:
    """Return the manifest of ``file``."""
    with _reading(file) as source:
        return _manifest(source)


def _manifest(source: zipfile.ZipFile) -> dict[str, Any]:
    manifest = json.loads(source.read(MANIFEST))
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ValueError("its manifest is of another kind")
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{source.filename} has format {manifest.get('format')}; this everlearn reads {FORMAT}")
    if not isinstance(manifest.get("members"), dict) or not isinstance(manifest.get("base"), dict | None):
        raise ValueError("its manifest is incomplete")
    return manifest


def import_(file: Path, path: Path, *, replace: bool) -> None:
    """Unpack ``file`` beside ``path``, check it, and move it into place."""
    folder.recover(path)
    if path.exists():
        _check_target(path, replace=replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=folder.staging_prefix(path), dir=path.parent))
    try:
        with contextlib.closing(_Held(staged)):
            _unpack(file, staged)
            durable.checkpoint("import-unpacked")
            _move(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class _Held:
    """A folder lock that ``contextlib.closing`` can close."""

    def __init__(self, path: Path) -> None:
        self.close = FolderLock(path).release


def _check_target(path: Path, *, replace: bool) -> None:
    if not path.is_dir():
        raise StoreError(f"{path} is a file; expected a folder")
    if not replace and any(path.iterdir()):
        raise StoreError(f"{path} is not empty; nothing was changed (replace=True would replace the memory in it)")
    if others := folder.strangers(path):
        raise StoreError(f"{path} holds more than a memory ({', '.join(others[:3])}) and is not replaced")


def _unpack(file: Path, staged: Path) -> None:
    (staged / folder.NIGHTS).mkdir()
    with _reading(file) as source:
        members = _manifest(source)["members"]
        if {INDEX, folder.ABOUT} - members.keys() or members.keys() | {MANIFEST} != set(source.namelist()):
            raise ValueError("its content is not what its manifest lists")
        for name, wanted in members.items():
            if not _MEMBER.fullmatch(name):
                raise ValueError(f"{name!r} does not belong into a memory")
            _unpack_member(source, name, wanted, staged / name)
    folder.read_about(staged)
    _check_index(file, staged, members)
    for place in (staged / folder.NIGHTS, staged):
        sync_folder(place)


def _unpack_member(source: zipfile.ZipFile, name: str, wanted: Mapping[str, Any], target: Path) -> None:
    digest = hashlib.sha256()
    with source.open(name) as packed, open(target, "xb") as out:
        while chunk := packed.read(CHUNK):
            out.write(chunk)
            digest.update(chunk)
            if out.tell() > wanted["bytes"]:
                break
        out.flush()
        os.fsync(out.fileno())
        if out.tell() != wanted["bytes"] or digest.hexdigest() != wanted["sha256"]:
            raise ValueError(f"{name} has another content than its manifest says")


def _check_index(file: Path, staged: Path, members: Mapping[str, Any]) -> None:
    index = Index(staged / INDEX, read_only=False)
    index.check(thorough=True)
    with index.read() as db:
        available = [night for night in ledger.all_nights(db) if night.unavailable is None]
    for night in available:
        member = members.get(f"{folder.NIGHTS}/{night.file}")
        if member is None or member["sha256"] != night.sha256:
            raise StoreCorrupt(f"{file} lacks the snapshot of night {night.n}; nothing was changed")


def _move(staged: Path, path: Path) -> None:
    """Put ``staged`` at ``path``; a memory there moves aside first, and back if anything fails or is killed."""
    if not path.exists():
        os.rename(staged, path)
        sync_folder(path.parent)
        return
    with contextlib.closing(_Held(path)):
        folder.clear_leftovers(path)
        os.rename(path, folder.aside(path))
        try:
            durable.checkpoint("import-aside")
            os.rename(staged, path)
        except BaseException:
            folder.recover(path)
            raise
        durable.checkpoint("import-moved")
        sync_folder(path.parent)
        shutil.rmtree(folder.aside(path))
        sync_folder(path.parent)
