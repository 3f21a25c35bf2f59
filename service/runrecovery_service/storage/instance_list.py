"""Lists the instances that use one database, for the call GetInstances.

`dead_instances.py` finds those whose lease has run out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

from runrecovery_service.domain.instance import InstanceState
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.rows import from_us, from_us_or_none, json_value
from runrecovery_service.storage.tables import LIVE

INSTANCES_MOST: Final = 1_000
"""The most instances in a list. Names that are no longer used are never removed, but come last."""


def list_instances(db: Database) -> list[InstanceState]:
    """Return living instances first, then the others, the latest start first."""
    runs: defaultdict[str, Counter[RunStatus]] = defaultdict(Counter)
    held: Counter[str] = Counter()
    # Reads the index of unfinished runs. Ended runs are not counted: there may be millions.
    for owner, status, profile, count in db.fetch_all(
        "SELECT owner, status, profile, COUNT(*) FROM run"
        f" WHERE {LIVE} GROUP BY owner, status, profile"
    ):
        if status not in set(RunStatus):  # damaged: the next restart finds it
            continue
        runs[owner][RunStatus(status)] += count
        if status == RunStatus.RUNNING or (
            status == RunStatus.WAITING_USER and profile == Profile.STICKY_PROCESS
        ):
            held[owner] += count
    alive = f"CASE WHEN lease_until > {db.dialect.now_us} THEN 1 ELSE 0 END"
    rows = db.fetch_all(
        "SELECT name, epoch, lease_until, host_id, version, engines, max_running, started_at,"
        " stopped_at, taken_over_by, taken_over_at, takeover_done_at, host_return_until,"
        f" {alive} AS alive FROM instance"
        f" ORDER BY alive DESC, started_at DESC, name LIMIT {INSTANCES_MOST}"
    )
    return [_instance_from_row(row, runs[row[0]], held[row[0]]) for row in rows]


def _instance_from_row(row: Row, runs: Counter[RunStatus], held: int) -> InstanceState:
    name, epoch, lease_until, host_id, version, engines, max_running, started_at, *rest = row
    stopped_at, taken_over_by, taken_over_at, takeover_done_at, host_return_until, alive = rest
    names = json_value(engines)
    return InstanceState(
        name=name,
        epoch=epoch,
        is_alive=bool(alive),
        lease_until=from_us(lease_until) if lease_until else None,
        host_id=host_id,
        version=version,
        engines=tuple(map(str, names)) if isinstance(names, list) else (),
        max_running=max_running,
        slots_held=held,
        runs={status: runs[status] for status in RunStatus if runs[status]},
        started_at=from_us(started_at),
        stopped_at=from_us_or_none(stopped_at),
        taken_over_by=taken_over_by,
        taken_over_at=from_us_or_none(taken_over_at),
        takeover_done_at=from_us_or_none(takeover_done_at),
        host_return_until=from_us_or_none(host_return_until),
    )
