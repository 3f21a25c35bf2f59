"""Questions that ask for permission to call a tool: the call, as JSON."""

from typing import Any


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    db.execute_sql("ALTER TABLE interaction ADD COLUMN tool_call TEXT")
