"""An instance that stops hands runs over to its living peers. PostgreSQL only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field
from datetime import datetime
from typing import Final

from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import passed_deadlines, use_case
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.movable_runs import (
    FROM_BEGINNING,
    QUEUED,
    WAITING,
    marks,
    move_deliveries,
)
from runrecovery_service.storage.rows import json_value, to_us
from runrecovery_service.storage.tables import live

ROWS_AT_ONCE: Final = 500


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
    which = f"{QUEUED} AND {FROM_BEGINNING}"
    if shares_workspaces:
        which = f"(({QUEUED}) OR ({WAITING}))"
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
        f"{column} = CASE WHEN {column} IS NOT NULL THEN 0 END"
        for column in passed_deadlines.DUE_COLUMNS
    )
    db.execute(
        f"UPDATE run SET owner = ?, owner_epoch = ?, version = version + 1,"
        f" updated_at = ?, {cleared}, due_clock = NULL"
        f" WHERE id IN ({marks(keys)}) AND owner = ? AND owner_epoch = ?",
        (peer.name, peer.epoch, to_us(now), *keys, owner.instance, owner.epoch),
    )
    move_deliveries(db, peer.name, keys)
    for key in keys:
        db.mark_changed(key)
    return True
