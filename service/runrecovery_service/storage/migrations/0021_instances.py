"""What an instance tells its peers: engines, slots, version, planned stop; and who took it over."""

from typing import Any

from peewee import SqliteDatabase

COLUMNS = (
    "engines TEXT NOT NULL DEFAULT '[]'",
    "max_running {integer} NOT NULL DEFAULT 0",
    "version TEXT NOT NULL DEFAULT ''",
    "stopped_at {integer}",
    "taken_over_by TEXT",
    "taken_over_at {integer}",
    "takeover_done_at {integer}",
    "host_return_until {integer}",
)


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    integer = "INTEGER" if isinstance(db, SqliteDatabase) else "BIGINT"
    for column in COLUMNS:
        db.execute_sql(f"ALTER TABLE instance ADD COLUMN {column.format(integer=integer)}")
