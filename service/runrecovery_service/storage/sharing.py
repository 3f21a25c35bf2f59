"""Moves runs between the instances on one PostgreSQL database.

An idle instance takes queued runs of a busy instance. An instance that stops hands runs over to its
peers. Each move checks owner and epoch in the row, so that a run does not move if its owner starts
it at the same moment.

To resume a session, a run needs files on its host. If instances do not share workspaces, a run
moves only if its next turn starts from the beginning in an empty workspace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from runrecovery_service.domain.deadline import SteadyTime
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import (
    InteractionState,
    Profile,
    RestartPolicy,
    RunStatus,
)
from runrecovery_service.storage import deadlines, use_case
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import json_value, to_us
from runrecovery_service.storage.tables import live, sql_words

OWNER_FIRST_S: Final = 1.0
"""How long a run must be in its owner's queue before peers may take it.

The time is measured by the clocks of two hosts. However much these differ, a peer waits at most
twice this time."""
ROWS_AT_ONCE: Final = 500

_FROM_BEGINNING: Final = (
    "(r.interrupted_at IS NULL OR COALESCE(r.session_value, '') = '')"
    " AND NOT EXISTS (SELECT 1 FROM interaction q WHERE q.run = r.id"
    f" AND q.no = r.interaction_count AND q.state = '{InteractionState.ANSWERED}')"
)
_QUEUED: Final = (
    f"r.status = '{RunStatus.QUEUED}' AND r.recovery_state <> 'QUARANTINED'"
    # A newer version may have stored a policy that this version does not know. Instances of the
    # newer version start the run.
    f" AND r.restart_policy IN ({sql_words(frozenset(RestartPolicy))})"
    # While a launch is not CLOSED, a process of the run may be alive on its owner's host.
    " AND NOT EXISTS (SELECT 1 FROM process_lease l WHERE l.run = r.id AND l.state <> 'CLOSED')"
)
_WAITING: Final = (
    f"r.status = '{RunStatus.WAITING_USER}' AND r.profile = '{Profile.RESUMABLE}'"
    " AND r.recovery_state <> 'QUARANTINED'"
)


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" for _ in values)


# -- an idle instance takes runs ---------------------------------------------------------------


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
        deadlines.move_range(db, taker.owner, first=key, last=key, now=now, steady=steady)
        _move_deliveries(db, taker.owner.instance, [key])
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
        f"{_QUEUED} AND r.owner_epoch = i.epoch AND r.resume_due_us IS NULL"
        f" AND r.engine IN ({_marks(taker.engines)})"
        " AND (i.stopped_at IS NOT NULL OR r.updated_at <= ? OR r.updated_at > ?)"
        + ("" if taker.shares_workspaces else f" AND {_FROM_BEGINNING}")
    )
    owner_first = timedelta(seconds=OWNER_FIRST_S)
    # A time in the future comes from a host whose clock is ahead, and must not delay the run.
    return condition, (*sorted(taker.engines), to_us(now - owner_first), to_us(now + owner_first))


def _move_deliveries(db: Database, instance: str, run_keys: Collection[int]) -> None:
    """Move the runs' waiting webhook deliveries to the new owner, so that their order is kept."""
    db.execute(
        f"UPDATE webhook_delivery SET instance = ? WHERE run IN ({_marks(run_keys)})",
        (instance, *run_keys),
    )


# -- a stopping instance hands runs over -------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Peer:
    """A living peer, to which runs can be handed over.

    Attributes:
        slots: the number of processes that it can run at one time.
        load: the number of its queued and running runs, including runs handed over so far.
    """

    name: str
    epoch: int
    engines: frozenset[str]
    slots: int
    load: int

    @property
    def load_per_slot(self) -> float:
        """The load per slot, by which peers are compared."""
        return self.load / max(self.slots, 1)


@dataclass(slots=True, kw_only=True)
class Spread:
    """The assignment of one page of runs to peers.

    Attributes:
        keys: the keys of the runs for each peer, by the name of the peer.
        after: the key of the page's last run, after which the next page begins.
    """

    keys: dict[str, list[int]] = field(default_factory=dict)
    after: int = 0


def spread(runs: Iterable[tuple[int, str]], peers: Collection[Peer]) -> Spread:
    """Assign each run to the least busy peer that has its engine, and raise the peer's load.

    A run is not assigned if no peer has its engine.

    Args:
        runs: the key and the engine of each run.
    """
    result = Spread()
    for key, engine in runs:
        result.after = key
        able = [peer for peer in peers if engine in peer.engines]
        if able:
            peer = min(able, key=lambda one: (one.load_per_slot, one.name))
            peer.load += 1
            result.keys.setdefault(peer.name, []).append(key)
    return result


def living_peers(db: Database, owner: Owner) -> list[Peer]:
    """Return the peers that have a current lease, are not stopping, and not in safe mode."""
    rows = db.fetch_all(
        "SELECT i.name, i.epoch, i.engines, i.max_running, (SELECT count(*) FROM run r"
        f" WHERE r.owner = i.name AND r.status IN ('{RunStatus.QUEUED}', '{RunStatus.RUNNING}')"
        f" AND {live('r.')})"  # uses the partial index, which has no ended runs
        f" FROM instance i WHERE i.name <> ? AND i.lease_until > {db.dialect.now_us}"
        " AND i.stopped_at IS NULL AND i.taken_over_by IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM reconciliation c WHERE c.instance = i.name"
        f" AND c.epoch = i.epoch AND c.cause = '{Cause.STARTUP}' AND c.safe_mode = 1)"
        " ORDER BY i.name",
        (owner.instance,),
    )
    return [
        Peer(name=name, epoch=epoch, engines=_names(engines), slots=slots, load=load)
        for name, epoch, engines, slots, load in rows
    ]


def _names(engines: str | None) -> frozenset[str]:
    names = json_value(engines)
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


def hand_over(
    db: Database,
    owner: Owner,
    *,
    shares_workspaces: bool,
    now: datetime,
    rows: int = ROWS_AT_ONCE,
) -> Mapping[str, int]:
    """Hand over runs without a process to living peers, and return the number by peer name.

    Before this, the owner must have stopped taking runs from its own queue.

    Args:
        shares_workspaces: also hand over runs that wait for a reply, or will resume a session.
        rows: the most runs that one transaction moves.
    """
    handed: Counter[str] = Counter()
    peers, after = living_peers(db, owner), 0
    while peers:
        page = _hand_over_page(
            db,
            owner,
            peers,
            after=after,
            shares_workspaces=shares_workspaces,
            now=now,
            rows=rows,
        )
        if page is None:
            break
        handed.update({name: len(keys) for name, keys in page.keys.items()})
        after = page.after
    return handed


@use_case.retried
def _hand_over_page(
    db: Database,
    owner: Owner,
    peers: list[Peer],
    *,
    after: int,
    shares_workspaces: bool,
    now: datetime,
    rows: int,
) -> Spread | None:
    """Hand over the next page of runs; return None if no run is left.

    Raises:
        Stale: a peer has ended meanwhile, and was removed from `peers`. Repeat the page.
    """
    which = f"{_QUEUED} AND {_FROM_BEGINNING}"
    if shares_workspaces:
        which = f"(({_QUEUED}) OR ({_WAITING}))"
    runs = db.fetch_all(
        "SELECT r.id, r.engine FROM run r"
        f" WHERE r.owner = ? AND r.owner_epoch = ? AND r.id > ? AND {which}"
        " ORDER BY r.id LIMIT ? FOR UPDATE",
        (owner.instance, owner.epoch, after, rows),
    )
    if not runs:
        return None
    page = spread(runs, peers)
    for peer in list(peers):
        keys = page.keys.get(peer.name, [])
        if keys and not _move(db, owner, peer, keys, now=now):
            peers.remove(peer)
            raise Stale
    return page


def _move(db: Database, owner: Owner, peer: Peer, keys: Collection[int], *, now: datetime) -> bool:
    """Make a peer the owner of these runs; return False if the peer has ended."""
    # FOR SHARE keeps the peer's epoch until the commit, so that the peer's next start finds the
    # runs.
    alive = db.fetch_one(
        "SELECT 1 FROM instance_epoch WHERE name = ? AND epoch = ? FOR SHARE",
        (peer.name, peer.epoch),
    )
    if alive is None:
        return False
    cleared = ", ".join(
        f"{column} = CASE WHEN {column} IS NOT NULL THEN 0 END" for column in deadlines.DUE_COLUMNS
    )
    db.execute(
        f"UPDATE run SET owner = ?, owner_epoch = ?, version = version + 1,"
        f" updated_at = ?, {cleared}, due_clock = NULL"
        f" WHERE id IN ({_marks(keys)}) AND owner = ? AND owner_epoch = ?",
        (peer.name, peer.epoch, to_us(now), *keys, owner.instance, owner.epoch),
    )
    _move_deliveries(db, peer.name, keys)
    for key in keys:
        db.mark_changed(key)
    return True
