"""Which parts of ended runs were removed, and indexes to find what has reached its age."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
ALTER TABLE run ADD COLUMN output_removed_at {int};
ALTER TABLE run ADD COLUMN workspace_removed_at {int};
ALTER TABLE run ADD COLUMN events_removed_at {int};
CREATE INDEX run_ended ON run ({owner}ended_at, id) WHERE ended_at IS NOT NULL;
CREATE INDEX run_with_output ON run ({owner}ended_at, id)
  WHERE ended_at IS NOT NULL AND output_removed_at IS NULL;
CREATE INDEX run_with_workspace ON run ({owner}ended_at, id)
  WHERE ended_at IS NOT NULL AND workspace_removed_at IS NULL;
CREATE INDEX run_with_events ON run ({owner}ended_at, id)
  WHERE ended_at IS NOT NULL AND events_removed_at IS NULL;
CREATE INDEX request_receipt_created ON request_receipt (created_at)
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    # One service owns all runs of a SQLite store, also those under an earlier instance name.
    words = {"int": "INTEGER" if sqlite else "BIGINT", "owner": "" if sqlite else "owner, "}
    for statement in BOTH.format(**words).split(";\n"):
        db.execute_sql(statement)
