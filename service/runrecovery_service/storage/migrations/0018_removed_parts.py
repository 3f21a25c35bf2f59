"""Which parts of runs were removed, in a narrow table: a run may have a megabyte of input."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
CREATE TABLE removed_part (
  run {int} NOT NULL,
  part TEXT NOT NULL,
  PRIMARY KEY (run, part)
){clustered};
INSERT INTO removed_part SELECT id, 'outputs' FROM run WHERE output_removed_at IS NOT NULL;
INSERT INTO removed_part SELECT id, 'workspaces' FROM run WHERE workspace_removed_at IS NOT NULL;
INSERT INTO removed_part SELECT id, 'events' FROM run WHERE events_removed_at IS NOT NULL;
DROP INDEX run_with_output;
DROP INDEX run_with_workspace;
DROP INDEX run_with_events;
ALTER TABLE run DROP COLUMN output_removed_at;
ALTER TABLE run DROP COLUMN workspace_removed_at;
ALTER TABLE run DROP COLUMN events_removed_at
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    words = {
        "int": "INTEGER" if sqlite else "BIGINT",
        "clustered": " STRICT, WITHOUT ROWID" if sqlite else "",
    }
    for statement in BOTH.format(**words).split(";\n"):
        db.execute_sql(statement)
