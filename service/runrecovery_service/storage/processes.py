"""Leases: one row a launch, written before it happens and kept until its tree is gone."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime

from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import Run
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import to_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where processes are launched: a host, one boot of it, one pid namespace."""

    host_id: str
    boot_id: str
    pid_namespace: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A recorded launch. `pid` and `start_ticks` are None until the process is on record."""

    key: int
    run_key: int
    run_id: str
    attempt: int
    place: Place
    cookie: str
    pid: int | None
    start_ticks: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What is left of a launch: `gone` is False while something of it could not be ended."""

    exit_code: int | None
    processes_ended: int
    gone: bool


def intend(db: Database, run: Run, *, owner: Owner, place: Place, now: datetime) -> Lease:
    """Record the launch that is about to happen, in the caller's transaction."""
    cookie = secrets.token_hex(16)
    row = db.fetch_one(
        "INSERT INTO process_lease (run, attempt, turn, instance, epoch, host_id, boot_id,"
        " pid_namespace, cookie, state, processes_ended, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'INTENT', 0, ?) RETURNING id",
        (
            run.key,
            run.attempt,
            run.turn,
            owner.instance,
            owner.epoch,
            place.host_id,
            place.boot_id,
            place.pid_namespace,
            cookie,
            to_us(now),
        ),
    )
    assert row is not None  # noqa: S101 - RETURNING gives the row that was inserted
    return Lease(
        key=row[0],
        run_key=run.key,
        run_id=run.run_id,
        attempt=run.attempt,
        place=place,
        cookie=cookie,
        pid=None,
        start_ticks=None,
    )


def launched(db: Database, lease_key: int, *, pid: int, start_ticks: int) -> None:
    """Record which process it became.

    Raises:
        Fenced: the lease has been closed meanwhile, by a newer epoch.
    """
    with db.transaction():
        changed = db.execute(
            "UPDATE process_lease SET pid = ?, start_ticks = ?, state = 'RUNNING'"
            " WHERE id = ? AND state IN ('INTENT', 'RUNNING')",
            (pid, start_ticks, lease_key),
        ).rowcount
    if changed != 1:
        raise Fenced(f"lease {lease_key}")


def is_over(db: Database, lease_key: int) -> bool:
    """True when the end of this launch is on record."""
    row = db.fetch_one("SELECT state FROM process_lease WHERE id = ?", (lease_key,))
    return row is not None and row[0] in {"CLOSED", "KILL_PENDING"}


def close(
    db: Database,
    lease_key: int,
    ended: Ended,
    *,
    now: datetime,
    reconciliation_key: int | None = None,
) -> None:
    """Close the lease, or keep it as KILL_PENDING while something of it is alive."""
    with db.transaction():
        db.execute(
            "UPDATE process_lease SET state = ?, exit_code = ?, ended_by = ?,"
            " processes_ended = processes_ended + ?, closed_at = ? WHERE id = ?",
            (
                "CLOSED" if ended.gone else "KILL_PENDING",
                ended.exit_code,
                reconciliation_key,
                ended.processes_ended,
                to_us(now) if ended.gone else None,
                lease_key,
            ),
        )


def open_of_earlier_epochs(db: Database, owner: Owner) -> list[Lease]:
    """Return every launch of this instance's earlier epochs that is not known to be gone."""
    rows = db.fetch_all(
        "SELECT l.id, l.run, r.run_id, l.attempt, l.host_id, l.boot_id, l.pid_namespace,"
        " l.cookie, l.pid, l.start_ticks"
        " FROM process_lease l LEFT JOIN run r ON r.id = l.run"
        " WHERE l.instance = ? AND l.state <> 'CLOSED' AND l.epoch < ? ORDER BY l.id",
        (owner.instance, owner.epoch),
    )
    return [_lease_from_row(row) for row in rows]


def _lease_from_row(row: Row) -> Lease:
    key, run_key, run_id, attempt, host_id, boot_id, pid_namespace, cookie, pid, start_ticks = row
    return Lease(
        key=key,
        run_key=run_key,
        run_id=run_id or f"#{run_key}",
        attempt=attempt,
        place=Place(host_id=host_id, boot_id=boot_id, pid_namespace=pid_namespace),
        cookie=cookie,
        pid=pid,
        start_ticks=start_ticks,
    )
