"""The latest time of the wall clock that an instance has removed anything by."""

from typing import Any

from peewee import SqliteDatabase


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    kind = "INTEGER" if isinstance(db, SqliteDatabase) else "BIGINT"
    db.execute_sql(f"ALTER TABLE instance ADD COLUMN time_confirmed_at {kind}")
