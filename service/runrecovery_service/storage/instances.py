"""Instances, their epochs and their leases: which service may write."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from runrecovery_service.domain.errors import ClaimLost, CommitsLost, Fenced
from runrecovery_service.domain.lease import LEASE_TTL_S
from runrecovery_service.domain.start_errors import Held
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.commit_history import LogPosition, position_of
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.rows import from_us, to_json, to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind


@dataclass(frozen=True, slots=True)
class Owner:
    """An instance and its epoch. Every write checks both.

    Attributes:
        boot_token: identifies the start that claimed the epoch. The epoch alone does not: after a
            failover that lost the claim, another start can claim it again.
    """

    instance: str
    epoch: int
    boot_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStart:
    """The identity of one start of the service.

    Attributes:
        lock_id: identifies the file that this start has locked, across hosts; None: no file.
        engines: the names of the configured engines.
        max_running: the number of slots.
        version: the version of the service.
    """

    instance: str
    boot_token: str
    host_id: str
    data_dir: str
    pid: int
    lock_id: str | None = None
    engines: Collection[str] = ()
    max_running: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """The latest write of one start of an instance to the instance's row.

    Attributes:
        started_us: identifies the start. A takeover raises the epoch and keeps this time.
        lease_until_us: the end of the lease; 0 after a planned stop.
        stopped_us: the time of the planned stop; 0: none.
    """

    instance: str
    epoch: int
    started_us: int
    lease_until_us: int = 0
    stopped_us: int = 0

    def is_kept_by(self, found: Renewal | None) -> bool:
        """Return whether the database still has this renewal.

        Args:
            found: the renewal in the row now; None: there is no row.
        """
        if found is None:
            return False
        if found.started_us != self.started_us:  # a later start has a higher epoch
            return found.epoch > self.epoch
        if self.lease_until_us:
            return not found.lease_until_us or found.lease_until_us >= self.lease_until_us
        return not found.lease_until_us and found.stopped_us >= self.stopped_us

    def at_us(self, ttl_s: float) -> int:
        """Return the time of the renewal, or of the planned stop."""
        return self.lease_until_us - round(ttl_s * 1e6) if self.lease_until_us else self.stopped_us


def latest_renewal(db: Database, instance: str) -> Renewal | None:
    """Return the latest renewal or planned stop in an instance's row; None if there is no row."""
    row = db.fetch_one(
        "SELECT epoch, started_at, lease_until, stopped_at FROM instance WHERE name = ?",
        (instance,),
    )
    if row is None:
        return None
    epoch, started_us, lease_until_us, stopped_us = row
    return Renewal(
        instance=instance,
        epoch=epoch,
        started_us=started_us,
        lease_until_us=lease_until_us,
        stopped_us=stopped_us or 0,
    )


def _lease_until(db: Database, ttl_s: float) -> str:
    return f"{db.dialect.now_us} + {int(ttl_s * 1e6)}"


def claim(db: Database, boot: InstanceStart, *, now: datetime, ttl_s: float = LEASE_TTL_S) -> Owner:
    """Claim the instance's next epoch, with a lease of `ttl_s` seconds.

    On SQLite, the epoch is above the epochs of all instances, because the service adopts their
    runs. A lease that has not ended is ignored, because the lock on the file proves that its holder
    is dead. Such a lease can end in years, if the clock was once ahead.

    On PostgreSQL, a lease that has not ended is ignored only if its holder had locked the same file
    as this start, which proves that the holder is dead. Equal host names prove nothing, because
    hosts that were made from one image share their machine-id.

    Raises:
        Held: on PostgreSQL, an instance of this name has a lease that has not ended.
    """
    until = _lease_until(db, ttl_s)
    with db.transaction():
        # Checked first: a refused start must not wait for the writers of a living instance.
        _demand_free(db, _registered(db, boot), boot)
        # Inserted first, so that concurrent starts of a new instance wait here for each other.
        db.execute(
            "INSERT INTO instance_epoch (name, epoch) VALUES (?, 0) ON CONFLICT (name) DO NOTHING",
            (boot.instance,),
        )
        lock = " FOR UPDATE" if db.dialect.kind is DatabaseKind.POSTGRESQL else ""
        db.fetch_one(f"SELECT 1 FROM instance_epoch WHERE name = ?{lock}", (boot.instance,))
        row = _registered(db, boot, lock)
        _demand_free(db, row, boot)
        epoch = _next_epoch(db, row)
        columns = _columns(boot, epoch, now)
        if row is None:
            marks = ", ".join("?" for _ in columns)
            db.execute(
                f"INSERT INTO instance ({', '.join(columns)}, name, lease_until)"
                f" VALUES ({marks}, ?, {until})",
                (*columns.values(), boot.instance),
            )
        else:
            changes = ", ".join(f"{name} = ?" for name in columns)
            db.execute(
                f"UPDATE instance SET {changes}, lease_until = {until} WHERE name = ?",
                (*columns.values(), boot.instance),
            )
        db.execute(
            "UPDATE instance_epoch SET epoch = ?, boot_token = ? WHERE name = ?",
            (epoch, boot.boot_token, boot.instance),
        )
    return Owner(boot.instance, epoch, boot.boot_token)


def _columns(boot: InstanceStart, epoch: int, now: datetime) -> dict[str, object]:
    return {
        "epoch": epoch,
        "boot_token": boot.boot_token,
        "host_id": boot.host_id,
        "data_dir": boot.data_dir,
        "pid": boot.pid,
        "lock_id": boot.lock_id,
        "started_at": to_us(now),
        "engines": to_json([*sorted(boot.engines)]),
        "max_running": boot.max_running,
        "version": boot.version,
        # These columns still describe the previous epoch.
        "stopped_at": None,
        "taken_over_by": None,
        "taken_over_at": None,
        "takeover_done_at": None,
        "host_return_until": None,
    }


def _registered(db: Database, boot: InstanceStart, lock: str = "") -> Row | None:
    """Return the instance's epoch, host, directory, pid, lock, and whether its lease is current."""
    return db.fetch_one(
        "SELECT epoch, host_id, data_dir, pid, lock_id,"
        f" CASE WHEN lease_until > {db.dialect.now_us} THEN 1 ELSE 0 END"
        f" FROM instance WHERE name = ?{lock}",
        (boot.instance,),
    )


def _demand_free(db: Database, row: Row | None, boot: InstanceStart) -> None:
    if row is None or db.dialect.kind is DatabaseKind.SQLITE:
        return
    _, host_id, data_dir, pid, lock_id, lease_runs = row
    if lease_runs and (lock_id is None or lock_id != boot.lock_id):
        raise Held(f"instance {boot.instance!r}", f"pid {pid} on host {host_id} ({data_dir})")


def _next_epoch(db: Database, own: Row | None) -> int:
    if db.dialect.kind is DatabaseKind.SQLITE:
        highest = db.fetch_one("SELECT COALESCE(max(epoch), 0) FROM instance")
        return 1 if highest is None else highest[0] + 1
    return 1 if own is None else own[0] + 1


def renew(
    db: Database,
    owner: Owner,
    *,
    ttl_s: float = LEASE_TTL_S,
    engines: Collection[str] = (),
    acknowledged_us: int = 0,
) -> int:
    """Renew the lease until `ttl_s` from now, and return its end in microseconds.

    Args:
        engines: the names of the engines configured now, which a reload may have changed.
        acknowledged_us: the result of the last acknowledged renewal, which the store must still
            have. 0: do not check.

    Raises:
        Fenced: another start has claimed the instance.
        ClaimLost: the store has lost this epoch.
        CommitsLost: the store has lost the last acknowledged renewal.
    """
    own = (owner.instance, owner.epoch, owner.boot_token)
    with db.transaction():
        renewed = db.fetch_all(
            f"UPDATE instance SET lease_until = {_lease_until(db, ttl_s)}, engines = ?"
            " WHERE name = ? AND epoch = ? AND boot_token = ? AND lease_until >= ?"
            " RETURNING lease_until",
            (to_json([*sorted(engines)]), *own, acknowledged_us),
        )
        if renewed:
            return int(renewed[0][0])
        found = db.fetch_one(
            "SELECT lease_until FROM instance WHERE name = ? AND epoch = ? AND boot_token = ?", own
        )
        if found is None:
            raise _fence(db, owner)
        since, until = (from_us(us - int(ttl_s * 1e6)) for us in (found[0], acknowledged_us))
        raise CommitsLost(since=since, until=until)


def demand_current(db: Database, owner: Owner) -> LogPosition | None:
    """Check the owner, and let no other start claim the instance before the transaction ends.

    The lease is in another row, so it can be renewed meanwhile.

    Returns:
        The end of the write-ahead log; None if the database does not report positions.

    Raises:
        Fenced: another start has claimed the instance.
        ClaimLost: the store has lost this epoch.
    """
    share = " FOR SHARE" if db.dialect.kind is DatabaseKind.POSTGRESQL else ""
    current = db.fetch_one(
        f"SELECT {db.dialect.log_position} FROM instance_epoch"
        f" WHERE name = ? AND epoch = ? AND boot_token = ?{share}",
        (owner.instance, owner.epoch, owner.boot_token),
    )
    if current is None:
        raise _fence(db, owner)
    db.note_current(owner)
    return position_of(current)


def demand_checked(db: Database, owner: Owner) -> None:
    """Check the owner as `demand_current` does, unless this transaction has already checked it.

    The check at the beginning of a transaction (`Database.guard`) is usually of the same owner.
    """
    if not db.is_known_current(owner):
        demand_current(db, owner)


def _fence(db: Database, owner: Owner) -> Fenced:
    """Return the error for an owner that is no longer current."""
    row = db.fetch_one(
        "SELECT epoch, boot_token FROM instance_epoch WHERE name = ?", (owner.instance,)
    )
    is_superseded = row is not None and (
        row[0] > owner.epoch or (row[0] == owner.epoch and row[1] != owner.boot_token)
    )
    return (Fenced if is_superseded else ClaimLost)(f"instance {owner.instance!r}")


def announce_stop(db: Database, owner: Owner) -> None:
    """Record that a planned stop is under way, so that peers hand over no runs to this instance."""
    with db.transaction():
        db.execute(
            f"UPDATE instance SET stopped_at = {db.dialect.now_us}"
            " WHERE name = ? AND epoch = ? AND boot_token = ?",
            (owner.instance, owner.epoch, owner.boot_token),
        )


def resign(db: Database, owner: Owner) -> int | None:
    """Release the lease at the end of a planned stop, and record the stop.

    Returns:
        The time of the stop in microseconds; None: another start has claimed the instance.
    """
    with db.transaction():
        row = db.fetch_one(
            f"UPDATE instance SET lease_until = 0, stopped_at = {db.dialect.now_us}"
            " WHERE name = ? AND epoch = ? AND boot_token = ? RETURNING stopped_at",
            (owner.instance, owner.epoch, owner.boot_token),
        )
    return None if row is None else int(row[0])
