"""An append-only history of the owners of runs, which triggers write on PostgreSQL.

A service that is judged by `STALE_WRITERS` connects with an `application_name` of the form
`INSTANCE-NUMBER`, another one for each start.
"""

from __future__ import annotations

from typing import Final

HISTORY: Final = (
    """CREATE TABLE owner_history (id BIGSERIAL PRIMARY KEY, run BIGINT, owner_before TEXT,
      epoch_before BIGINT, owner_after TEXT, epoch_after BIGINT, version_before BIGINT,
      version_after BIGINT, status_after TEXT, current_epoch BIGINT, claimed_epoch BIGINT,
      writer TEXT, writer_epoch BIGINT, is_stopping BOOLEAN, was_stopping BOOLEAN)""",
    """CREATE TABLE epoch_history (id BIGSERIAL PRIMARY KEY, writer TEXT, name TEXT,
      epoch BIGINT, at FLOAT DEFAULT extract(epoch FROM clock_timestamp()))""",
    """CREATE FUNCTION note_owner() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO owner_history (run, owner_before, epoch_before, owner_after, epoch_after,
        version_before, version_after, status_after, current_epoch, claimed_epoch, writer,
        writer_epoch, is_stopping, was_stopping)
      VALUES (OLD.id, OLD.owner, OLD.owner_epoch, NEW.owner, NEW.owner_epoch, OLD.version,
        NEW.version, NEW.status,
        (SELECT epoch FROM instance_epoch WHERE name = OLD.owner),
        (SELECT epoch FROM instance_epoch WHERE name = NEW.owner),
        current_setting('application_name'),
        (SELECT epoch FROM instance_epoch
          WHERE name = split_part(current_setting('application_name'), '-', 1)),
        (SELECT stopped_at IS NOT NULL FROM instance WHERE name = NEW.owner),
        (SELECT stopped_at IS NOT NULL FROM instance WHERE name = OLD.owner));
      RETURN NEW; END $$""",
    """CREATE FUNCTION note_epoch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO epoch_history (writer, name, epoch)
      VALUES (current_setting('application_name'), NEW.name, NEW.epoch);
      RETURN NEW; END $$""",
    "CREATE TRIGGER owner_history AFTER UPDATE ON run FOR EACH ROW EXECUTE FUNCTION note_owner()",
    """CREATE TRIGGER epoch_history AFTER UPDATE ON instance_epoch
      FOR EACH ROW EXECUTE FUNCTION note_epoch()""",
)
"""Every change of a run and of an epoch, with the epochs that were current then, and the writer."""

STALE_WRITES: Final = (
    "SELECT run, owner_before, epoch_before, owner_after, epoch_after, current_epoch"
    " FROM owner_history WHERE"
    # A run changes its owner only after its old owner was fenced, or while the run is queued, or
    # when its owner stops and hands it over without a process.
    " (owner_before <> owner_after AND epoch_before >= current_epoch AND status_after <> 'QUEUED'"
    " AND NOT (was_stopping AND status_after = 'WAITING_USER'))"
    # It gets the epoch that is current, or keeps the one that it has.
    " OR (epoch_after <> claimed_epoch AND (owner_before, epoch_before)"
    " IS DISTINCT FROM (owner_after, epoch_after))"
    # The execution writes no run of a fenced epoch.
    " OR (owner_before = owner_after AND epoch_before = epoch_after"
    " AND epoch_before < current_epoch AND version_after > version_before)"
)
"""No row may match."""

STALE_WRITERS: Final = (
    "SELECT h.id, h.run, h.writer, h.writer_epoch, own.epoch, h.owner_after, h.status_after"
    " FROM owner_history h JOIN (SELECT writer, max(epoch) AS epoch FROM epoch_history"
    " WHERE name = split_part(writer, '-', 1) GROUP BY writer) own USING (writer)"
    " WHERE h.writer_epoch <> own.epoch"
)
"""Changes by a start of an instance whose epoch was over. No row may match."""

WRONG_MOVES: Final = (
    "SELECT id, run, writer, owner_before, epoch_before, owner_after, epoch_after, current_epoch,"
    " claimed_epoch, status_after FROM owner_history"
    " WHERE (owner_before, epoch_before) IS DISTINCT FROM (owner_after, epoch_after) AND ("
    # A run gets the epoch that is current.
    " epoch_after <> claimed_epoch"
    # Its owner hands it over, or its new owner takes it. What waits for the host of a dead owner
    # gets the epoch of the fence from the successor.
    " OR (split_part(writer, '-', 1) NOT IN (owner_before, owner_after)"
    " AND NOT (owner_before = owner_after AND epoch_before < current_epoch))"
    # Of a living owner, others take only what is queued.
    " OR (split_part(writer, '-', 1) <> owner_before AND epoch_before >= current_epoch"
    " AND status_after <> 'QUEUED'))"
)
"""Changes of an owner that nobody may make. No row may match."""

TAKEN_WHILE_STOPPING: Final = (
    "SELECT id, run, writer, owner_before FROM owner_history WHERE owner_before <> owner_after"
    " AND split_part(writer, '-', 1) = owner_after AND is_stopping"
)
"""Runs that an instance took after it had announced its stop. No row may match."""

OVERLAPPING: Final = (
    "SELECT a.run FROM process_lease a JOIN process_lease b ON b.run = a.run AND b.id > a.id"
    " WHERE COALESCE(a.closed_at, b.created_at + 1) > b.created_at"
)
"""Launches of one run at the same time, if all replicas are on one host: every launch is closed."""

FENCED_LAUNCHES: Final = (
    "SELECT l.id, min(h.at) FROM process_lease l JOIN epoch_history h ON h.name = l.instance"
    " AND h.epoch > l.epoch AND split_part(h.writer, '-', 1) <> l.instance GROUP BY l.id"
)
"""The launches of instances that were taken over, and when: no process may live then."""
