"""The index of a memory folder: one SQLite file, its tables, its transactions, and its errors said clearly.

The journal mode is DELETE with ``synchronous=EXTRA``: a returned commit has reached the disk, including the removal of
the rollback journal, and no file keeps deleted content afterwards (a write-ahead log would).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    CTE,
    JSON,
    Column,
    Connection,
    ForeignKey,
    Integer,
    MetaData,
    NullPool,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.exc import DBAPIError

from ...errors import StoreCorrupt, StoreError
from .durable import no_room

INDEX = "index.sqlite"
APPLICATION_ID = 0x45564C4E  # "EVLN", in the header of the SQLite file
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0

schema = MetaData()

observations = Table(
    "observations",
    schema,
    Column("id", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("told_at", Text, nullable=False),
    Column("meta", JSON, nullable=False),
    Column("forgotten_at", Text),
    sqlite_autoincrement=True,
)
# one row a snapshot, kept for ever so that no number is used twice; `unavailable` says why a snapshot is gone
nights = Table(
    "nights",
    schema,
    Column("n", Integer, primary_key=True),
    Column("parent", Integer, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("file", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("unavailable", Text),
)
# what a night did with an observation: consolidated or dismissed
marks = Table(
    "marks",
    schema,
    Column("night", Integer, ForeignKey("nights.n"), primary_key=True),
    Column("observation", Integer, ForeignKey("observations.id"), primary_key=True, index=True),
    Column("state", Text, nullable=False),
)
dreams = Table(
    "dreams",
    schema,
    Column("id", Integer, primary_key=True),
    Column("observation", Integer, ForeignKey("observations.id"), nullable=False, index=True),
    Column("night", Integer, ForeignKey("nights.n"), nullable=False),
    Column("payload", JSON, nullable=False),
)
# one row: the current night, and whether a committed forget has still to scrub the files
now = Table("now", schema, Column("head", Integer, nullable=False), Column("scrub", Integer, nullable=False))


def lineage(night: int) -> CTE:
    """Return ``night`` and all nights it was built upon, by following parents; night 0 has no row."""
    line = select(nights.c.n, nights.c.parent).where(nights.c.n == night).cte("lineage", recursive=True)
    return line.union_all(select(nights.c.n, nights.c.parent).join(line, nights.c.n == line.c.parent))


def descendants(of: list[int]) -> CTE:
    """Return the nights ``of`` and all nights built upon one of them."""
    line = select(nights.c.n).where(nights.c.n.in_(of)).cte("descendants", recursive=True)
    return line.union(select(nights.c.n).join(line, nights.c.parent == line.c.n))


class Index:
    """Transactions on one index file; every connection is closed when its block ends, so none can leak."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Describe the index at ``path``; nothing is opened yet."""
        self.path = path
        self.read_only = read_only
        self._engine = create_engine(
            "sqlite://",
            creator=self.connect,
            poolclass=NullPool,
            json_serializer=_to_json,
            json_deserializer=json.loads,
        )
        event.listen(self._engine, "begin", _begin)

    def connect(self) -> sqlite3.Connection:
        """Return a raw connection in autocommit mode; the caller closes it.

        Readers too open the file for writing where they may, and then forbid it with ``query_only``: after a kill -9 of
        the writer whoever comes first has to undo what was not committed.
        """
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA temp_store=MEMORY")  # no page of the user's text in a temporary file
            connection.execute("PRAGMA foreign_keys=ON")
            if self.read_only:
                connection.execute("PRAGMA query_only=ON")
            else:
                connection.execute("PRAGMA journal_mode=DELETE")
                connection.execute("PRAGMA synchronous=EXTRA")
                connection.execute("PRAGMA secure_delete=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection on which all queries see one and the same moment."""
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection whose changes are durable, all or none, when the block ends."""
        with self._errors(), self._engine.connect() as plain:
            connection = plain.execution_options(everlearn_begin="BEGIN IMMEDIATE")
            with connection.begin():
                yield connection

    def create(self) -> None:
        """Make the tables of an empty index; does nothing to one that has them."""
        self.path.touch(0o600)
        with self.write() as connection:
            if connection.exec_driver_sql("PRAGMA application_id").scalar() == APPLICATION_ID:
                return
            schema.create_all(connection)
            connection.execute(insert(now).values(head=0, scrub=0))
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")

    def check(self, *, thorough: bool) -> None:
        """Raise StoreCorrupt unless this is an index of ours (``thorough``: and its pages hang together)."""
        if not self.path.is_file():
            raise self._corrupt("it is missing")
        with self.read() as connection:
            if connection.exec_driver_sql("PRAGMA application_id").scalar() != APPLICATION_ID:
                raise self._corrupt("it is not an everlearn index")
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
            if version != SCHEMA_VERSION:
                raise StoreError(f"{self.path} has schema version {version}; this everlearn reads {SCHEMA_VERSION}")
            if connection.scalar(select(now.c.head)) is None:
                raise self._corrupt("its current night is missing")
            if thorough:
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if found != "ok":
                    raise self._corrupt(str(found))

    def settle(self) -> None:
        """Let SQLite remove a journal that a killed process left before it mattered: any write makes it."""
        if self.path.with_name(self.path.name + "-journal").exists():
            with self.write() as connection:
                connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")

    def vacuum(self) -> None:
        """Rewrite the file from its live rows, so that no deleted byte is left in it."""
        with self._errors(), contextlib.closing(self.connect()) as connection:
            connection.execute("VACUUM")

    def copy_into(self, connection: sqlite3.Connection) -> None:
        """Copy the index, as of one moment, into another database."""
        with self._errors(), contextlib.closing(self.connect()) as source:
            source.backup(connection)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self._explain(error.orig) from error
        except (sqlite3.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._explain(error) from error

    def _explain(self, error: BaseException | None) -> StoreError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        primary = code & 0xFF
        if primary == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_WRITE:
            return no_room(self.path)
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return self._corrupt(str(error))
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreError(f"{self.path} stayed busy for {BUSY_SECONDS:.0f} s; nothing was changed")
        return StoreError(f"{self.path} cannot be read or written: {error}; nothing was lost")

    def _corrupt(self, why: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self.path} is damaged ({why}); import an export over this memory, or put a backup of the file back"
        )


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("everlearn_begin", "BEGIN"))


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
