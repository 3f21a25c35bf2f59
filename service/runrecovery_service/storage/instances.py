"""Instances and their epochs: who may write."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runrecovery_service.domain.errors import ClaimLost, Fenced
from runrecovery_service.domain.start_errors import Held
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind

LEASE_TTL_S: Final = 15.0
"""How long, unless it is configured, an instance is believed alive after its last renewal."""


@dataclass(frozen=True, slots=True)
class Owner:
    """An instance and its boot counter: what every write names.

    Attributes:
        boot_token: of the start that claimed the epoch. After a failover that lost the claim,
            another start claims the same epoch.
    """

    instance: str
    epoch: int
    boot_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStart:
    """What identifies this start of the service.

    Attributes:
        lock_id: names, on all hosts, the locked file that this start holds; None: there is none.
    """

    instance: str
    boot_token: str
    host_id: str
    data_dir: str
    pid: int
    lock_id: str | None = None


def _lease_until(db: Database, ttl_s: float) -> str:
    return f"{db.dialect.now_us} + {int(ttl_s * 1e6)}"


def claim(db: Database, boot: InstanceStart, *, now: datetime, ttl_s: float = LEASE_TTL_S) -> Owner:
    """Take the instance's next epoch, and a lease of `ttl_s`.

    In a SQLite store the epoch is above those of all names: the service adopts their runs. No
    lease stands against it: the service holds the file's lock, so that its predecessor is dead.
    A clock that was ahead once may have left a lease that ends in years.

    On PostgreSQL a lease that still runs is passed over only where a lock proves that the holder is
    dead: it held the very file that this start holds. Names prove nothing: hosts made from one
    image share their machine-id.

    Raises:
        Held: an instance of this name is alive elsewhere, by its lease on PostgreSQL.
    """
    until = _lease_until(db, ttl_s)
    with db.transaction():
        # Before the wait for the writers of one that lives.
        _demand_free(db, _living(db, boot), boot)
        # Inserted first, so that starts of a new instance queue here as well.
        db.execute(
            "INSERT INTO instance_epoch (name, epoch) VALUES (?, 0) ON CONFLICT (name) DO NOTHING",
            (boot.instance,),
        )
        lock = " FOR UPDATE" if db.dialect.kind is DatabaseKind.POSTGRESQL else ""
        db.fetch_one(f"SELECT 1 FROM instance_epoch WHERE name = ?{lock}", (boot.instance,))
        row = _living(db, boot, lock)
        _demand_free(db, row, boot)
        epoch = _next_epoch(db, row)
        values = (
            epoch,
            boot.boot_token,
            boot.host_id,
            boot.data_dir,
            boot.pid,
            boot.lock_id,
            to_us(now),
            boot.instance,
        )
        if row is None:
            db.execute(
                "INSERT INTO instance (epoch, boot_token, host_id, data_dir, pid, lock_id,"
                f" started_at, name, lease_until) VALUES (?, ?, ?, ?, ?, ?, ?, ?, {until})",
                values,
            )
        else:
            db.execute(
                "UPDATE instance SET epoch = ?, boot_token = ?, host_id = ?, data_dir = ?,"
                f" pid = ?, lock_id = ?, started_at = ?, lease_until = {until} WHERE name = ?",
                values,
            )
        db.execute(
            "UPDATE instance_epoch SET epoch = ?, boot_token = ? WHERE name = ?",
            (epoch, boot.boot_token, boot.instance),
        )
    return Owner(boot.instance, epoch, boot.boot_token)


def _living(db: Database, boot: InstanceStart, lock: str = "") -> Row | None:
    """Return the epoch, place, pid and lock of the instance, and whether its lease runs."""
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


def renew(db: Database, owner: Owner, *, ttl_s: float = LEASE_TTL_S) -> None:
    """Prolong the lease to `ttl_s` from now.

    Raises:
        Fenced: another start has claimed the instance since.
        ClaimLost: the store does not have this epoch any more.
    """
    with db.transaction():
        changed = db.execute(
            f"UPDATE instance SET lease_until = {_lease_until(db, ttl_s)}"
            " WHERE name = ? AND epoch = ? AND boot_token = ?",
            (owner.instance, owner.epoch, owner.boot_token),
        ).rowcount
        if changed != 1:
            raise _fence(db, owner)


def demand_current(db: Database, owner: Owner) -> None:
    """Hold the instance's epoch against another start until the caller's transaction ends.

    The lease is in another row, which can be renewed meanwhile.

    Raises:
        Fenced: another start has claimed the instance since.
        ClaimLost: the store does not have this epoch any more.
    """
    share = " FOR SHARE" if db.dialect.kind is DatabaseKind.POSTGRESQL else ""
    current = db.fetch_one(
        f"SELECT 1 FROM instance_epoch WHERE name = ? AND epoch = ? AND boot_token = ?{share}",
        (owner.instance, owner.epoch, owner.boot_token),
    )
    if current is None:
        raise _fence(db, owner)


def _fence(db: Database, owner: Owner) -> Fenced:
    """Return why an owner is not the current one."""
    row = db.fetch_one(
        "SELECT epoch, boot_token FROM instance_epoch WHERE name = ?", (owner.instance,)
    )
    is_superseded = row is not None and (
        row[0] > owner.epoch or (row[0] == owner.epoch and row[1] != owner.boot_token)
    )
    return (Fenced if is_superseded else ClaimLost)(f"instance {owner.instance!r}")


def resign(db: Database, owner: Owner) -> None:
    """Give the lease up at the end of a planned stop."""
    with db.transaction():
        db.execute(
            "UPDATE instance SET lease_until = 0 WHERE name = ? AND epoch = ? AND boot_token = ?",
            (owner.instance, owner.epoch, owner.boot_token),
        )
