"""An idle instance takes queued runs of a busy or stopped instance. PostgreSQL only."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Final

from runrecovery_service.domain.steady_time import SteadyTime
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import passed_deadlines
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.movable_runs import (
    FROM_BEGINNING,
    QUEUED,
    marks,
    move_deliveries,
)
from runrecovery_service.storage.rows import to_us

OWNER_FIRST_S: Final = 1.0
"""How long a run must be in its owner's queue before peers may take it.

The time is measured by the clocks of two hosts. However much these differ, a peer waits at most
twice this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taker:
    """An instance with a free slot, which may take a run of a peer.

    Attributes:
        engines: the engines for which the instance has a free slot.
        shares_workspaces: whether the instance can resume sessions of other instances.
    """

    owner: Owner
    engines: Collection[str]
    shares_workspaces: bool


def find_peer(db: Database, taker: Taker, *, now: datetime) -> str | None:
    """Return the peer with the run that has been queued longest; None if no run can be taken."""
    which, params = _takeable(taker, now)
    row = db.fetch_one(
        "SELECT i.name FROM instance i CROSS JOIN LATERAL (SELECT r.id, r.queued_at FROM run r"
        f" WHERE r.owner = i.name AND {which} ORDER BY r.queued_at, r.id LIMIT 1) AS oldest"
        f" WHERE i.name <> ? AND {_is_giver(db)} ORDER BY oldest.queued_at, oldest.id LIMIT 1",
        (*params, taker.owner.instance),
    )
    return None if row is None else str(row[0])


def take_from(
    db: Database, taker: Taker, peer: str, *, now: datetime, steady: SteadyTime
) -> str | None:
    """Move the run that a peer has queued longest to the taker's queue; return its run_id.

    Return None if there is no such run any more: the peer has started it or is dead, or another
    instance has taken the run.
    """
    which, params = _takeable(taker, now)
    with db.transaction():
        moved = db.fetch_one(
            "UPDATE run SET owner = ?, owner_epoch = ?, version = version + 1, updated_at = ?"
            " WHERE id = ("
            "SELECT r.id FROM run r JOIN instance i ON i.name = r.owner"
            f" WHERE r.owner = ? AND {which} AND {_is_giver(db)}"
            " ORDER BY r.queued_at, r.id LIMIT 1 FOR UPDATE OF r SKIP LOCKED)"
            " RETURNING id, run_id",
            (taker.owner.instance, taker.owner.epoch, to_us(now), peer, *params),
        )
        if moved is None:
            return None
        key, run_id = moved
        passed_deadlines.move_range(db, taker.owner, first=key, last=key, now=now, steady=steady)
        move_deliveries(db, taker.owner.instance, [key])
        db.mark_changed(key)
    return str(run_id)


def _is_giver(db: Database) -> str:
    """Return an SQL condition for instances `i` whose queued runs may be taken.

    They are alive, or have made a planned stop. The runs of dead instances are left to takeovers.
    """
    return (
        "i.taken_over_by IS NULL"
        f" AND (i.stopped_at IS NOT NULL OR i.lease_until > {db.dialect.now_us})"
    )


def _takeable(taker: Taker, now: datetime) -> tuple[str, tuple[object, ...]]:
    """Return an SQL condition for the runs `r` that may be taken from `i`, and its parameters.

    Runs of an earlier epoch are left to their owner's recovery. Runs that pause before a resume are
    left to their owner's deadlines.
    """
    condition = (
        f"{QUEUED} AND r.owner_epoch = i.epoch AND r.resume_due_us IS NULL"
        f" AND r.engine IN ({marks(taker.engines)})"
        " AND (i.stopped_at IS NOT NULL OR r.updated_at <= ? OR r.updated_at > ?)"
        + ("" if taker.shares_workspaces else f" AND {FROM_BEGINNING}")
    )
    owner_first = timedelta(seconds=OWNER_FIRST_S)
    # A time in the future comes from a host whose clock is ahead, and must not delay the run.
    return condition, (*sorted(taker.engines), to_us(now - owner_first), to_us(now + owner_first))
