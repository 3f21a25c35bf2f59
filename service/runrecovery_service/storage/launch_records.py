"""Leases: one row a launch, written before it happens and kept until its tree is gone.

INTENT: it is about to be launched. GATED: its shim stands at the gate; the agent has not run.
RUNNING: the gate may be open. CLOSED: nothing of it is left. KILL_PENDING: it is over, but
something of it could not be ended. Each is committed before the thing that it tells of can act.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from runrecovery_service.domain.errors import Fenced, RunGone
from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.domain.run import Run
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import from_us, json_value, to_json, to_us

CLOSED_PER_COMMIT: Final = 1000
ORPHANS_KEPT: Final = 100
"""Processes of one launch whose fate is kept; the log has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSite:
    """Where processes are launched: a host, one boot of it, one pid namespace.

    Attributes:
        watermark_bits: how large a watermark may be set here; 0: none.
        cgroup_parent: the delegated cgroup below which each launch gets its own; None: none.
    """

    host_id: str
    boot_id: str
    pid_namespace: int
    watermark_bits: int = 0
    cgroup_parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """A recorded launch and the marks of its tree: `cookie` and `watermark`, which are secrets,
    `cgroup`, and the shim's `pid` and `start_ticks`, None until that is on record. `unended`: it
    is over, and something of it could not be ended so far."""

    key: int
    run_key: int
    run_id: str
    attempt: int
    turn: int
    host_id: str
    boot_id: str
    pid_namespace: int
    cookie: str = field(repr=False)
    watermark: int | None = field(repr=False)
    cgroup: str | None
    pid: int | None
    start_ticks: int | None
    unended: bool

    @property
    def identity(self) -> tuple[int, str]:
        """The parameters of `_IT`: keys are handed out again when a database has lost commits."""
        return self.key, self.cookie


_IT: Final = "id = ? AND cookie = ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the agent's own process used: microseconds of processor, KiB of memory at most."""

    user_us: int
    system_us: int
    max_rss_kib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnd:
    """What is left of a launch: `gone` is False while something of it could not be ended.

    `exit_code` and `usage` are None when nobody was there to see the agent end. `orphans` is for a
    recovery: what it did to each process.
    """

    exit_code: int | None
    processes_ended: int
    gone: bool
    usage: Usage | None = None
    orphans: tuple[Orphan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnendedLaunch:
    """A launch that is over and of which something is still alive."""

    run_id: str
    attempt: int
    launched_at: datetime


_LEASE: Final = (
    "SELECT l.id, l.run, r.run_id, l.attempt, l.turn, l.host_id, l.boot_id, l.pid_namespace,"
    " l.cookie, l.watermark, l.cgroup, l.pid, l.start_ticks, l.state"
    " FROM process_lease l LEFT JOIN run r ON r.id = l.run"
)


def record_launch(
    db: Database, run: Run, *, owner: Owner, place: LaunchSite, now: datetime
) -> LaunchRecord:
    """Record the launch that is about to happen, in the caller's transaction."""
    bits = place.watermark_bits
    # The highest bit set: a number of full length, as no other use of that limit would choose.
    watermark = secrets.randbits(bits) | 1 << (bits - 1) if bits else None
    cgroup = f"{place.cgroup_parent}/{secrets.token_hex(8)}" if place.cgroup_parent else None
    row = db.fetch_one(
        "INSERT INTO process_lease (run, attempt, turn, instance, epoch, host_id, boot_id,"
        " pid_namespace, cookie, watermark, cgroup, state, processes_ended, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'INTENT', 0, ?) RETURNING id",
        (
            run.key,
            run.attempt,
            run.turn,
            owner.instance,
            owner.epoch,
            place.host_id,
            place.boot_id,
            place.pid_namespace,
            secrets.token_hex(16),
            watermark,
            cgroup,
            to_us(now),
        ),
    )
    assert row is not None  # noqa: S101 - RETURNING gives the row that was inserted
    made = db.fetch_one(f"{_LEASE} WHERE l.id = ?", (row[0],))
    assert made is not None  # noqa: S101 - it was inserted in this transaction
    return _lease_from_row(made)


def record_gated(
    db: Database, lease: LaunchRecord, *, owner: Owner, pid: int, start_ticks: int
) -> None:
    """Record the shim that stands at the gate.

    Raises:
        Fenced: a newer epoch has started, or has closed the lease.
    """
    _advance(
        db, lease, "state = 'GATED', pid = ?, start_ticks = ?", (pid, start_ticks),
        # RUNNING: the system refused to start the agent, and it is launched again.
        owner=owner, among=("INTENT", "GATED", "RUNNING"),
    )  # fmt: skip


def record_running(db: Database, lease: LaunchRecord, *, owner: Owner) -> None:
    """Record that the gate is about to be opened.

    Raises:
        Fenced: a newer epoch has started, or has closed the lease.
    """
    _advance(db, lease, "state = 'RUNNING'", (), owner=owner, among=("GATED", "RUNNING"))


def _advance(
    db: Database,
    lease: LaunchRecord,
    change: str,
    values: tuple[object, ...],
    *,
    owner: Owner,
    among: tuple[str, ...],
) -> None:
    """Change a lease that is in one of some states; the later one too, since a commit whose
    answer was lost is done again."""
    marks = ", ".join("?" for _ in among)
    with db.transaction():
        instances.demand_current(db, owner)
        changed = db.execute(
            f"UPDATE process_lease SET {change} WHERE {_IT} AND epoch = ? AND state IN ({marks})",
            (*values, *lease.identity, owner.epoch, *among),
        ).rowcount
        if changed != 1 and not is_recorded(db, lease):
            raise RunGone(f"the launch of run {lease.run_id!r}")
    if changed != 1:
        raise Fenced(f"lease {lease.key}")


def is_recorded(db: Database, lease: LaunchRecord) -> bool:
    """True when this very launch is on record."""
    return db.fetch_one(f"SELECT 1 FROM process_lease WHERE {_IT}", lease.identity) is not None


def is_over(db: Database, lease: LaunchRecord) -> bool:
    """True when the end of this launch is on record."""
    row = db.fetch_one(f"SELECT state FROM process_lease WHERE {_IT}", lease.identity)
    return row is not None and row[0] in {"CLOSED", "KILL_PENDING"}


def close(
    db: Database,
    lease: LaunchRecord,
    ended: LaunchEnd,
    *,
    now: datetime,
    reconciliation_key: int | None = None,
) -> None:
    """Close the lease, or keep it as KILL_PENDING while something of it is alive."""
    usage = ended.usage
    with db.transaction():
        db.execute(
            "UPDATE process_lease SET state = ?, exit_code = COALESCE(?, exit_code),"
            " user_us = COALESCE(?, user_us), system_us = COALESCE(?, system_us),"
            " max_rss_kib = COALESCE(?, max_rss_kib), orphans = COALESCE(?, orphans),"
            " ended_by = ?,"
            f" processes_ended = processes_ended + ?, closed_at = ? WHERE {_IT}",
            (
                "CLOSED" if ended.gone else "KILL_PENDING",
                ended.exit_code,
                None if usage is None else usage.user_us,
                None if usage is None else usage.system_us,
                None if usage is None else usage.max_rss_kib,
                _orphans_to_json(ended.orphans),
                reconciliation_key,
                ended.processes_ended,
                to_us(now) if ended.gone else None,
                *lease.identity,
            ),
        )


def _orphans_to_json(orphans: tuple[Orphan, ...]) -> str | None:
    """As `orphans_from_json` reads them; None for none."""
    if not orphans:
        return None
    kept = orphans[:ORPHANS_KEPT]
    return to_json([[o.pid, o.evidence, list(o.signals), o.ended, o.by] for o in kept])


def orphans_from_json(text: str | None) -> tuple[Orphan, ...]:
    """Return what a recovery did to the processes of a launch; nothing where that is unreadable."""
    stored: Any = json_value(text)
    try:
        return tuple(
            Orphan(pid=pid, evidence=evidence, signals=tuple(signals), ended=ended, by=by)
            for pid, evidence, signals, ended, by in stored or ()
        )
    except (TypeError, ValueError):
        return ()


def close_all(
    db: Database,
    ended: Iterable[tuple[LaunchRecord, LaunchEnd]],
    *,
    now: datetime,
    reconciliation_key: int,
) -> None:
    """Close many leases in a few commits."""
    left = list(ended)
    while left:
        now_closed, left = left[:CLOSED_PER_COMMIT], left[CLOSED_PER_COMMIT:]
        with db.transaction():
            for lease, one in now_closed:
                close(db, lease, one, now=now, reconciliation_key=reconciliation_key)


def unclosed_launches(db: Database, owner: Owner, *, before: int) -> list[LaunchRecord]:
    """Return every launch of this instance's epochs below `before` that is not known to be gone."""
    rows = db.fetch_all(
        f"{_LEASE} WHERE l.instance = ? AND l.state <> 'CLOSED' AND l.epoch < ? ORDER BY l.id",
        (owner.instance, before),
    )
    return [_lease_from_row(row) for row in rows]


def launches_to_sweep(
    db: Database, owner: Owner, *, now: datetime, closed_within_s: float
) -> list[LaunchRecord]:
    """Return the launches that are over and want another look: those of which something could
    not be ended, and those closed a short time ago."""
    since = to_us(now - timedelta(seconds=closed_within_s))
    rows = db.fetch_all(
        f"{_LEASE} WHERE l.instance = ? AND l.state = 'KILL_PENDING'"
        f" UNION ALL {_LEASE} WHERE l.instance = ? AND l.closed_at >= ?",
        (owner.instance, owner.instance, since),
    )
    return [_lease_from_row(row) for row in rows]


def record_late_end(
    db: Database, late: Iterable[tuple[LaunchRecord, LaunchEnd]], *, now: datetime
) -> None:
    """Record what a patrol ended of launches that were over. Who ended them before stays named."""
    with db.transaction():
        for lease, ended in late:
            db.execute(
                "UPDATE process_lease SET processes_ended = processes_ended + ?,"
                f" state = ?, closed_at = ? WHERE {_IT} AND state IN ('KILL_PENDING', 'CLOSED')",
                (
                    ended.processes_ended,
                    "CLOSED" if ended.gone else "KILL_PENDING",
                    to_us(now) if ended.gone else None,
                    *lease.identity,
                ),
            )
            db.mark_changed(lease.run_key)  # it may be free to be launched again


def unended_launches(db: Database, owner: Owner, *, limit: int) -> list[UnendedLaunch]:
    """Return launches of this instance that are over and of which something is alive."""
    rows = db.fetch_all(
        "SELECT r.run_id, l.run, l.attempt, l.created_at FROM process_lease l"
        " LEFT JOIN run r ON r.id = l.run"
        " WHERE l.instance = ? AND l.state = 'KILL_PENDING' ORDER BY l.id LIMIT ?",
        (owner.instance, limit),
    )
    return [
        UnendedLaunch(
            run_id=run_id or f"#{run_key}", attempt=attempt, launched_at=from_us(created_at)
        )
        for run_id, run_key, attempt, created_at in rows
    ]


def _lease_from_row(row: Row) -> LaunchRecord:
    (
        key, run_key, run_id, attempt, turn, host_id, boot_id, pid_namespace,
        cookie, watermark, cgroup, pid, start_ticks, state,
    ) = row  # fmt: skip
    return LaunchRecord(
        key=key,
        run_key=run_key,
        run_id=run_id or f"#{run_key}",
        attempt=attempt,
        turn=turn,
        host_id=host_id,
        boot_id=boot_id,
        pid_namespace=pid_namespace,
        cookie=cookie,
        watermark=watermark,
        cgroup=cgroup,
        pid=pid,
        start_ticks=start_ticks,
        unended=state == "KILL_PENDING",
    )
