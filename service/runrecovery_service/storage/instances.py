"""Instances and their epochs: who may write."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runrecovery_service.domain.errors import Fenced, Held
from runrecovery_service.storage.database import Database, Kind
from runrecovery_service.storage.rows import to_us

LEASE_TTL_S: Final = 15.0
"""How long, unless it is configured, an instance is believed alive after its last renewal."""


@dataclass(frozen=True, slots=True)
class Owner:
    """An instance and its boot counter: what every write names."""

    instance: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What identifies this start of the service."""

    instance: str
    boot_token: str
    host_id: str
    data_dir: str
    pid: int


def _lease_until(db: Database, ttl_s: float) -> str:
    return f"{db.dialect.now_us} + {int(ttl_s * 1e6)}"


def claim(db: Database, boot: Boot, *, now: datetime, ttl_s: float = LEASE_TTL_S) -> Owner:
    """Take the instance's next epoch, and a lease of `ttl_s`.

    A start from the same host and data directory needs no lease to have run out: it holds the
    directory's lock, so that its predecessor is dead.

    Raises:
        Held: an instance of this name is alive elsewhere.
    """
    until = _lease_until(db, ttl_s)
    lock = " FOR UPDATE" if db.dialect.kind is Kind.POSTGRESQL else ""
    with db.transaction():
        row = db.fetch_one(
            "SELECT epoch, host_id, data_dir, pid,"
            f" CASE WHEN lease_until > {db.dialect.now_us} THEN 1 ELSE 0 END"
            f" FROM instance WHERE name = ?{lock}",
            (boot.instance,),
        )
        epoch = 1 if row is None else row[0] + 1
        if row is not None and row[4] and (row[1], row[2]) != (boot.host_id, boot.data_dir):
            raise Held(f"instance {boot.instance!r}", f"pid {row[3]} on host {row[1]} ({row[2]})")
        values = (
            epoch,
            boot.boot_token,
            boot.host_id,
            boot.data_dir,
            boot.pid,
            to_us(now),
            boot.instance,
        )
        if row is None:
            added = db.execute(
                "INSERT INTO instance (epoch, boot_token, host_id, data_dir, pid, started_at,"
                f" name, lease_until) VALUES (?, ?, ?, ?, ?, ?, ?, {until})"
                " ON CONFLICT (name) DO NOTHING",
                values,
            ).rowcount
            if added != 1:
                raise Held(f"instance {boot.instance!r}", "another first start, at this moment")
        else:
            db.execute(
                "UPDATE instance SET epoch = ?, boot_token = ?, host_id = ?, data_dir = ?,"
                f" pid = ?, started_at = ?, lease_until = {until} WHERE name = ?",
                values,
            )
    return Owner(boot.instance, epoch)


def renew(db: Database, owner: Owner, *, ttl_s: float = LEASE_TTL_S) -> None:
    """Prolong the lease to `ttl_s` from now.

    Raises:
        Fenced: a newer epoch of this instance has started.
        DatabaseRefused: the SQLite file is not in its place any more.
    """
    db.demand_in_place()
    with db.transaction():
        changed = db.execute(
            f"UPDATE instance SET lease_until = {_lease_until(db, ttl_s)}"
            " WHERE name = ? AND epoch = ?",
            (owner.instance, owner.epoch),
        ).rowcount
    if changed != 1:
        raise Fenced(f"instance {owner.instance!r}")


def demand_current(db: Database, owner: Owner) -> None:
    """Hold the instance's row against a newer epoch until the caller's transaction ends.

    Raises:
        Fenced: a newer epoch of this instance has started.
    """
    share = " FOR SHARE" if db.dialect.kind is Kind.POSTGRESQL else ""
    current = db.fetch_one(
        f"SELECT 1 FROM instance WHERE name = ? AND epoch = ?{share}",
        (owner.instance, owner.epoch),
    )
    if current is None:
        raise Fenced(f"instance {owner.instance!r}")


def resign(db: Database, owner: Owner) -> None:
    """Give the lease up at the end of a planned stop."""
    with db.transaction():
        db.execute(
            "UPDATE instance SET lease_until = 0 WHERE name = ? AND epoch = ?",
            (owner.instance, owner.epoch),
        )
