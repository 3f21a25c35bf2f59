"""The id of a store. A backup keeps it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sqlite_file import connect_read_only


def store_id(db: Database, *, new: str) -> str:
    """Return the id of the store, which becomes `new` if the store has none."""
    if (found := stored_id(db)) is not None:
        return found
    with db.transaction():
        db.execute(
            "INSERT INTO store_identity (id, store_id) VALUES (1, ?) ON CONFLICT (id) DO NOTHING",
            (new,),
        )
    return stored_id(db) or new


def sqlite_store_id(path: Path) -> str | None:
    """Return the id of a sound SQLite store, None if it has none. The store is only read."""
    with contextlib.closing(connect_read_only(path)) as connection:
        try:
            row = connection.execute("SELECT store_id FROM store_identity").fetchone()
        except sqlite3.OperationalError:  # an older version made it, and the next start migrates it
            return None
    return None if row is None else str(row[0])


def stored_id(db: Database) -> str | None:
    """Return the id of the store; None if it has none yet."""
    row = db.fetch_one("SELECT store_id FROM store_identity")
    return None if row is None else str(row[0])
