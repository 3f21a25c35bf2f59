"""The instance that a takeover has recovered, in its report."""

from typing import Any


def up(migrator: object, db: Any) -> None:
    """Change the table. `db` is the migration runner's peewee database."""
    db.execute_sql("ALTER TABLE reconciliation ADD COLUMN recovered_instance TEXT")
