"""Finds and removes what has reached its age. A run that could go on is never touched.

Files of a whole run go before its rows: a crash in between leaves rows without files. For a part of
a run, the row is marked first, so that readers get the right answer from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from runrecovery_service.domain.retention import RetentionKind, RunPosition
from runrecovery_service.domain.run import TERMINAL, RecoveryState, Run
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.reports import own_reports
from runrecovery_service.storage.rows import from_us, json_object, to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.tables import sql_words

SETTLES_S: Final = 120.0
"""How long a run and its launches must have ended: a closed launch is searched for 60 s more."""

MARKS: Final[Mapping[RetentionKind, str]] = {
    RetentionKind.OUTPUTS: "output_removed_at",
    RetentionKind.WORKSPACES: "workspace_removed_at",
    RetentionKind.EVENTS: "events_removed_at",
}
"""The column that says that a part of a run was removed. Each has a partial index."""

_CHILDREN: Final = (
    "interaction", "run_event", "recovery_event", "process_lease", "quarantine",
)  # fmt: skip
_SETTLED: Final = (
    f"r.status IN ({sql_words(frozenset(TERMINAL))})"
    f" AND r.recovery_state <> '{RecoveryState.QUARANTINED}'"
    # Set until the window for ReopenRun has passed.
    " AND r.reopen_due_us IS NULL AND r.ended_at <= ?"
    " AND NOT EXISTS (SELECT 1 FROM process_lease l WHERE l.run = r.id"
    " AND (l.state <> 'CLOSED' OR l.closed_at IS NULL OR l.closed_at > ?))"
    " AND NOT EXISTS (SELECT 1 FROM trust_entry t WHERE t.run = r.id)"
)
"""The run has ended for good. Parameters: twice the latest time at which that may have happened."""
# SQLite gives the key of the newest row out again if that row is deleted. Files, receipts and
# cursors of the old row would then be those of the new one.
_NOT_NEWEST: Final = (
    "r.id < (SELECT max(id) FROM run)"
    " AND NOT EXISTS (SELECT 1 FROM process_lease l WHERE l.run = r.id"
    " AND l.id = (SELECT max(id) FROM process_lease))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRun:
    """A run that may be removed, or of which a part may be removed."""

    key: int
    position: RunPosition


def _own(db: Database) -> str:
    """Return the condition for runs of this service. Parameter: the instance.

    In a SQLite store every run is the service's own, even one under another instance name.
    """
    return "? IS NOT NULL" if db.dialect.kind is DatabaseKind.SQLITE else "r.owner = ?"


def _own_receipt(db: Database) -> str:
    """Return the condition for receipts of this service. Parameter: the instance."""
    return "? IS NOT NULL" if db.dialect.kind is DatabaseKind.SQLITE else "owner = ?"


def _settled_before(now: datetime) -> tuple[int, int]:
    latest = to_us(now - timedelta(seconds=SETTLES_S))
    return latest, latest


def position_of_surplus(
    db: Database, owner: Owner, *, kept: int, now: datetime
) -> RunPosition | None:
    """Return the newest ended run behind the `kept` newest ones; None: there are no more.

    Runs that ended while the clock was ahead are not counted: they would take the places of newer
    ones.
    """
    row = db.fetch_one(
        f"SELECT r.ended_at, r.id FROM run r WHERE {_own(db)} AND r.ended_at <= ?"
        " ORDER BY r.ended_at DESC, r.id DESC LIMIT 1 OFFSET ?",
        (owner.instance, to_us(now), kept),
    )
    return None if row is None else RunPosition(*row)


def removable_runs(
    db: Database,
    owner: Owner,
    *,
    after: RunPosition,
    upto: RunPosition,
    now: datetime,
    limit: int,
) -> list[EndedRun]:
    """Return the oldest ended runs in a range that nothing needs any more, at most `limit`."""
    rows = db.fetch_all(
        f"SELECT r.id, r.ended_at FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL"
        " AND (r.ended_at, r.id) > (?, ?) AND (r.ended_at, r.id) <= (?, ?)"
        f" AND {_SETTLED} AND {_NOT_NEWEST} ORDER BY r.ended_at, r.id LIMIT ?",
        (
            owner.instance,
            after.ended_us,
            after.key,
            upto.ended_us,
            upto.key,
            *_settled_before(now),
            limit,
        ),
    )
    return [EndedRun(key=key, position=RunPosition(ended_us, key)) for key, ended_us in rows]


def removable_parts(
    db: Database,
    owner: Owner,
    kind: RetentionKind,
    *,
    after: RunPosition,
    ended_before: datetime,
    now: datetime,
    limit: int,
) -> list[EndedRun]:
    """Return the oldest ended runs after a position of which a part can be removed."""
    rows = db.fetch_all(
        f"SELECT r.id, r.ended_at FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL"
        f" AND r.{MARKS[kind]} IS NULL AND (r.ended_at, r.id) > (?, ?) AND r.ended_at <= ?"
        f" AND {_SETTLED} ORDER BY r.ended_at, r.id LIMIT ?",
        (
            owner.instance,
            after.ended_us,
            after.key,
            to_us(ended_before),
            *_settled_before(now),
            limit,
        ),
    )
    return [EndedRun(key=key, position=RunPosition(ended_us, key)) for key, ended_us in rows]


def oldest_kept(db: Database, owner: Owner, *, upto: RunPosition, now: datetime) -> datetime | None:
    """Return when the oldest ended run ended that stays when runs up to a position are removed."""
    row = db.fetch_one(
        f"SELECT r.ended_at FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL"
        f" AND NOT ((r.ended_at, r.id) <= (?, ?) AND {_SETTLED} AND {_NOT_NEWEST})"
        " ORDER BY r.ended_at, r.id LIMIT 1",
        (owner.instance, upto.ended_us, upto.key, *_settled_before(now)),
    )
    return None if row is None else from_us(row[0])


def remove_runs(db: Database, keys: Sequence[int], *, owner: Owner, now: datetime) -> int:
    """Remove every row of runs whose files are gone, and return how many runs were removed.

    Their receipts stay until they have reached their own age: a repeated request must not create
    the run again.
    """
    with db.transaction():
        instances.demand_current(db, owner)
        marks = ", ".join("?" for _ in keys)
        rows = db.fetch_all(
            f"SELECT r.id, r.labels FROM run r WHERE {_own(db)} AND r.id IN ({marks})"
            f" AND {_SETTLED} AND {_NOT_NEWEST}",
            (owner.instance, *keys, *_settled_before(now)),
        )
        if not rows:
            return 0
        found = tuple(key for key, _ in rows)
        marks = ", ".join("?" for _ in found)
        for key, labels in rows:
            for name, value in json_object(labels).items():
                db.execute(
                    "DELETE FROM run_label WHERE key = ? AND value = ? AND run = ?",
                    (name, str(value), key),
                )
        for table in _CHILDREN:
            db.execute(f"DELETE FROM {table} WHERE run IN ({marks})", found)
        db.execute(f"DELETE FROM run WHERE id IN ({marks})", found)
    return len(found)


def mark_removed(
    db: Database, kind: RetentionKind, *, owner: Owner, ended_before: datetime, now: datetime,
    limit: int,
) -> list[int]:  # fmt: skip
    """Record that a part of the oldest ended runs is removed, and return the keys of the runs.

    The caller removes the files. Events are rows, and are removed here.
    """
    column = MARKS[kind]
    with db.transaction():
        instances.demand_current(db, owner)
        rows = db.fetch_all(
            f"UPDATE run SET {column} = ? WHERE id IN (SELECT r.id FROM run r WHERE {_own(db)}"
            f" AND r.ended_at IS NOT NULL AND r.{column} IS NULL AND r.ended_at <= ?"
            f" AND {_SETTLED} ORDER BY r.ended_at, r.id LIMIT ?) RETURNING id",
            (to_us(now), owner.instance, to_us(ended_before), *_settled_before(now), limit),
        )
        keys = [key for (key,) in rows]
        if kind is RetentionKind.EVENTS and keys:
            marks = ", ".join("?" for _ in keys)
            db.execute(f"DELETE FROM run_event WHERE run IN ({marks})", keys)
    return keys


def is_output_removed(db: Database, run: Run) -> bool:
    """Return True once the output of a run was removed."""
    row = db.fetch_one("SELECT output_removed_at FROM run WHERE id = ?", (run.key,))
    return row is None or row[0] is not None


def count_receipts(db: Database, owner: Owner, *, created_before: datetime) -> int:
    """Return how many receipts are older."""
    row = db.fetch_one(
        f"SELECT count(*) FROM request_receipt WHERE {_own_receipt(db)} AND created_at <= ?",
        (owner.instance, to_us(created_before)),
    )
    return 0 if row is None else int(row[0])


def remove_receipts(db: Database, *, owner: Owner, created_before: datetime, limit: int) -> int:
    """Remove the oldest receipts, at most `limit`, and return their number."""
    with db.transaction():
        instances.demand_current(db, owner)
        removed: int = db.execute(
            "DELETE FROM request_receipt WHERE request_id IN (SELECT request_id FROM"
            f" request_receipt WHERE {_own_receipt(db)} AND created_at <= ?"
            " ORDER BY created_at LIMIT ?)",
            (owner.instance, to_us(created_before), limit),
        ).rowcount
    return removed


def _unnamed_reports(db: Database) -> str:
    """Return a query for old reports that nothing names. Parameters: the time, the instance.

    The newest report of each instance is not among them, nor the newest one with decisions: a
    reader of the decisions that has read all of them holds its cursor.
    """
    return (
        f"SELECT c.id FROM reconciliation c WHERE c.started_at <= ? AND c.state <> 'RUNNING'"
        f" AND {own_reports(db.dialect)}"
        " AND c.id NOT IN (SELECT max(id) FROM reconciliation GROUP BY instance)"
        " AND c.id <> (SELECT COALESCE(max(id), 0) FROM reconciliation WHERE decisions <> '{}')"
        " AND NOT EXISTS (SELECT 1 FROM recovery_event e WHERE e.reconciliation = c.id)"
        " AND NOT EXISTS (SELECT 1 FROM process_lease l WHERE l.ended_by = c.id)"
        " AND NOT EXISTS (SELECT 1 FROM quarantine q WHERE q.reconciliation = c.id)"
    )


def count_reports(db: Database, owner: Owner, *, started_before: datetime) -> int:
    """Return how many reports can be removed."""
    row = db.fetch_one(
        f"SELECT count(*) FROM ({_unnamed_reports(db)}) AS unnamed",
        (to_us(started_before), owner.instance),
    )
    return 0 if row is None else int(row[0])


def remove_reports(db: Database, *, owner: Owner, started_before: datetime, limit: int) -> int:
    """Remove the oldest reports that nothing names, at most `limit`, and return their number."""
    with db.transaction():
        instances.demand_current(db, owner)
        removed: int = db.execute(
            "DELETE FROM reconciliation WHERE id IN"
            f" ({_unnamed_reports(db)} ORDER BY c.id LIMIT ?)",
            (to_us(started_before), owner.instance, limit),
        ).rowcount
    return removed


# -- the files of runs -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """What the store says about a run whose folder exists.

    Attributes:
        own: False for a run of another instance on the same database.
        removed: the parts that are recorded as removed.
    """

    own: bool
    removed: frozenset[RetentionKind]


def stored_runs(db: Database, owner: Owner, keys: Sequence[int]) -> dict[int, StoredRun]:
    """Return what is stored of the runs with these keys; nothing for an unknown key."""
    marks = ", ".join("?" for _ in keys)
    columns = ", ".join(f"r.{column}" for column in MARKS.values())
    rows = db.fetch_all(
        f"SELECT r.id, CASE WHEN {_own(db)} THEN 1 ELSE 0 END, {columns} FROM run r"
        f" WHERE r.id IN ({marks})",
        (owner.instance, *keys),
    )
    return {
        key: StoredRun(
            own=bool(own),
            removed=frozenset(
                part for part, at in zip(MARKS, times, strict=True) if at is not None
            ),
        )
        for key, own, *times in rows
    }


# -- the size of the store ---------------------------------------------------------------------

AUTO_VACUUM_INCREMENTAL: Final = 2


def free_pages(db: Database) -> int:
    """Return how many pages of a SQLite file are free and can be given back.

    0 for PostgreSQL, whose autovacuum makes room by itself, and for a file that was made without
    `auto_vacuum`.
    """
    if db.dialect.kind is not DatabaseKind.SQLITE:
        return 0
    mode, free = db.fetch_one("PRAGMA auto_vacuum"), db.fetch_one("PRAGMA freelist_count")
    if mode is None or free is None or mode[0] != AUTO_VACUUM_INCREMENTAL:
        return 0
    return int(free[0])


def give_back_pages(db: Database, *, owner: Owner, pages: int) -> int:
    """Give free pages of a SQLite file back to the file system, and return how many are left."""
    with db.transaction():
        instances.demand_current(db, owner)
        db.fetch_all(f"PRAGMA incremental_vacuum({int(pages)})")  # each row that is read frees one
    return free_pages(db)
