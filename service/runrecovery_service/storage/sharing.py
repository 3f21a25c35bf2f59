"""Moves runs between the instances on one PostgreSQL database.

An idle instance takes queued runs of a busy one. An instance that stops hands over what its peers
can go on with. Each move compares the owner and the epoch in the row, so a run that its owner
starts at the same moment stays there.

A run that goes on with a session needs the files of its host. Unless instances share their
workspaces, only runs move whose next turn starts from the beginning, in an empty workspace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from runrecovery_service.domain.deadline import SteadyTime
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
from runrecovery_service.storage.tables import sql_words

OWNER_FIRST_S: Final = 1.0
"""For so long only its owner starts a run that was queued, or moved to it."""
ROWS_AT_ONCE: Final = 500

_FROM_BEGINNING: Final = (
    "(r.interrupted_at IS NULL OR COALESCE(r.session_value, '') = '')"
    " AND NOT EXISTS (SELECT 1 FROM interaction q WHERE q.run = r.id"
    f" AND q.no = r.interaction_count AND q.state = '{InteractionState.ANSWERED}')"
)
_QUEUED: Final = (
    f"r.status = '{RunStatus.QUEUED}' AND r.recovery_state <> 'QUARANTINED'"
    # A newer version may have written other words. Its own instances start such a run.
    f" AND r.restart_policy IN ({sql_words(frozenset(RestartPolicy))})"
    # A process of the run may still live on the host of its owner.
    " AND NOT EXISTS (SELECT 1 FROM process_lease l WHERE l.run = r.id AND l.state <> 'CLOSED')"
)
_WAITING: Final = (
    f"r.status = '{RunStatus.WAITING_USER}' AND r.profile = '{Profile.RESUMABLE}'"
    " AND r.recovery_state <> 'QUARANTINED'"
)


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" for _ in values)


# -- an idle instance takes ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Taker:
    """An instance with a free slot.

    Attributes:
        engines: the engines that have a free slot here.
        shares_workspaces: sessions of other instances can be resumed here.
    """

    owner: Owner
    engines: Collection[str]
    shares_workspaces: bool


def find_peer(db: Database, taker: Taker, *, now: datetime) -> str | None:
    """Return the peer whose run has been queued longest; None if there is no run to take."""
    which, params = _takeable(taker, now)
    row = db.fetch_one(
        "SELECT i.name FROM instance i CROSS JOIN LATERAL (SELECT r.id, r.queued_at FROM run r"
        f" WHERE r.owner = i.name AND {which} ORDER BY r.queued_at, r.id LIMIT 1) AS oldest"
        f" WHERE i.name <> ? AND {_gives(db)} ORDER BY oldest.queued_at, oldest.id LIMIT 1",
        (*params, taker.owner.instance),
    )
    return None if row is None else str(row[0])


def take_from(
    db: Database, taker: Taker, peer: str, *, now: datetime, steady: SteadyTime
) -> str | None:
    """Move the longest queued run of a peer to the taker's queue, and return its run_id.

    None: the peer has started it, another instance has taken it, or the peer is dead.
    """
    which, params = _takeable(taker, now)
    with db.transaction():
        moved = db.fetch_one(
            "UPDATE run SET owner = ?, owner_epoch = ?, version = version + 1, updated_at = ?"
            " WHERE id = ("
            "SELECT r.id FROM run r JOIN instance i ON i.name = r.owner"
            f" WHERE r.owner = ? AND {which} AND {_gives(db)}"
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


def _gives(db: Database) -> str:
    """Return the condition for instances `i` that give runs: alive, or stopped in order.

    A takeover decides on the runs of a dead one.
    """
    return (
        "i.taken_over_by IS NULL"
        f" AND (i.stopped_at IS NOT NULL OR i.lease_until > {db.dialect.now_us})"
    )


def _takeable(taker: Taker, now: datetime) -> tuple[str, tuple[object, ...]]:
    """Return the condition for runs `r` of an instance `i` that may be taken, and its parameters.

    A run of an earlier epoch is left to the recovery of its owner, and one that pauses before it
    is resumed to the owner's deadlines.
    """
    condition = (
        f"{_QUEUED} AND r.owner_epoch = i.epoch AND r.resume_due_us IS NULL"
        f" AND r.engine IN ({_marks(taker.engines)})"
        " AND (i.stopped_at IS NOT NULL OR r.updated_at <= ?)"
        + ("" if taker.shares_workspaces else f" AND {_FROM_BEGINNING}")
    )
    before = to_us(now - timedelta(seconds=OWNER_FIRST_S))
    return condition, (*sorted(taker.engines), before)


def _move_deliveries(db: Database, instance: str, run_keys: Collection[int]) -> None:
    """Let the new owner deliver the earlier events of the runs too, so that their order stays."""
    db.execute(
        f"UPDATE webhook_delivery SET instance = ? WHERE run IN ({_marks(run_keys)})",
        (instance, *run_keys),
    )


# -- an instance that stops hands over -------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Peer:
    """A living peer.

    Attributes:
        slots: how many processes it runs at one time.
        load: its runs that are queued or running, with those that were handed over to it.
    """

    name: str
    epoch: int
    engines: frozenset[str]
    slots: int
    load: int

    @property
    def load_per_slot(self) -> float:
        """How busy the peer is, compared with others."""
        return self.load / max(self.slots, 1)


@dataclass(slots=True, kw_only=True)
class Spread:
    """Which peer gets which runs.

    Attributes:
        keys: the keys of the runs for each peer, by its name.
        after: the key of the last run, from which the next page begins.
    """

    keys: dict[str, list[int]] = field(default_factory=dict)
    after: int = 0


def spread(runs: Iterable[tuple[int, str]], peers: Collection[Peer]) -> Spread:
    """Give each run, a key and an engine, to the least busy peer that has the engine.

    The loads of the peers rise accordingly. A run whose engine no peer has stays.
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
    """Return the peers whose lease runs and that do not stop."""
    rows = db.fetch_all(
        "SELECT i.name, i.epoch, i.engines, i.max_running, (SELECT count(*) FROM run r"
        f" WHERE r.owner = i.name AND r.status IN ('{RunStatus.QUEUED}', '{RunStatus.RUNNING}'))"
        f" FROM instance i WHERE i.name <> ? AND i.lease_until > {db.dialect.now_us}"
        " AND i.stopped_at IS NULL AND i.taken_over_by IS NULL ORDER BY i.name",
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
    """Hand the runs without a process over to living peers, and return how many each peer got.

    The owner must not take runs from its queue any more.

    Args:
        shares_workspaces: also runs that wait for a reply, or go on with their session.
        rows: the most runs of one transaction.
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
    """Hand over the next runs; None after the last page.

    Raises:
        Stale: a peer has ended meanwhile, and is no longer among `peers`.
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
    # The peer's epoch cannot change before the commit: its next start will find the runs.
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
