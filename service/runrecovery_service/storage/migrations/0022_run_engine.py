"""An index for lists of the runs of some engines.

Its condition holds for every run. Only the query of these lists repeats it, so that no other
statement reads the index: some would read many runs that have ended.
"""

from typing import Any

CREATE = "CREATE INDEX run_engine ON run (engine, id) WHERE run_id <> ''"


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    db.execute_sql(CREATE)
