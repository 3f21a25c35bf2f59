"""Finds the instances that are dead, so that another instance must take over their runs.

An instance is dead once its lease has ended by the database's clock. After a planned stop it has
`lease_ttl_s` to start again. PostgreSQL only.
"""

from __future__ import annotations

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import json_value
from runrecovery_service.storage.tables import LIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeoverRules:
    """The settings of takeovers by one instance.

    Attributes:
        owner: the successor.
        shares_workspaces: whether the successor can read the sessions of other instances.
        lease_ttl_s: how long an instance has after a planned stop to start again before a takeover.
        host_return_s: how long runs wait for the host that has their session.
    """

    owner: Owner
    shares_workspaces: bool
    lease_ttl_s: float
    host_return_s: float


def needs_takeover(db: Database, rules: TakeoverRules) -> tuple[str, tuple[object, ...]]:
    """Return an SQL condition for instances `i` that need a takeover, and its parameters."""
    now = db.dialect.now_us
    successor_lives = (
        "SELECT 1 FROM instance r WHERE r.name = i.taken_over_by AND r.name <> ?"
        f" AND r.lease_until > {now}"
    )
    # After a finished takeover, only runs that wait for their host are left.
    waits_no_more = (
        f"(i.taken_over_by IS NULL OR i.host_return_until <= {now}"
        + (" OR 1 = 1" if rules.shares_workspaces else "")
        + ")"
    )
    has_work = (
        f"(EXISTS (SELECT 1 FROM run WHERE owner = i.name AND {LIVE}) OR (i.taken_over_by IS NULL"
        " AND EXISTS (SELECT 1 FROM webhook_delivery d WHERE d.instance = i.name)))"
    )
    condition = (
        f"i.name <> ? AND i.lease_until <= {now} AND COALESCE(i.stopped_at, 0) + ? <= {now}"
        " AND CASE WHEN i.taken_over_by IS NOT NULL AND i.takeover_done_at IS NULL"
        f" THEN NOT EXISTS ({successor_lives}) ELSE {waits_no_more} AND {has_work} END"
    )
    me = rules.owner.instance
    return condition, (me, round(rules.lease_ttl_s * 1e6), me)


def find_dead(db: Database, rules: TakeoverRules) -> list[str]:
    """Return the names of the instances that need a takeover."""
    condition, params = needs_takeover(db, rules)
    rows = db.fetch_all(
        f"SELECT i.name FROM instance i WHERE {condition} ORDER BY i.lease_until, i.name", params
    )
    return [name for (name,) in rows]


def engines_of(db: Database, instance: str) -> frozenset[str]:
    """Return the engines that an instance has recorded; if none, those of its unfinished runs."""
    row = db.fetch_one("SELECT engines FROM instance WHERE name = ?", (instance,))
    names = json_value(row[0]) if row else None
    if isinstance(names, list) and names:
        return frozenset(map(str, names))
    rows = db.fetch_all(f"SELECT DISTINCT engine FROM run WHERE owner = ? AND {LIVE}", (instance,))
    return frozenset(engine for (engine,) in rows)
