"""Queries and changes of the index, each a function of an open transaction: the rules of what counts when.

Marks and dreams count for a night if they were made on its lineage: itself, its parent, and so on down to night 0. A
snapshot holds, or may hold, what was consolidated anywhere on its lineage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Subquery,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from ...errors import InvalidArgument
from .index import descendants, dreams, lineage, marks, nights, now, observations
from .records import STATES, Dream, Night, Observation, timestamp, without_words

MOST = 2**63 - 1  # the largest whole number that SQLite keeps


def head(db: Connection) -> int:
    """Return the current night; 0 is the untouched base."""
    return db.execute(select(now.c.head)).scalar_one()


def all_nights(db: Connection) -> list[Night]:
    """Return every night ever committed, oldest first."""
    return [Night(**row._mapping) for row in db.execute(select(nights).order_by(nights.c.n))]


def find_night(db: Connection, n: int) -> Night:
    """Return night ``n`` or raise InvalidArgument."""
    row = db.execute(select(nights).where(nights.c.n == n)).one_or_none() if 0 < n <= MOST else None
    if row is None:
        raise InvalidArgument(f"night: there is no night {n!r}; {ways_out(db)}")
    return Night(**row._mapping)


def ways_out(db: Connection, without: int | None = None) -> str:
    """Return the advice which nights can be rolled back to."""
    choice = [night.n for night in all_nights(db) if night.unavailable is None and night.n not in (without, head(db))]
    return "roll back to night " + ", ".join(map(str, [0, *choice]))


def _verdicts(night: int) -> Subquery:
    """Return the last mark of each observation on the lineage of ``night``."""
    # with max(), SQLite takes the other columns of a group from the row of the maximum
    return (
        select(marks.c.observation, marks.c.state, func.max(marks.c.night).label("night"))
        .where(marks.c.night.in_(select(lineage(night).c.n)))
        .group_by(marks.c.observation)
        .subquery()
    )


def _state(verdicts: Subquery) -> ColumnElement[str]:
    return case((observations.c.forgotten_at.is_not(None), "forgotten"), else_=func.coalesce(verdicts.c.state, "heard"))


def history(db: Connection, night: int) -> list[Observation]:
    """Return every observation, oldest first, with its state as of ``night``."""
    last = _verdicts(night)
    kept = [observations.c[name] for name in ("id", "text", "role", "told_at", "meta")]
    rows = db.execute(
        select(*kept, _state(last), last.c.night, observations.c.forgotten_at)
        .outerjoin(last, last.c.observation == observations.c.id)
        .order_by(observations.c.id)
    )
    return [Observation(*row) for row in rows]


def count_states(db: Connection, night: int) -> dict[str, int]:
    """Return how many observations are in each state as of ``night``."""
    last = _verdicts(night)
    state = _state(last).label("standing")  # not a column, so that GROUP BY means the expression
    rows = db.execute(
        select(state, func.count())
        .select_from(observations)
        .outerjoin(last, last.c.observation == observations.c.id)
        .group_by("standing")
    )
    return dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}


def dreams_of(db: Connection, night: int) -> list[Dream]:
    """Return the dreams that count for ``night``, oldest first."""
    rows = db.execute(select(dreams).where(dreams.c.night.in_(select(lineage(night).c.n))).order_by(dreams.c.id))
    return [Dream(**row._mapping) for row in rows]


def trained_with(db: Connection, night: int) -> set[int]:
    """Return the ids of the observations that the snapshot of ``night`` was trained with."""
    return set(
        db.execute(
            select(marks.c.observation).where(
                marks.c.night.in_(select(lineage(night).c.n)), marks.c.state == "consolidated"
            )
        ).scalars()
    )


def known(db: Connection, name: str, ids: Iterable[int]) -> set[int]:
    """Return ``ids`` as a set, or raise InvalidArgument (about argument ``name``) if one is unknown or forgotten."""
    wanted = set(ids)
    rows = db.execute(select(observations.c.id, observations.c.forgotten_at)).all() if wanted else []
    if unknown := wanted - {row.id for row in rows}:
        raise InvalidArgument(f"{name}: no observation has the id {', '.join(map(repr, unknown))}")
    if gone := wanted & {row.id for row in rows if row.forgotten_at is not None}:
        raise InvalidArgument(f"{name}: {sorted(gone)} are forgotten already")
    return wanted


def add_night(db: Connection, night: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Insert a night and make it the current one."""
    db.execute(insert(nights).values(**night, created_at=timestamp(), metrics=metrics))
    db.execute(update(now).values(head=night["n"]))


def add_marks(db: Connection, n: int, consolidated: set[int], dismissed: set[int]) -> None:
    """Record what night ``n``, already inserted, did with which observations."""
    known(db, "consolidated", consolidated)
    known(db, "dismissed", dismissed)
    if both := consolidated & dismissed:
        raise InvalidArgument(f"dismissed: {sorted(both)} are also among the consolidated")
    if learned := dismissed & trained_with(db, n):
        raise InvalidArgument(f"dismissed: {sorted(learned)} are consolidated already; they can be forgotten instead")
    rows = [{"night": n, "observation": which, "state": "consolidated"} for which in sorted(consolidated)]
    rows += [{"night": n, "observation": which, "state": "dismissed"} for which in sorted(dismissed)]
    if rows:
        db.execute(insert(marks), rows)


def add_dreams(db: Connection, n: int, payloads: Mapping[int, Sequence[Any]]) -> None:
    """Record the dreams that night ``n`` made, by observation."""
    known(db, "dreams", payloads)
    rows = [{"night": n, "observation": which, "payload": item} for which, items in payloads.items() for item in items]
    if rows:
        db.execute(insert(dreams), rows)


def withdraw(db: Connection, which: Iterable[int], reason: str) -> None:
    """Mark the snapshots of nights ``which`` as gone, unless they were gone before."""
    for n in which:
        db.execute(update(nights).where(nights.c.n == n, nights.c.unavailable.is_(None)).values(unavailable=reason))


def erase(db: Connection, ids: set[int]) -> None:
    """Erase observations: text, meta, marks, dreams, also those that have one ``beside`` them; withdraw each snapshot
    that was trained with one of them.

    Words in the metrics of nights that saw one of them, or were built upon such a night, go too.
    """
    at = timestamp()
    rows = [row for row in db.execute(select(marks)).all() if row.observation in ids]
    touched = descendants(sorted({row.night for row in rows}))
    for row in db.execute(select(nights.c.n, nights.c.metrics).where(nights.c.n.in_(select(touched.c.n)))).all():
        db.execute(update(nights).where(nights.c.n == row.n).values(metrics=without_words(row.metrics)))
    trained = descendants(sorted({row.night for row in rows if row.state == "consolidated"}))
    reason = f"it was trained with something that was forgotten on {at}"
    withdraw(db, db.execute(select(trained.c.n)).scalars().all(), reason)
    each = [{"which": which} for which in sorted(ids)]
    if each:
        db.execute(delete(dreams).where(dreams.c.observation == bindparam("which")), each)
        db.execute(delete(dreams).where(dreams.c.payload["beside"].as_integer() == bindparam("which")), each)
        db.execute(delete(marks).where(marks.c.observation == bindparam("which")), each)
        blank = {"text": "", "meta": {}, "forgotten_at": at}
        db.execute(update(observations).where(observations.c.id == bindparam("which")).values(blank), each)
    db.execute(update(now).values(scrub=1))
