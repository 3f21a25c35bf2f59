"""Finds and removes old ended runs, parts of them, old receipts and old reports.

A run that could still continue is never touched. A part of a run is first recorded as removed, so
that readers get a correct answer, then its files are removed. The rows of a whole run are removed
last, so that a crash leaves rows without files, never files without rows. Transactions that remove
rows are short, because on SQLite every other write waits for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import Final

from runrecovery_service.domain.retention import RetentionKind, RunPosition
from runrecovery_service.domain.run import TERMINAL, RecoveryState, Run
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.reports import own_reports
from runrecovery_service.storage.rows import from_us, json_object, to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.tables import sql_words

SETTLES_S: Final = 120.0
"""How many seconds ago a run and its launches must have ended before anything of the run is
removed. It is more than the 60 s for which sweeps still search for processes of a closed launch."""

PIECE: Final = 20
"""How many rows of a run one statement deletes. One row can have 64 KiB."""

_CHILDREN: Final = {
    "interaction": "no",
    "run_event": "no",
    "recovery_event": "no",
    "process_lease": "id",
    "quarantine": "id",
    # Deleted last: readers of the output need it until the run's own row is deleted.
    "removed_part": "part",
}
"""The tables with rows of a run, each with the column that identifies a row within the run."""
_SETTLED: Final = (
    f"r.status IN ({sql_words(frozenset(TERMINAL))})"
    f" AND r.recovery_state <> '{RecoveryState.QUARANTINED}'"
    # Is NULL once the window for ReopenRun has passed.
    " AND r.reopen_due_us IS NULL AND r.ended_at <= ?"
    # An aggregate, because PostgreSQL would evaluate EXISTS by reading all launches.
    " AND COALESCE((SELECT max(CASE WHEN l.state = 'CLOSED' AND l.closed_at IS NOT NULL"
    " THEN l.closed_at ELSE 9223372036854775807 END)"
    " FROM process_lease l WHERE l.run = r.id), 0) <= ?"
    " AND NOT EXISTS (SELECT 1 FROM trust_entry t WHERE t.run = r.id)"
)
"""The condition for runs that have ended for good. Parameters: twice the latest end time that
counts."""
# If the newest row is deleted, SQLite uses its key again for the next row. The old row's files,
# receipts and cursors would then belong to the new row.
_NOT_NEWEST: Final = (
    "r.id < (SELECT max(id) FROM run) AND r.id <> COALESCE((SELECT l.run FROM process_lease l"
    " WHERE l.id = (SELECT max(id) FROM process_lease)), 0)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A page of ended runs.

    Attributes:
        keys: the keys of runs on this page that can be removed, or can lose a part.
        last: the position of the last run of the page; None: there are no more pages.
    """

    keys: list[int]
    last: RunPosition | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a transaction got within its time limit.

    Attributes:
        handled: how many of the given runs, counted from the first, are done.
        changed: the keys of those runs that the transaction has changed.
    """

    handled: int
    changed: list[int]


def _own(db: Database) -> str:
    """Return an SQL condition for runs of this service. Parameter: the instance.

    In a SQLite store every run counts as the service's own, even under another instance name.
    """
    return "? IS NOT NULL" if db.dialect.kind is DatabaseKind.SQLITE else "r.owner = ?"


def _own_receipt(db: Database) -> str:
    """Return an SQL condition for receipts of this service. Parameter: the instance."""
    return "? IS NOT NULL" if db.dialect.kind is DatabaseKind.SQLITE else "owner = ?"


def _settled_before(now: datetime) -> tuple[int, int]:
    latest = to_us(now - timedelta(seconds=SETTLES_S))
    return latest, latest


def position_of_surplus(
    db: Database, owner: Owner, *, kept: int, now: datetime
) -> RunPosition | None:
    """Return the position of the newest ended run after the `kept` newest; None: there are no more.

    Runs with an end time in the future, recorded while the clock was ahead, are not counted. They
    would take the places of newer runs.
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
) -> Found:
    """Return a page of the ended runs in a range of positions, with those that can be removed."""
    rows = db.fetch_all(
        f"SELECT r.id, r.ended_at FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL"
        " AND (r.ended_at, r.id) > (?, ?) AND (r.ended_at, r.id) <= (?, ?)"
        " ORDER BY r.ended_at, r.id LIMIT ?",
        (owner.instance, after.ended_us, after.key, upto.ended_us, upto.key, limit),
    )
    return _found(db, rows, f"{_SETTLED} AND {_NOT_NEWEST}", now)


def removable_parts(
    db: Database,
    owner: Owner,
    kind: RetentionKind,
    *,
    after: RunPosition,
    ended_before: datetime,
    now: datetime,
    limit: int,
) -> Found:
    """Return a page of ended runs after a position, with those that can lose this part."""
    rows = db.fetch_all(
        f"SELECT r.id, r.ended_at FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL"
        " AND (r.ended_at, r.id) > (?, ?) AND r.ended_at <= ?"
        " AND NOT EXISTS (SELECT 1 FROM removed_part p WHERE p.run = r.id AND p.part = ?)"
        " ORDER BY r.ended_at, r.id LIMIT ?",
        (owner.instance, after.ended_us, after.key, to_us(ended_before), kind.value, limit),
    )
    return _found(db, rows, _SETTLED, now)


def _found(db: Database, rows: Sequence[Row], which: str, now: datetime) -> Found:
    """Return the runs of a page for which a condition holds.

    This is a separate query, so that the page itself is read from an index, without its large rows.
    """
    if not rows:
        return Found(keys=[], last=None)
    keys = [key for key, _ in rows]
    marks = ", ".join("?" for _ in keys)
    held = {
        key
        for (key,) in db.fetch_all(
            f"SELECT r.id FROM run r WHERE r.id IN ({marks}) AND {which}",
            (*keys, *_settled_before(now)),
        )
    }
    last_key, last_us = rows[-1]
    return Found(keys=[key for key in keys if key in held], last=RunPosition(last_us, last_key))


def oldest_kept(db: Database, owner: Owner, *, upto: RunPosition, now: datetime) -> datetime | None:
    """Return the end time of the oldest run that remains after a removal up to a position."""
    row = db.fetch_one(
        f"SELECT r.ended_at FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL"
        f" AND NOT ((r.ended_at, r.id) <= (?, ?) AND {_SETTLED} AND {_NOT_NEWEST})"
        " ORDER BY r.ended_at, r.id LIMIT 1",
        (owner.instance, upto.ended_us, upto.key, *_settled_before(now)),
    )
    return None if row is None else from_us(row[0])


def mark_removed(
    db: Database,
    kinds: Sequence[RetentionKind],
    keys: Sequence[int],
    *,
    owner: Owner,
    now: datetime,
    within_s: float,
) -> Progress:
    """Record that parts of ended runs are removed.

    The caller then removes the files. Events have no files; their rows are removed here. Call this
    again for runs that were not handled.

    Args:
        within_s: seconds after which no further row is begun: other writes wait for this
            transaction.
    """
    ends, changed = monotonic() + within_s, list[int]()
    with db.transaction():
        instances.demand_current(db, owner)
        for number, key in enumerate(keys):
            if number and monotonic() >= ends:
                return Progress(handled=number, changed=changed)
            if not _holds(db, owner, key, _SETTLED, now):
                continue
            if RetentionKind.EVENTS in kinds and not _remove_rows(db, "run_event", key, ends):
                return Progress(handled=number, changed=changed)
            for kind in kinds:
                db.execute(
                    "INSERT INTO removed_part (run, part) VALUES (?, ?) ON CONFLICT DO NOTHING",
                    (key, kind.value),
                )
            changed.append(key)
    return Progress(handled=len(keys), changed=changed)


def remove_runs(
    db: Database, keys: Sequence[int], *, owner: Owner, now: datetime, within_s: float
) -> Progress:
    """Remove every row of runs whose files are removed.

    The row of the run itself is removed last; the removal of its other rows can take several
    transactions. Call this again for runs that were not handled. Receipts are kept until they reach
    their own age, because a repeated request must not create the run again.

    Args:
        within_s: seconds after which no further row is begun: other writes wait for this
            transaction.
    """
    ends, changed = monotonic() + within_s, list[int]()
    with db.transaction():
        instances.demand_current(db, owner)
        for number, key in enumerate(keys):
            if number and monotonic() >= ends:
                return Progress(handled=number, changed=changed)
            if not _holds(db, owner, key, f"{_SETTLED} AND {_NOT_NEWEST}", now):
                continue
            if not all(_remove_rows(db, table, key, ends) for table in _CHILDREN):
                return Progress(handled=number, changed=changed)
            _remove_labels(db, key)
            db.execute("DELETE FROM run WHERE id = ?", (key,))
            changed.append(key)
    return Progress(handled=len(keys), changed=changed)


def _holds(db: Database, owner: Owner, key: int, which: str, now: datetime) -> bool:
    row = db.fetch_one(
        f"SELECT 1 FROM run r WHERE {_own(db)} AND r.id = ? AND {which}",
        (owner.instance, key, *_settled_before(now)),
    )
    return row is not None


def _remove_rows(db: Database, table: str, key: int, ends: float) -> bool:
    """Delete a run's rows of a table; return False if the time ended before all were deleted."""
    column = _CHILDREN[table]
    while True:
        deleted = db.execute(
            f"DELETE FROM {table} WHERE run = ? AND {column} IN"
            f" (SELECT {column} FROM {table} WHERE run = ? LIMIT {PIECE})",
            (key, key),
        ).rowcount
        if deleted and monotonic() >= ends:
            return False
        if deleted < PIECE:
            return True


def _remove_labels(db: Database, key: int) -> None:
    row = db.fetch_one("SELECT labels FROM run WHERE id = ?", (key,))
    for name, value in json_object(row[0] if row else None).items():
        db.execute(
            "DELETE FROM run_label WHERE key = ? AND value = ? AND run = ?",
            (name, str(value), key),
        )


def is_output_removed(db: Database, run: Run) -> bool:
    """Return whether the output of a run was removed."""
    row = db.fetch_one(
        "SELECT 1 FROM run r WHERE r.id = ? AND NOT EXISTS"
        " (SELECT 1 FROM removed_part p WHERE p.run = r.id AND p.part = ?)",
        (run.key, RetentionKind.OUTPUTS.value),
    )
    return row is None


def count_receipts(db: Database, owner: Owner, *, created_before: datetime) -> int:
    """Return how many receipts were created at or before a time."""
    row = db.fetch_one(
        f"SELECT count(*) FROM request_receipt WHERE {_own_receipt(db)} AND created_at <= ?",
        (owner.instance, to_us(created_before)),
    )
    return 0 if row is None else int(row[0])


def remove_receipts(db: Database, *, owner: Owner, created_before: datetime, limit: int) -> int:
    """Remove at most `limit` of these receipts, oldest first, and return how many were removed."""
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
    """Return a query for old reports to which no row refers. Parameters: the time, the instance.

    The newest report of each instance is excluded. The newest report with decisions is excluded
    too, because a reader that has read all decisions has a cursor in it.
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
    """Remove at most `limit` of these reports, oldest first, and return how many were removed."""
    with db.transaction():
        instances.demand_current(db, owner)
        removed: int = db.execute(
            "DELETE FROM reconciliation WHERE id IN"
            f" ({_unnamed_reports(db)} ORDER BY c.id LIMIT ?)",
            (to_us(started_before), owner.instance, limit),
        ).rowcount
    return removed


# -- the time ----------------------------------------------------------------------------------


def confirmed_time(db: Database, owner: Owner) -> datetime | None:
    """Return the latest confirmed wall-clock time; if there is none, the end of the latest run."""
    row = db.fetch_one(
        "SELECT COALESCE(time_confirmed_at,"
        f" (SELECT max(r.ended_at) FROM run r WHERE {_own(db)} AND r.ended_at IS NOT NULL))"
        " FROM instance WHERE name = ?",
        (owner.instance, owner.instance),
    )
    return None if row is None or row[0] is None else from_us(row[0])


def confirm_time(db: Database, *, owner: Owner, now: datetime) -> None:
    """Record `now` as a correct wall-clock time, with which a later start compares its clock."""
    with db.transaction():
        instances.demand_current(db, owner)
        db.execute(
            "UPDATE instance SET time_confirmed_at = ? WHERE name = ?",
            (to_us(now), owner.instance),
        )


# -- the files of runs -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """The row of a run whose folder exists.

    Attributes:
        own: whether the run belongs to this service, not to another instance on the database.
        removed: the parts that are recorded as removed.
    """

    own: bool
    removed: frozenset[RetentionKind]


def stored_runs(db: Database, owner: Owner, keys: Sequence[int]) -> dict[int, StoredRun]:
    """Return by key the rows of these runs. A key without a row is left out."""
    marks = ", ".join("?" for _ in keys)
    removed = defaultdict[int, set[RetentionKind]](set)
    for key, part in db.fetch_all(
        f"SELECT run, part FROM removed_part WHERE run IN ({marks})", tuple(keys)
    ):
        removed[key].add(RetentionKind(part))
    rows = db.fetch_all(
        f"SELECT r.id, CASE WHEN {_own(db)} THEN 1 ELSE 0 END FROM run r WHERE r.id IN ({marks})",
        (owner.instance, *keys),
    )
    return {key: StoredRun(own=bool(own), removed=frozenset(removed[key])) for key, own in rows}


# -- the size of the store ---------------------------------------------------------------------

AUTO_VACUUM_INCREMENTAL: Final = 2


def free_pages(db: Database) -> int:
    """Return how many free pages of a SQLite file can be returned to the file system.

    The number is 0 for a file that was created without `auto_vacuum`, and for PostgreSQL, which has
    its own autovacuum.
    """
    if db.dialect.kind is not DatabaseKind.SQLITE:
        return 0
    mode, free = db.fetch_one("PRAGMA auto_vacuum"), db.fetch_one("PRAGMA freelist_count")
    if mode is None or free is None or mode[0] != AUTO_VACUUM_INCREMENTAL:
        return 0
    return int(free[0])


def give_back_pages(db: Database, *, owner: Owner, pages: int, within_s: float) -> int:
    """Return free pages of a SQLite file to the file system; report how many are left.

    Args:
        within_s: seconds after which no further page is returned, because other writes wait.
    """
    ends = monotonic() + within_s
    with db.transaction():
        instances.demand_current(db, owner)
        for _ in range(pages):
            # One page at a time: Python's driver executes one step of this statement, and a step
            # frees one page.
            db.execute("PRAGMA incremental_vacuum(1)").fetchall()
            if monotonic() >= ends:
                break
    return free_pages(db)
