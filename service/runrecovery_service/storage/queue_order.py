"""The order of the queue: which run starts next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from runrecovery_service.domain.run import Run
from runrecovery_service.domain.steady_time import SteadyTime
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import from_us
from runrecovery_service.storage.sql_dialects import DatabaseKind


def next_in_queue(
    db: Database,
    owner: Owner,
    busy_engines: Sequence[str],
    steady: SteadyTime,
    without: Collection[int],
) -> tuple[int, datetime] | None:
    """Return the key of the run that starts next, and when it was queued; None if no run can start.

    Args:
        busy_engines: engines without a free slot, whose runs do not start.
        steady: the present time. A run whose deadline has passed does not start.
        without: the keys of runs that do not start.
    """
    row = db.fetch_one(
        "SELECT id, queued_at FROM run WHERE owner = ? AND status = 'QUEUED' AND owner_epoch = ?"
        " AND recovery_state <> 'QUARANTINED'"
        " AND (run_due_us IS NULL OR run_due_us > ?)"
        " AND resume_due_us IS NULL"
        # A new process must not run while an earlier process of the run could not be killed.
        # Launches of an instance that was taken over do not count: the shim on its host has killed
        # their processes.
        " AND NOT EXISTS (SELECT 1 FROM process_lease l"
        " WHERE l.run = run.id AND l.state = 'KILL_PENDING' AND l.instance = run.owner)"
        + _not_in("engine", busy_engines)
        + _not_in("id", without)
        + " ORDER BY queued_at, id LIMIT 1"
        # Peers take runs from this queue too. A run that a peer is taking is skipped.
        + (" FOR UPDATE SKIP LOCKED" if db.dialect.kind is DatabaseKind.POSTGRESQL else ""),
        (owner.instance, owner.epoch, steady.us, *busy_engines, *without),
    )
    return None if row is None else (int(row[0]), from_us(row[1]))


def latest_entry(run: Run, queued_at: datetime) -> datetime:
    """Return when the run last entered a queue. A move to another instance's queue does not count.

    Args:
        queued_at: the time that orders the queue; a recovery that queues the run again keeps this
            time.
    """
    return queued_at if run.recovery is None else max(queued_at, run.recovery.recovered_at)


def _not_in(column: str, values: Collection[object]) -> str:
    marks = ", ".join("?" for _ in values)
    return f" AND {column} NOT IN ({marks})" if marks else ""
