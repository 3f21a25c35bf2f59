"""What agents report of their work: tokens, cost and retries, and the limits of a run."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
ALTER TABLE run ADD COLUMN input_tokens {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN cached_input_tokens {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN cache_write_input_tokens {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN output_tokens {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN reasoning_output_tokens {int} NOT NULL DEFAULT 0;
ALTER TABLE run ADD COLUMN cost_nanos {int};
-- NULL until the first report.
ALTER TABLE run ADD COLUMN model TEXT;
-- What the next process of the session subtracts from the total that it reports.
ALTER TABLE run ADD COLUMN session_usage TEXT;
ALTER TABLE run ADD COLUMN max_tokens {int};
ALTER TABLE run ADD COLUMN max_cost_nanos {int};
-- What the turn has used so far.
ALTER TABLE process_lease ADD COLUMN usage TEXT;
ALTER TABLE run_event ADD COLUMN usage TEXT;
ALTER TABLE run_event ADD COLUMN message TEXT;
CREATE TABLE engine_usage (
  engine TEXT NOT NULL,
  instance TEXT NOT NULL,
  turns {int} NOT NULL,
  input_tokens {int} NOT NULL,
  cached_input_tokens {int} NOT NULL,
  cache_write_input_tokens {int} NOT NULL,
  output_tokens {int} NOT NULL,
  reasoning_output_tokens {int} NOT NULL,
  cost_nanos {int},
  PRIMARY KEY (engine, instance)
){clustered}
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    words = {
        "int": "INTEGER" if sqlite else "BIGINT",
        "clustered": " STRICT, WITHOUT ROWID" if sqlite else "",
    }
    for statement in BOTH.format(**words).split(";\n"):
        db.execute_sql(statement)
