"""The store of one user's memory: observations, nights (snapshots of the slow level) and dreams in one folder.

    memory.json              format, base model, settings; written last when a memory is made
    lock                     held (flock) by the one process that may write
    index.sqlite             observations, nights, marks, dreams, the current night
    nights/NNNN.safetensors  the snapshots, opaque bytes here

The state of an observation is derived, never stored: a rollback moves one number, and what later nights did with an
observation no longer counts (:mod:`.ledger` has the rules).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from ...errors import InvalidArgument, StoreCorrupt, StoreError
from . import archive, durable, folder, ledger
from .index import INDEX, Index, nights, now, observations
from .records import Dream, Heard, Night, Observation, check_json, heard_row, json_object, timestamp


class MemoryStore:
    """One user's memory folder, open. Made by :meth:`open`, best used as a context manager."""

    def __init__(self, path: Path, lock: durable.FolderLock | None) -> None:
        """Take an existing memory folder; ``lock`` is None for a reader."""
        self.path = path
        self._lock = lock
        self._open = True
        self._mutex = threading.RLock()  # one night at a time among the threads of the process that holds the lock
        self._about = folder.read_about(path)
        self._index = Index(path / INDEX, read_only=lock is None)
        self._index.check(thorough=lock is not None)

    @classmethod
    def open(
        cls, path: str | Path, *, base: Mapping[str, Any] | None = None, create: bool = True, read_only: bool = False
    ) -> MemoryStore:
        """Open the memory in folder ``path``, making it if there is none and ``create``.

        ``base`` (JSON, such as the base model's name and fingerprint) is recorded if the memory has none yet; comparing
        it with :attr:`base` is the caller's. What a killed process left half done is undone or finished. A reader
        needs no lock. Raises StoreLocked, StoreCorrupt, StoreError (no memory there, no permission, ...).
        """
        where = folder.resolve(path)
        wanted = None if base is None else json_object("base", base)
        with durable.os_errors(where):
            folder.recover(where)
            if read_only or not create:
                folder.require(where)
            if read_only:
                return cls(where, None)
            lock = folder.prepare(where)
            try:
                store = cls(where, lock)
                if wanted is not None and store.base is None:
                    store._save_about(base=wanted)
                with _unless_full():
                    store._tidy()
            except BaseException:
                lock.release()
                raise
            return store

    def close(self) -> None:
        """Release the folder; a second call does nothing."""
        self._open = False
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def read_only(self) -> bool:
        """Whether this store was opened for reading only."""
        return self._lock is None

    @property
    def base(self) -> dict[str, Any] | None:
        """What was recorded of the base model, or None."""
        return self._about["base"]

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of the free-form settings."""
        return dict(self._about["settings"])

    def set_base(self, base: Mapping[str, Any]) -> None:
        """Record the base model (JSON), durably, if none is recorded yet."""
        with self._writing():
            if self.base is None:
                self._save_about(base=json_object("base", base))

    def update_settings(self, **settings: Any) -> None:
        """Set some settings (JSON values), durably."""
        with self._writing():
            self._save_about(settings=self.settings | json_object("settings", settings))

    # observations

    def add_observation(
        self, text: str, *, role: str = "user", meta: Mapping[str, Any] | None = None, told_at: str | None = None
    ) -> int:
        """Journal one observation and return its id; it is durable when this returns."""
        return self.add_observations([Heard(text, role, meta or {}, told_at)])[0]

    def add_observations(self, items: Sequence[Heard]) -> list[int]:
        """Journal several observations, all or none, and return their ids in order; durable when this returns."""
        rows = [heard_row(item) for item in items]
        with self._writing(), self._index.write() as db:
            ids = [
                db.execute(insert(observations).values(row).returning(observations.c.id)).scalar_one() for row in rows
            ]
            durable.checkpoint("observations-inserted")
        return ids

    def history(self, night: int | None = None) -> list[Observation]:
        """Return every observation, oldest first, with its state as of ``night`` (default: the current one)."""
        with self._reading() as db:
            return ledger.history(db, _which(db, night))

    # nights

    @property
    def head(self) -> int:
        """The current night; 0 is the untouched base."""
        with self._reading() as db:
            return ledger.head(db)

    def nights(self) -> list[Night]:
        """Return every night ever committed, oldest first, also those whose snapshot is gone."""
        with self._reading() as db:
            return ledger.all_nights(db)

    def dreams(self, night: int | None = None) -> list[Dream]:
        """Return the dreams made on the way to ``night`` (default: the current one), oldest first."""
        with self._reading() as db:
            return ledger.dreams_of(db, _which(db, night))

    def load_state(self, night: int | None = None) -> bytes | None:
        """Return the snapshot of ``night`` (default: the current one), exactly as committed; None for night 0.

        Raises StoreCorrupt if the file is damaged or missing, StoreError if it was removed on purpose (says why).
        """
        with self._reading() as db:
            number = _which(db, night)
            if number == 0:
                return None
            record = ledger.find_night(db, number)
            ways_out = ledger.ways_out(db, without=number)
            if record.unavailable is not None:
                raise StoreError(f"the snapshot of night {number} is gone: {record.unavailable}; {ways_out}")
            path = self.path / folder.NIGHTS / record.file
            with durable.os_errors(path):
                content = path.read_bytes() if path.is_file() else None
        if content is None or hashlib.sha256(content).hexdigest() != record.sha256:
            why = "missing" if content is None else "damaged (its sha256 is not that of its commit)"
            raise StoreCorrupt(f"{path} is {why}; {ways_out}, or import an export")
        return content

    def commit_night(
        self,
        state: bytes | Path,
        *,
        consolidated: Iterable[int] = (),
        dismissed: Iterable[int] = (),
        dreams: Mapping[int, Sequence[Any]] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> int:
        """Make ``state`` (bytes, or a file to copy) the new current night and return its number; all or nothing.

        ``consolidated`` and ``dismissed`` are ids of observations, ``dreams`` maps ids to JSON payloads, ``metrics`` is
        JSON. The parent is the current night.
        """
        payloads = {key: list(values) for key, values in (dreams or {}).items()}
        check_json("dreams", list(payloads.values()))
        figures = json_object("metrics", metrics)
        with self._writing(), self._new_night(state) as night, self._index.write() as db:
            ledger.add_night(db, night, figures)
            ledger.add_marks(db, night["n"], set(consolidated), set(dismissed))
            ledger.add_dreams(db, night["n"], payloads)
            durable.checkpoint("night-inserted")
        durable.checkpoint("night-committed")
        return night["n"]

    def rollback(self, night: int) -> None:
        """Make ``night`` (0, or any whose snapshot is there and intact) the current one."""
        with self._writing():
            self.load_state(night)
            with self._index.write() as db:
                db.execute(update(now).values(head=night))
                durable.checkpoint("head-moved")
            durable.checkpoint("rolled-back")

    def prune(self, gone: Iterable[int]) -> None:
        """Remove the snapshots of the nights ``gone`` to save space; what they consolidated still counts later."""
        with self._writing():
            with self._index.write() as db:
                numbers = [ledger.find_night(db, n).n for n in gone]
                if ledger.head(db) in numbers:
                    raise InvalidArgument(f"gone: night {ledger.head(db)} is the current one and must stay")
                ledger.withdraw(db, numbers, f"it was pruned on {timestamp()}")
            self._tidy()

    # forgetting

    def needs_rebuild(self, ids: Iterable[int]) -> bool:
        """Return whether the current night was trained with any of the observations ``ids``."""
        with self._reading() as db:
            return bool(ledger.known(db, "ids", ids) & ledger.trained_with(db, ledger.head(db)))

    def forget(
        self, ids: Iterable[int], rebuilt_state: bytes | Path | None = None, *, metrics: Mapping[str, Any] | None = None
    ) -> int:
        """Forget the observations ``ids`` and return the current night; all or nothing, and no byte of them stays.

        Text, meta, marks and dreams go; the row stays, in state forgotten. Every snapshot trained with one of them
        goes. If the current one is among these (:meth:`needs_rebuild`), ``rebuilt_state``, trained from the untouched
        base on what remains, becomes the new current night. Its parent is the old one, whose snapshot is gone: that way
        what remains stays consolidated, with its dreams. Words in the metrics of nights that saw them go too. If
        scrubbing the files is interrupted, the next opening (not read-only) finishes it. Copies outside the folder,
        such as exports, are the caller's.
        """
        wanted = set(ids)
        figures = json_object("metrics", metrics)
        with self._writing():
            needed = self.needs_rebuild(wanted)
            if needed and rebuilt_state is None:
                raise InvalidArgument("rebuilt_state: got None, but the current night was trained with what shall go")
            with contextlib.ExitStack() as both:
                night = both.enter_context(self._new_night(rebuilt_state)) if rebuilt_state is not None else None
                db = both.enter_context(self._index.write())
                ledger.erase(db, wanted)
                if night is not None:
                    ledger.add_night(db, night, figures)
                durable.checkpoint("forget-erased")
            durable.checkpoint("forget-committed")
            try:
                self._tidy()
            except StoreError as error:
                raise StoreError(
                    f"{sorted(wanted)} are forgotten, but {self.path} could not be scrubbed yet ({error.__cause__}); "
                    "the next opening does it"
                ) from error
            return self.head

    # the whole

    def export(self, file: str | Path) -> dict[str, Any]:
        """Write the whole memory to one ``file``, all or nothing, and return its manifest (see :mod:`.archive`).

        Damaged snapshots are left out and listed under "damaged": they never hold the text back.
        """
        status = self.status()
        with durable.os_errors(Path(file)):
            return archive.export(self.path, self._index, self._about, status, folder.resolve(file))

    @staticmethod
    def import_(file: str | Path, path: str | Path, *, replace: bool = False) -> None:
        """Make the memory folder ``path`` from an exported ``file``, all or nothing, after checking every hash.

        A folder that is not empty is only touched with ``replace``, and only if it is a memory (damaged or not).
        """
        with durable.os_errors(folder.resolve(path)):
            archive.import_(folder.resolve(file), folder.resolve(path), replace=replace)

    @staticmethod
    def peek(file: str | Path) -> dict[str, Any]:
        """Return the manifest of an exported ``file``: "base", "status", "damaged" and more."""
        with durable.os_errors(Path(file)):
            return archive.peek(folder.resolve(file))

    def status(self) -> dict[str, Any]:
        """Return counts by state, the current night, the nights' numbers, bytes on disk, base and settings."""
        with self._reading() as db:
            current = ledger.head(db)
            counts = ledger.count_states(db, current)
            all_nights = ledger.all_nights(db)
        return {
            "path": str(self.path),
            "base": self.base,
            "settings": self.settings,
            "observations": counts,
            "head": current,
            "last_sleep": max((night.created_at for night in all_nights), default=None),
            "nights": len(all_nights),
            "available": [0] + [night.n for night in all_nights if night.unavailable is None],
            "bytes": folder.size(self.path),
        }

    # inside

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        if not self._open:
            raise StoreError(f"the memory {self.path} is closed")
        with self._index.read() as db:
            yield db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if not self._open:
            raise StoreError(f"the memory {self.path} is closed")
        if self.read_only:
            raise StoreError(f"the memory {self.path} was opened read-only")
        with self._mutex:
            yield

    def _save_about(self, **changes: Any) -> None:
        about = self._about | changes
        folder.write_about(self.path, about)
        self._about = about

    @contextlib.contextmanager
    def _new_night(self, state: bytes | Path) -> Iterator[dict[str, Any]]:
        """Write a snapshot under the next number and yield its row; if the block fails, the file goes again."""
        if not isinstance(state, bytes | Path) or state == b"":
            raise InvalidArgument(f"state: expected some bytes or a Path, got {state!r}")
        with self._reading() as db:
            n = (db.scalar(select(func.max(nights.c.n))) or 0) + 1
            parent = ledger.head(db)
        file = f"{n:04d}.safetensors"
        try:
            sha256, size = durable.write_file(self.path / folder.NIGHTS / file, state)
            durable.checkpoint("snapshot-written")
            yield {"n": n, "parent": parent, "file": file, "sha256": sha256, "bytes": size}
        except BaseException:
            with contextlib.suppress(StoreError):
                self._sweep()
            raise

    def _sweep(self) -> None:
        """Remove every file in the snapshots' folder that is not the snapshot of an available night."""
        keep = {night.file for night in self.nights() if night.unavailable is None}
        place = self.path / folder.NIGHTS
        with durable.os_errors(place):
            gone = [file for file in place.iterdir() if file.name not in keep]
            for file in gone:
                file.unlink()
                durable.checkpoint("snapshot-removed")
            if gone:
                durable.sync_folder(place)

    def _tidy(self) -> None:
        """Bring the files in line with the index: remove what it no longer names, scrub what was forgotten."""
        self._sweep()
        self._index.settle()
        with self._reading() as db:
            if not db.scalar(select(now.c.scrub)):
                return
        durable.checkpoint("before-scrub")
        self._index.vacuum()
        durable.checkpoint("after-scrub")
        with self._index.write() as db:
            db.execute(update(now).values(scrub=0))


def _which(db: Connection, night: int | None) -> int:
    if night is None:
        return ledger.head(db)
    return 0 if night == 0 else ledger.find_night(db, night).n


@contextlib.contextmanager
def _unless_full() -> Iterator[None]:
    """Let a full disk postpone the block to the next opening."""
    try:
        yield
    except StoreError as error:
        if error.errno is None:
            raise
