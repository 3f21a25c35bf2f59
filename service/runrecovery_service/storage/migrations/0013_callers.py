"""Which caller created, answered, canceled and reopened; NULL where no callers are configured."""

from typing import Any

BOTH = """
ALTER TABLE run ADD COLUMN created_by TEXT;
ALTER TABLE run ADD COLUMN canceled_by TEXT;
ALTER TABLE interaction ADD COLUMN replied_by TEXT;
ALTER TABLE run_event ADD COLUMN caller TEXT;
ALTER TABLE recovery_event ADD COLUMN caller TEXT
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    for statement in BOTH.split(";\n"):
        db.execute_sql(statement)
