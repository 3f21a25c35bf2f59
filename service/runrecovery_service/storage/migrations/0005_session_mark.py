"""What a session file was when a question was recorded, and what a check of it found."""

from typing import Any

BOTH = """
ALTER TABLE run ADD COLUMN session_mark TEXT;
ALTER TABLE run ADD COLUMN session_reason TEXT;
ALTER TABLE recovery_event ADD COLUMN session_reason TEXT
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    for statement in BOTH.split(";\n"):
        db.execute_sql(statement)
