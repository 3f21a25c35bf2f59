"""Turns that a restart interrupted and that resume their session: how often, why, and when."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
ALTER TABLE run ADD COLUMN max_resumes {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN resume_count {int} NOT NULL DEFAULT 0;
-- The questions that earlier attempts have asked.
ALTER TABLE run ADD COLUMN questions_before {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN interrupted_at {int};
ALTER TABLE run ADD COLUMN interrupted_by TEXT;
-- The pause before the next resume, by the wall clock and by the steady clock `due_clock`.
ALTER TABLE run ADD COLUMN resume_at {int};
ALTER TABLE run ADD COLUMN resume_due_us {int};
ALTER TABLE recovery_event ADD COLUMN resumes {int};
CREATE INDEX run_resume_due ON run (owner, resume_due_us) WHERE resume_due_us IS NOT NULL
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    integer = "INTEGER" if isinstance(db, SqliteDatabase) else "BIGINT"
    for statement in BOTH.format(int=integer).split(";\n"):
        db.execute_sql(statement)
