"""Indexes that find the runs with due deliveries, and old deliveries, without reading all rows."""

from typing import Any

CHANGES = """
DROP INDEX webhook_delivery_due;
DROP INDEX webhook_delivery_run;
CREATE INDEX webhook_delivery_due ON webhook_delivery (instance, webhook, run, sequence)
  WHERE given_up_at IS NULL;
CREATE INDEX webhook_delivery_age ON webhook_delivery (instance, webhook, created_at)
  WHERE given_up_at IS NULL
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    for statement in CHANGES.split(";\n"):
        db.execute_sql(statement)
