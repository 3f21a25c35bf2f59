"""The trace of a run's caller, which its agents join."""

from typing import Any


def up(migrator: object, db: Any) -> None:
    """Change the table. `db` is the migration runner's peewee database."""
    db.execute_sql("ALTER TABLE run ADD COLUMN traceparent TEXT")
