"""How many transactions a SQLite store has committed, for a start to find that some are missing."""

from typing import Any

from peewee import SqliteDatabase

SQLITE = """
CREATE TABLE commit_count (
  id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
  commits INTEGER NOT NULL
) STRICT;
INSERT INTO commit_count (id, commits) VALUES (1, 0)
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    if isinstance(db, SqliteDatabase):
        for statement in SQLITE.split(";\n"):
            db.execute_sql(statement)
