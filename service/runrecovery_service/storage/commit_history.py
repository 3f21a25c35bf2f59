"""Detects acknowledged commits that PostgreSQL has lost, for example in a failover.

Every transaction begins by reading the end of the server's write-ahead log. While the server stays
the same, these positions only rise. If a promoted standby lacks the last commits, its timeline
begins below the last position of an acknowledged transaction.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Final, NamedTuple

import structlog

from runrecovery_service.domain.errors import CommitsLost
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS
from runrecovery_service.storage.rows import from_us

_SERVER_SQL: Final = (
    "SELECT s.system_identifier::text, c.timeline_id, (c.redo_lsn - '0/0')::BIGINT"
    " FROM pg_control_system() s, pg_control_checkpoint() c"
)
"""Identifies the server, and reads the position of its last checkpoint.

The first checkpoint of a timeline is at or after its beginning.
"""

log = structlog.get_logger()


class LogPosition(NamedTuple):
    """A position in the write-ahead log of a server.

    Attributes:
        timeline: the number of the timeline. Each promotion of a standby begins a higher one.
        lsn: the log sequence number, in bytes.
        at_us: the time at which the log ended here, in microseconds UTC by the database's clock.
    """

    timeline: int
    lsn: int
    at_us: int


def position_of(row: Row) -> LogPosition | None:
    """Parse the columns `SqlDialect.log_position`; None if the database reports no positions."""
    file, lsn, at_us = row
    return LogPosition(int(file[:8], 16), lsn, at_us) if file else None


def reports_positions(db: Database) -> bool:
    """Return whether the database reports positions of its write-ahead log.

    Some databases that speak PostgreSQL's protocol do not.
    """
    try:
        db.fetch_one(f"SELECT {db.dialect.log_position}")
        db.fetch_one(_SERVER_SQL)
    except DRIVER_ERRORS:
        return False
    return True


class CommitHistory:
    """The highest log position of this start's acknowledged transactions. Thread-safe."""

    def __init__(self, instance: str, lease_ttl_s: float) -> None:
        self._instance = instance
        self._lease_ttl = timedelta(seconds=lease_ttl_s)
        self._lock = threading.Lock()
        self._system: str | None = None
        self.acknowledged = LogPosition(0, 0, 0)

    def note(self, position: LogPosition) -> None:
        """Record that a transaction that began at this position was acknowledged."""
        with self._lock:
            self.acknowledged = max(self.acknowledged, position)

    def demand_kept(self, db: Database, before: LogPosition, position: LogPosition) -> None:
        """Check at the beginning of a transaction that the server has every acknowledged commit.

        Args:
            before: the value of `acknowledged`, read before `position`. Other threads may have
                raised `acknowledged` since.
            position: the end of the log that this transaction has read.

        Raises:
            CommitsLost: the server lacks an acknowledged transaction.
        """
        if before.timeline == position.timeline and before.lsn <= position.lsn:
            return
        with self._lock:
            self._compare(db, before, position)

    def _compare(self, db: Database, before: LogPosition, position: LogPosition) -> None:
        system, checkpoint_timeline, checkpoint = db.fetch_all(_SERVER_SQL)[0]
        if self._system != system:
            if self._system is not None:  # positions of different servers cannot be compared
                log.warning("storage.server_changed", before=self._system, after=system)
            self._system, self.acknowledged = system, position
            return
        begins = position.lsn
        if checkpoint_timeline == position.timeline:
            begins = min(begins, checkpoint)
        if position.timeline <= before.timeline or begins < before.lsn:
            raise self._lost(db, before)
        if self.acknowledged.timeline < position.timeline:
            log.warning("storage.failover", before=before.timeline, after=position.timeline)
            self.acknowledged = position

    def _lost(self, db: Database, before: LogPosition) -> CommitsLost:
        row = db.fetch_one("SELECT lease_until FROM instance WHERE name = ?", (self._instance,))
        # The server still has the last renewal in this row, and every commit before the renewal.
        renewed = None if row is None else from_us(row[0]) - self._lease_ttl
        until = from_us(before.at_us)
        return CommitsLost(since=renewed and min(renewed, until), until=until)
