"""Epochs of instances in a table of their own: a renewal of a lease waits for no other write."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
-- What writers hold while they write; `instance` has the lease, which is renewed meanwhile.
CREATE TABLE instance_epoch (
  name TEXT NOT NULL PRIMARY KEY,
  epoch {int} NOT NULL
){strict};
INSERT INTO instance_epoch (name, epoch) SELECT name, epoch FROM instance
"""
SQLITE = {"int": "INTEGER", "strict": " STRICT"}
POSTGRESQL = {"int": "BIGINT", "strict": ""}


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    words = SQLITE if isinstance(db, SqliteDatabase) else POSTGRESQL
    for statement in BOTH.format(**words).split(";\n"):
        db.execute_sql(statement)
