"""Counts the unfinished runs of an instance, for metrics."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from runrecovery_service.domain.run import RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import tables
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import from_us_or_none

GROUPS_MOST: Final = 1_000
"""The most rows of a count. Engines are few, but a damaged store could have any number of names."""

# Reads the index of unfinished runs. Ended runs are not counted: there may be millions.
_BY_STATUS: Final = (
    "SELECT r.status, r.engine, COUNT(*),"
    " MIN(CASE WHEN r.status = 'QUEUED' THEN r.queued_at ELSE i.asked_at END)"
    " FROM run r LEFT JOIN interaction i"
    " ON r.status = 'WAITING_USER' AND i.run = r.id AND i.no = r.interaction_count"
    f" WHERE r.owner = ? AND {tables.live('r.')}"
    f" GROUP BY r.status, r.engine ORDER BY r.engine, r.status LIMIT {GROUPS_MOST}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCount:
    """Unfinished runs of one engine with one status.

    Attributes:
        oldest_since: since when the run with the longest wait is QUEUED or WAITING_USER; None for
            other statuses.
    """

    status: RunStatus
    engine: str
    runs: int
    oldest_since: datetime | None


def count_unfinished(db: Database, owner: Owner) -> list[RunCount]:
    """Return how many unfinished runs the instance has. Quarantined runs are not counted."""
    return [
        RunCount(
            status=RunStatus(status),
            engine=engine,
            runs=int(runs),
            oldest_since=from_us_or_none(since),
        )
        for status, engine, runs, since in db.fetch_all(_BY_STATUS, (owner.instance,))
        if status in set(RunStatus)  # damaged: the next restart finds it
    ]
