"""Launch records: one row per launch, written before the process is spawned.

The states of a launch:

- INTENT: the shim may have been spawned.
- GATED: the shim runs and holds the agent back.
- RUNNING: the shim has started the agent, or is about to start it.
- CLOSED: no process of the launch is left.
- KILL_PENDING: the turn is over, but a process could not be killed.

INTENT, GATED and RUNNING are committed before the step that they permit.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import field
from datetime import datetime, timedelta
from typing import Any, Final

from runrecovery_service.domain.errors import Fenced, RunGone
from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.domain.run import Run
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import instances, interruptions
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import from_us, json_value, to_json, to_us

CLOSED_PER_COMMIT: Final = 1000
ORPHANS_KEPT: Final = 100
"""The most killed processes that are recorded for one launch. The log names all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSite:
    """Where an instance launches processes: the host and its boot, and the pid namespace.

    Attributes:
        watermark_bits: the length of a watermark; 0: watermarks cannot be set here.
        cgroup_parent: the delegated cgroup that gets a child for each launch; None: no cgroups.
    """

    host_id: str
    boot_id: str
    pid_namespace: int
    watermark_bits: int = 0
    cgroup_parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """A recorded launch with the markers of its processes.

    Attributes:
        cookie, watermark: secret markers of the launch's processes.
        cgroup: the launch's own cgroup; None: the launch site has no cgroups.
        pid, start_ticks: identify the shim; None before GATED.
        unended: whether the state is KILL_PENDING.
    """

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
        """The parameters of `_IDENTITY`. The key alone could be reused after lost commits."""
        return self.key, self.cookie


_IDENTITY: Final = "id = ? AND cookie = ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceUse:
    """The processor time (µs) and peak memory (KiB) of the agent's own process."""

    user_us: int
    system_us: int
    max_rss_kib: int

    @property
    def cpu_s(self) -> float:
        """Processor time in seconds."""
        return (self.user_us + self.system_us) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnd:
    """The end of a launch.

    Attributes:
        exit_code, resources: of the agent's own process; None if no service observed its exit.
        gone: whether no process of the launch is alive.
        orphans: the processes that a recovery found, and its action on each.
    """

    exit_code: int | None
    processes_ended: int
    gone: bool
    resources: ResourceUse | None = None
    orphans: tuple[Orphan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnendedLaunch:
    """A launch whose turn is over and of which a process is still alive."""

    run_id: str
    attempt: int
    launched_at: datetime


_SELECT: Final = (
    "SELECT l.id, l.run, r.run_id, l.attempt, l.turn, l.host_id, l.boot_id, l.pid_namespace,"
    " l.cookie, l.watermark, l.cgroup, l.pid, l.start_ticks, l.state"
    " FROM process_lease l LEFT JOIN run r ON r.id = l.run"
)


def record_launch(
    db: Database, run: Run, *, owner: Owner, site: LaunchSite, now: datetime
) -> LaunchRecord:
    """Record a launch before its process is spawned, in the caller's transaction."""
    bits = site.watermark_bits
    # The highest bit is set, because no other user of the same resource limit chooses so large a
    # number.
    watermark = secrets.randbits(bits) | 1 << (bits - 1) if bits else None
    cgroup = f"{site.cgroup_parent}/{secrets.token_hex(8)}" if site.cgroup_parent else None
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
            site.host_id,
            site.boot_id,
            site.pid_namespace,
            secrets.token_hex(16),
            watermark,
            cgroup,
            to_us(now),
        ),
    )
    assert row is not None  # noqa: S101 - RETURNING gives the row that was inserted
    made = db.fetch_one(f"{_SELECT} WHERE l.id = ?", (row[0],))
    assert made is not None  # noqa: S101 - it was inserted in this transaction
    return _record_from_row(made)


def record_gated(
    db: Database, launch: LaunchRecord, *, owner: Owner, pid: int, start_ticks: int
) -> None:
    """Record the shim of a launch, which still holds the agent back.

    Raises:
        Fenced: a newer epoch has started, or has closed the launch record.
    """
    _advance(
        db, launch, "state = 'GATED', pid = ?, start_ticks = ?", (pid, start_ticks),
        # RUNNING is included for a repeated launch, after the system refused to start the agent.
        owner=owner, among=("INTENT", "GATED", "RUNNING"),
    )  # fmt: skip


def record_running(db: Database, launch: LaunchRecord, *, owner: Owner) -> None:
    """Record that the shim is about to start the agent.

    Raises:
        Fenced: a newer epoch has started, or has closed the launch record.
    """
    with db.transaction():
        gated = db.fetch_one(
            f"SELECT 1 FROM process_lease WHERE {_IDENTITY} AND state = 'GATED'", launch.identity
        )
        _advance(db, launch, "state = 'RUNNING'", (), owner=owner, among=("GATED", "RUNNING"))
        if gated is not None:
            interruptions.count_resume(db, launch.run_key)


def _advance(
    db: Database,
    launch: LaunchRecord,
    change: str,
    values: tuple[object, ...],
    *,
    owner: Owner,
    among: tuple[str, ...],
) -> None:
    """Change a launch record that is in one of the states `among`.

    `among` includes the new state, because a commit is repeated if its answer was lost.
    """
    marks = ", ".join("?" for _ in among)
    with db.transaction():
        instances.demand_current(db, owner)
        changed = db.execute(
            f"UPDATE process_lease SET {change}"
            f" WHERE {_IDENTITY} AND epoch = ? AND state IN ({marks})",
            (*values, *launch.identity, owner.epoch, *among),
        ).rowcount
        if changed != 1 and not is_recorded(db, launch):
            raise RunGone(f"the launch of run {launch.run_id!r}")
    if changed != 1:
        raise Fenced(f"launch {launch.key}")


def is_recorded(db: Database, launch: LaunchRecord) -> bool:
    """Return whether this launch is recorded."""
    return (
        db.fetch_one(f"SELECT 1 FROM process_lease WHERE {_IDENTITY}", launch.identity) is not None
    )


def is_over(db: Database, launch: LaunchRecord) -> bool:
    """Return whether the end of this launch is recorded."""
    row = db.fetch_one(f"SELECT state FROM process_lease WHERE {_IDENTITY}", launch.identity)
    return row is not None and row[0] in {"CLOSED", "KILL_PENDING"}


def close(
    db: Database,
    launch: LaunchRecord,
    ended: LaunchEnd,
    *,
    now: datetime,
    reconciliation_key: int | None = None,
) -> None:
    """Record the end of a launch: CLOSED, or KILL_PENDING while a process is alive."""
    used = ended.resources
    with db.transaction():
        db.execute(
            "UPDATE process_lease SET state = ?, exit_code = COALESCE(?, exit_code),"
            " user_us = COALESCE(?, user_us), system_us = COALESCE(?, system_us),"
            " max_rss_kib = COALESCE(?, max_rss_kib), orphans = COALESCE(?, orphans),"
            " ended_by = ?,"
            f" processes_ended = processes_ended + ?, closed_at = ? WHERE {_IDENTITY}",
            (
                "CLOSED" if ended.gone else "KILL_PENDING",
                ended.exit_code,
                None if used is None else used.user_us,
                None if used is None else used.system_us,
                None if used is None else used.max_rss_kib,
                _orphans_to_json(ended.orphans),
                reconciliation_key,
                ended.processes_ended,
                to_us(now) if ended.gone else None,
                *launch.identity,
            ),
        )


def swap_usage(db: Database, launch: LaunchRecord, usage: str | None) -> str | None:
    """Record the usage of the turn so far, and return the text that was recorded before.

    Runs in the caller's transaction.
    """
    before = db.fetch_one(f"SELECT usage FROM process_lease WHERE {_IDENTITY}", launch.identity)
    db.execute(f"UPDATE process_lease SET usage = ? WHERE {_IDENTITY}", (usage, *launch.identity))
    return None if before is None else before[0]


def _orphans_to_json(orphans: tuple[Orphan, ...]) -> str | None:
    """Return orphans as text for `orphans_from_json`; None if there are none."""
    if not orphans:
        return None
    kept = orphans[:ORPHANS_KEPT]
    return to_json([[o.pid, o.evidence, list(o.signals), o.ended, o.ended_by] for o in kept])


def orphans_from_json(text: str | None) -> tuple[Orphan, ...]:
    """Parse the recorded orphans of a launch; unreadable text gives none."""
    stored: Any = json_value(text)
    try:
        return tuple(
            Orphan(pid=pid, evidence=evidence, signals=tuple(signals), ended=ended, ended_by=by)
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
    """Record the ends of many launches in a few commits."""
    left = list(ended)
    while left:
        now_closed, left = left[:CLOSED_PER_COMMIT], left[CLOSED_PER_COMMIT:]
        with db.transaction():
            for launch, one in now_closed:
                close(db, launch, one, now=now, reconciliation_key=reconciliation_key)


def unclosed_launches(db: Database, owner: Owner, *, before: int) -> list[LaunchRecord]:
    """Return every launch of the instance's epochs below `before` that is not CLOSED."""
    rows = db.fetch_all(
        f"{_SELECT} WHERE l.instance = ? AND l.state <> 'CLOSED' AND l.epoch < ? ORDER BY l.id",
        (owner.instance, before),
    )
    return [_record_from_row(row) for row in rows]


def take_unended(db: Database, launches: Iterable[LaunchRecord], owner: Owner) -> None:
    """Make `owner` sweep for the living processes of KILL_PENDING launches."""
    with db.transaction():
        for launch in launches:
            db.execute(
                "UPDATE process_lease SET instance = ?, epoch = ?"
                f" WHERE {_IDENTITY} AND state = 'KILL_PENDING'",
                (owner.instance, owner.epoch, *launch.identity),
            )


def launches_to_sweep(
    db: Database, owner: Owner, *, now: datetime, closed_within_s: float
) -> list[LaunchRecord]:
    """Return the launches that a sweep searches for stragglers.

    They are KILL_PENDING, or were closed in the last `closed_within_s` seconds.
    """
    since = to_us(now - timedelta(seconds=closed_within_s))
    rows = db.fetch_all(
        f"{_SELECT} WHERE l.instance = ? AND l.state = 'KILL_PENDING'"
        f" UNION ALL {_SELECT} WHERE l.instance = ? AND l.closed_at >= ?",
        (owner.instance, owner.instance, since),
    )
    return [_record_from_row(row) for row in rows]


def record_late_end(
    db: Database, late: Iterable[tuple[LaunchRecord, LaunchEnd]], *, now: datetime
) -> None:
    """Record the processes that a sweep has killed after a launch had ended."""
    with db.transaction():
        for launch, ended in late:
            db.execute(
                "UPDATE process_lease SET processes_ended = processes_ended + ?,"
                f" state = ?, closed_at = ? WHERE {_IDENTITY}"
                " AND state IN ('KILL_PENDING', 'CLOSED')",
                (
                    ended.processes_ended,
                    "CLOSED" if ended.gone else "KILL_PENDING",
                    to_us(now) if ended.gone else None,
                    *launch.identity,
                ),
            )
            db.mark_changed(launch.run_key)  # the run may now be launched again


def unended_launches(db: Database, owner: Owner, *, limit: int) -> list[UnendedLaunch]:
    """Return the instance's KILL_PENDING launches."""
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


def _record_from_row(row: Row) -> LaunchRecord:
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
