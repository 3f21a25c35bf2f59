"""Which start holds an epoch: after a failover that lost a claim, an epoch is claimed again."""

from typing import Any


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    db.execute_sql("ALTER TABLE instance_epoch ADD COLUMN boot_token TEXT NOT NULL DEFAULT ''")
