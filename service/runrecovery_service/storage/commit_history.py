"""What PostgreSQL has acknowledged to this start, and whether it still has it after a failover.

Every transaction begins with a read of its place in the server's write-ahead log. The places of
acknowledged transactions only rise, on one server. A standby that lacked the last commits when it
was promoted began its timeline at a lower place.
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
"""Identifies the server, and says where its last checkpoint began: not before its timeline."""

log = structlog.get_logger()


class LogPlace(NamedTuple):
    """A place in the write-ahead log of a server.

    Attributes:
        timeline: rises with each promotion of a standby.
        position: bytes, which rise on a timeline.
        at_us: when the log was at this place, by the database's clock.
    """

    timeline: int
    position: int
    at_us: int


def place_of(row: Row) -> LogPlace | None:
    """Return the place in the columns `SqlDialect.log_place`; None if the database has none."""
    file, position, at_us = row
    return LogPlace(int(file[:8], 16), position, at_us) if file else None


def has_places(db: Database) -> bool:
    """Return True if the database tells its places.

    Some databases that speak PostgreSQL's protocol do not.
    """
    try:
        db.fetch_one(f"SELECT {db.dialect.log_place}")
        db.fetch_one(_SERVER_SQL)
    except DRIVER_ERRORS:
        return False
    return True


class CommitHistory:
    """The latest place that PostgreSQL has acknowledged to this start. Threads may share it."""

    def __init__(self, instance: str, lease_ttl_s: float) -> None:
        self._instance = instance
        self._lease_ttl = timedelta(seconds=lease_ttl_s)
        self._lock = threading.Lock()
        self._system: str | None = None
        self.acknowledged = LogPlace(0, 0, 0)

    def note(self, place: LogPlace) -> None:
        """Record that a transaction that began at this place was acknowledged."""
        with self._lock:
            self.acknowledged = max(self.acknowledged, place)

    def demand_kept(self, db: Database, before: LogPlace, place: LogPlace) -> None:
        """Check at the beginning of a transaction that the server has what it acknowledged.

        Args:
            before: `acknowledged` before `place` was read. Later transactions of other threads may
                have been acknowledged since.

        Raises:
            CommitsLost: the server lacks an acknowledged transaction.
        """
        if before.timeline == place.timeline and before.position <= place.position:
            return
        with self._lock:
            self._compare(db, before, place)

    def _compare(self, db: Database, before: LogPlace, place: LogPlace) -> None:
        system, checkpoint_timeline, checkpoint = db.fetch_all(_SERVER_SQL)[0]
        if self._system != system:
            if self._system is not None:  # places of different servers cannot be compared
                log.warning("storage.server_changed", before=self._system, after=system)
            self._system, self.acknowledged = system, place
            return
        begins = place.position
        if checkpoint_timeline == place.timeline:
            begins = min(begins, checkpoint)
        if place.timeline <= before.timeline or begins < before.position:
            raise self._lost(db, before)
        if self.acknowledged.timeline < place.timeline:
            log.warning("storage.failover", before=before.timeline, after=place.timeline)
            self.acknowledged = place

    def _lost(self, db: Database, before: LogPlace) -> CommitsLost:
        row = db.fetch_one("SELECT lease_until FROM instance WHERE name = ?", (self._instance,))
        # What was there at the last renewal that the server has is not lost.
        renewed = None if row is None else from_us(row[0]) - self._lease_ttl
        until = from_us(before.at_us)
        return CommitsLost(since=renewed and min(renewed, until), until=until)
