"""Entries by which agent CLIs trust workspaces, and what a restart took out of them."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
-- What was put into which file of an agent CLI; `added` says what was there before, `place` is the
-- token in the lock of the file.
CREATE TABLE trust_entry (
  file TEXT NOT NULL,
  folder TEXT NOT NULL,
  place TEXT NOT NULL,
  host_id TEXT NOT NULL,
  cli TEXT NOT NULL,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  instance TEXT NOT NULL,
  added TEXT NOT NULL,
  created_at {int} NOT NULL,
  removed_at {int},
  away TEXT,
  away_since {int},
  look_at {int},
  PRIMARY KEY (file, folder, place)
){clustered};
CREATE INDEX trust_entry_run ON trust_entry (run);
ALTER TABLE reconciliation ADD COLUMN trust_removals TEXT;
"""
SQLITE = {"int": "INTEGER", "clustered": " STRICT, WITHOUT ROWID"}
POSTGRESQL = {"int": "BIGINT", "clustered": ""}


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    words = SQLITE if isinstance(db, SqliteDatabase) else POSTGRESQL
    for statement in BOTH.format(**words).split(";\n"):
        if statement.strip():
            db.execute_sql(statement)
