"""The lock that an instance holds: a start that holds the same one need not wait for its lease."""

from typing import Any


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    db.execute_sql("ALTER TABLE instance ADD COLUMN lock_id TEXT")
