"""An id that ties a data directory to its store, and the instance of each receipt."""

from typing import Any

from peewee import SqliteDatabase

BOTH = """
CREATE TABLE store_identity (
  id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
  store_id TEXT NOT NULL
){strict};
ALTER TABLE request_receipt ADD COLUMN owner TEXT NOT NULL DEFAULT '';
UPDATE request_receipt SET owner =
  COALESCE((SELECT r.owner FROM run r WHERE r.id = request_receipt.run), '');
DROP INDEX request_receipt_created;
CREATE INDEX request_receipt_created ON request_receipt ({owner}created_at)
"""


def up(migrator: object, db: Any) -> None:
    """Change the tables. `db` is the migration runner's peewee database."""
    sqlite = isinstance(db, SqliteDatabase)
    words = {"strict": " STRICT" if sqlite else "", "owner": "" if sqlite else "owner, "}
    for statement in BOTH.format(**words).split(";\n"):
        db.execute_sql(statement)
