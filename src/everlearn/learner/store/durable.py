"""Files that survive kill -9 and power loss: durable writes, the folder's lock, and OS errors said clearly."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import StoreError, StoreLocked

CHUNK = 1 << 20
LOCK = "lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def checkpoint(name: str) -> None:
    """Mark a point between two durable steps; does nothing, and is where the crash tests kill the process."""


def no_room(path: Path) -> StoreError:
    """Return the error of a full disk (its ``errno`` is ENOSPC)."""
    error = StoreError(f"disk full: {path} could not be written; nothing was lost, the memory is as it was before")
    error.errno = errno.ENOSPC
    return error


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that is not ours into a StoreError that names the file."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise no_room(path) from error
        raise StoreError(f"{error.filename or path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` (creations, renames, removals) durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes | Path) -> tuple[str, int]:
    """Write ``content`` (bytes, or a file to copy) to ``path``, durably and all or nothing.

    Returns the sha256 (hex) and the number of bytes. Raises StoreError, with ``path`` as it was before.
    """
    part = path.with_name(path.name + ".tmp")
    with os_errors(path):
        try:
            with open(part, "wb") as out:
                digest = hashlib.sha256()
                for chunk in _chunks(content):
                    out.write(chunk)
                    digest.update(chunk)
                size = out.tell()
                out.flush()
                checkpoint("file-written")
                os.fsync(out.fileno())
            checkpoint("file-synced")
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return digest.hexdigest(), size


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]
        return
    with open(content, "rb") as source:
        while chunk := source.read(CHUNK):
            yield chunk


class FolderLock:
    """Exclusive use of a folder by one process; the kernel releases it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock of an existing ``folder`` or raise StoreLocked, naming who has it."""
        self._handle = self._take(folder / LOCK)
        with contextlib.suppress(OSError):  # the process id only serves the other process's message
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, str(os.getpid()).encode(), 0)

    @staticmethod
    def _take(path: Path) -> int:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.stat(path)):
                        return handle
            except BlockingIOError:
                owner = os.pread(handle, 32, 0).decode(errors="replace") or "unknown"
                os.close(handle)
                raise StoreLocked(
                    f"the memory {path.parent} is in use by another process (pid {owner}); "
                    "wait for it to end, or open the memory read-only"
                ) from None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # the folder was replaced by an import between the two calls: try the new one

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
