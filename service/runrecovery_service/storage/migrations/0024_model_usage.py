"""What the turns of an engine have used, by the model that their agents named."""

from typing import Any, Final

from peewee import SqliteDatabase

BOTH: Final = """
CREATE TABLE model_usage (
  engine TEXT NOT NULL,
  instance TEXT NOT NULL,
  model TEXT NOT NULL,
  turns {int} NOT NULL,
  input_tokens {int} NOT NULL,
  cached_input_tokens {int} NOT NULL,
  cache_write_input_tokens {int} NOT NULL,
  output_tokens {int} NOT NULL,
  reasoning_output_tokens {int} NOT NULL,
  cost_nanos {int},
  PRIMARY KEY (engine, instance, model)
){clustered}
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    words = {
        "int": "INTEGER" if sqlite else "BIGINT",
        "clustered": " STRICT, WITHOUT ROWID" if sqlite else "",
    }
    db.execute_sql(BOTH.format(**words))
