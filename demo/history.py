"""The changes of each run, recorded by a trigger of the database that no replica knows.

The service does not write this record, so the record can show faults of the service.
"""

from __future__ import annotations

from typing import Any, Final

import psycopg

SETUP: Final = (
    """CREATE TABLE demo_history (id BIGSERIAL PRIMARY KEY, run_id TEXT, owner_before TEXT,
      epoch_before BIGINT, owner_after TEXT, epoch_after BIGINT, version_before BIGINT,
      version_after BIGINT, fence_before BIGINT, fence_after BIGINT)""",
    """CREATE FUNCTION demo_record() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO demo_history (run_id, owner_before, epoch_before, owner_after, epoch_after,
        version_before, version_after, fence_before, fence_after)
      VALUES (OLD.run_id, OLD.owner, OLD.owner_epoch, NEW.owner, NEW.owner_epoch,
        OLD.version, NEW.version,
        (SELECT epoch FROM instance_epoch WHERE name = OLD.owner),
        (SELECT epoch FROM instance_epoch WHERE name = NEW.owner));
      RETURN NEW; END $$""",
    "CREATE TRIGGER demo_record AFTER UPDATE ON run FOR EACH ROW EXECUTE FUNCTION demo_record()",
)

# A write under an epoch that was over: either the row keeps an owner whose epoch has passed, or it
# gets an epoch that its new owner does not have.
_STALE_WRITES: Final = """
    SELECT run_id FROM demo_history
    WHERE (owner_before = owner_after AND epoch_before = epoch_after
        AND epoch_before < fence_before AND version_after > version_before)
      OR ((owner_before, epoch_before) <> (owner_after, epoch_after) AND epoch_after <> fence_after)
"""
# All replicas of the demo are on one host, so each launch is closed once its processes are gone.
_OVERLAPPING_LAUNCHES: Final = """
    SELECT r.run_id FROM process_lease a
    JOIN process_lease b ON b.run = a.run AND b.id > a.id
    JOIN run r ON r.id = a.run
    WHERE COALESCE(a.closed_at, b.created_at + 1) > b.created_at
"""


class History:
    """Reads the record of the database at `url`, and finds violations in it."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def begin(self) -> None:
        """Record every change of a run from now on. The database must be migrated."""
        for statement in SETUP:
            self._connection.execute(statement.encode())

    def owners_of(self, run_id: str) -> list[str]:
        """Return the owners of a run, in their order."""
        rows = self._rows(
            "SELECT owner_before, owner_after FROM demo_history WHERE run_id = %s ORDER BY id",
            run_id,
        )
        owners = [rows[0][0]] if rows else []
        for _, after in rows:
            if after != owners[-1]:
                owners.append(after)
        return owners

    def unfinished_of(self, instance: str) -> list[str]:
        """Return the runs of an instance that have not ended."""
        rows = self._rows(
            "SELECT run_id FROM run WHERE owner = %s"
            " AND status IN ('QUEUED', 'RUNNING', 'WAITING_USER') ORDER BY id",
            instance,
        )
        return [run_id for (run_id,) in rows]

    def latest(self) -> int:
        """Return the key of the latest recorded change."""
        return int(self._rows("SELECT COALESCE(max(id), 0) FROM demo_history")[0][0])

    def changes_as(self, instance: str, epoch: int, *, after: int) -> int:
        """Return how many changes later than `after` left a run with this owner and epoch."""
        rows = self._rows(
            "SELECT count(*) FROM demo_history"
            " WHERE id > %s AND owner_after = %s AND epoch_after = %s",
            after,
            instance,
            epoch,
        )
        return int(rows[0][0])

    def stale_writes(self) -> list[str]:
        """Return the runs that were written under an epoch that was over. None may be."""
        return [run_id for (run_id,) in self._rows(_STALE_WRITES)]

    def overlapping_launches(self) -> list[str]:
        """Return the runs that had two launches at one time. None may have."""
        return [run_id for (run_id,) in self._rows(_OVERLAPPING_LAUNCHES)]

    def changes(self) -> int:
        """Return how many changes of runs were recorded."""
        return int(self._rows("SELECT count(*) FROM demo_history")[0][0])

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement.encode(), values).fetchall()
