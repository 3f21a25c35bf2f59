"""Launches through a shim: gated, marked, measured. What began a report, and what it proved."""

from typing import Any

from peewee import SqliteDatabase

# SQLite cannot change a CHECK: the table is made anew.
SQLITE = """
CREATE TABLE process_lease_2 (
  id INTEGER PRIMARY KEY,
  run INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  turn INTEGER NOT NULL,
  instance TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  host_id TEXT NOT NULL,
  boot_id TEXT NOT NULL,
  pid_namespace INTEGER NOT NULL,
  cookie TEXT NOT NULL,
  watermark INTEGER,
  cgroup TEXT,
  pid INTEGER,
  start_ticks INTEGER,
  state TEXT NOT NULL CHECK (state IN ('INTENT', 'GATED', 'RUNNING', 'KILL_PENDING', 'CLOSED')),
  exit_code INTEGER,
  user_us INTEGER,
  system_us INTEGER,
  max_rss_kib INTEGER,
  ended_by INTEGER,
  processes_ended INTEGER NOT NULL DEFAULT 0,
  created_at INTEGER NOT NULL,
  closed_at INTEGER,
  UNIQUE (run, attempt, turn)
) STRICT;
INSERT INTO process_lease_2 (id, run, attempt, turn, instance, epoch, host_id, boot_id,
  pid_namespace, cookie, pid, start_ticks, state, exit_code, ended_by, processes_ended,
  created_at, closed_at)
  SELECT id, run, attempt, turn, instance, epoch, host_id, boot_id, pid_namespace, cookie, pid,
  start_ticks, state, exit_code, ended_by, processes_ended, created_at, closed_at
  FROM process_lease;
DROP TABLE process_lease;
ALTER TABLE process_lease_2 RENAME TO process_lease;
CREATE INDEX process_lease_open ON process_lease (instance) WHERE state <> 'CLOSED';
CREATE INDEX process_lease_ended_by ON process_lease (ended_by) WHERE ended_by IS NOT NULL;
"""
POSTGRESQL = """
ALTER TABLE process_lease ADD COLUMN watermark BIGINT;
ALTER TABLE process_lease ADD COLUMN cgroup TEXT;
ALTER TABLE process_lease ADD COLUMN user_us BIGINT;
ALTER TABLE process_lease ADD COLUMN system_us BIGINT;
ALTER TABLE process_lease ADD COLUMN max_rss_kib BIGINT;
ALTER TABLE process_lease DROP CONSTRAINT process_lease_state_check;
ALTER TABLE process_lease ADD CONSTRAINT process_lease_state_check
  CHECK (state IN ('INTENT', 'GATED', 'RUNNING', 'KILL_PENDING', 'CLOSED'));
"""
BOTH = """
CREATE INDEX process_lease_closed ON process_lease (instance, closed_at)
  WHERE closed_at IS NOT NULL;
ALTER TABLE reconciliation ADD COLUMN cause TEXT NOT NULL DEFAULT 'STARTUP';
ALTER TABLE reconciliation ADD COLUMN containment TEXT;
ALTER TABLE interaction ADD COLUMN wait_deadline_at {int};
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    text = (SQLITE if sqlite else POSTGRESQL) + BOTH.format(int="INTEGER" if sqlite else "BIGINT")
    for statement in text.split(";\n"):
        if statement.strip():
            db.execute_sql(statement)
