"""Events to watch, deadlines on rows, what explains a decision, what a run is set back by."""

from typing import Any

from peewee import SqliteDatabase

SQLITE_LABELS = """
INSERT OR IGNORE INTO run_label (key, value, run) SELECT l.key, l.value, r.id
  FROM run r, json_each(CASE WHEN json_valid(r.labels) THEN r.labels ELSE '{{}}' END) l
  WHERE l.type = 'text' AND typeof(l.key) = 'text';
"""
POSTGRESQL_LABELS = """
INSERT INTO run_label (key, value, run) SELECT l.key, l.value #>> '{{}}', r.id
  FROM run r, jsonb_each(CASE WHEN r.labels IS JSON OBJECT THEN r.labels::jsonb ELSE '{{}}' END) l
  WHERE jsonb_typeof(l.value) = 'string';
"""
BOTH = """
-- The event with sequence 1, the creation, is not stored: the run tells it.
ALTER TABLE run ADD COLUMN event_count {int} NOT NULL DEFAULT 1;
ALTER TABLE run ADD COLUMN session_timeout_us {int};
ALTER TABLE run ADD COLUMN require_user_reply {int};
ALTER TABLE run ADD COLUMN max_run_us {int};
ALTER TABLE run ADD COLUMN auto_decided_count {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN run_deadline_at {int};
ALTER TABLE run ADD COLUMN reopenable_until {int};
ALTER TABLE run ADD COLUMN retired_type TEXT;
ALTER TABLE run ADD COLUMN retired_value TEXT;
-- Deadlines by a steady clock, and which clock that is.
ALTER TABLE run ADD COLUMN wait_due_us {int};
ALTER TABLE run ADD COLUMN run_due_us {int};
ALTER TABLE run ADD COLUMN reopen_due_us {int};
ALTER TABLE run ADD COLUMN due_clock TEXT;
CREATE INDEX run_wait_due ON run (owner, wait_due_us) WHERE wait_due_us IS NOT NULL;
CREATE INDEX run_run_due ON run (owner, run_due_us) WHERE run_due_us IS NOT NULL;
CREATE INDEX run_reopen_due ON run (owner, reopen_due_us) WHERE reopen_due_us IS NOT NULL;
ALTER TABLE interaction ADD COLUMN auto_decided {int} NOT NULL DEFAULT 0;
-- What the decision saw, to explain it; its place among the run's events.
ALTER TABLE recovery_event ADD COLUMN sequence {int} NOT NULL DEFAULT 0;
ALTER TABLE recovery_event ADD COLUMN profile TEXT;
ALTER TABLE recovery_event ADD COLUMN attempt {int};
ALTER TABLE recovery_event ADD COLUMN interaction {int};
ALTER TABLE recovery_event ADD COLUMN session_turn {int};
ALTER TABLE recovery_event ADD COLUMN session_verdict TEXT;
CREATE INDEX recovery_event_feed ON recovery_event (reconciliation, run);
ALTER TABLE process_lease ADD COLUMN orphans TEXT;
CREATE TABLE run_event (
  run {int} NOT NULL,
  no {int} NOT NULL,
  kind TEXT NOT NULL,
  status TEXT NOT NULL,
  attempt {int} NOT NULL,
  interaction {int} NOT NULL,
  error_code TEXT,
  happened_at {int} NOT NULL,
  PRIMARY KEY (run, no)
){clustered};
CREATE TABLE run_label (
  key TEXT NOT NULL,
  value TEXT NOT NULL,
  run {int} NOT NULL,
  PRIMARY KEY (key, value, run)
){clustered};
"""
SQLITE = {"int": "INTEGER", "clustered": " STRICT, WITHOUT ROWID"}
POSTGRESQL = {"int": "BIGINT", "clustered": ""}


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    text = BOTH + (SQLITE_LABELS if sqlite else POSTGRESQL_LABELS)
    for statement in text.format(**(SQLITE if sqlite else POSTGRESQL)).split(";\n"):
        if statement.strip():
            db.execute_sql(statement)
