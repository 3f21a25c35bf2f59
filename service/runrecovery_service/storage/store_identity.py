"""The id of a store, and keys that are derived from it. A backup has the same id."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from pathlib import Path

from runrecovery_service.storage.database import Database
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sqlite_file import connect_read_only


def store_id(db: Database, *, new: str) -> str:
    """Return the id of the store. If the store has none, store `new` as its id."""
    if (found := stored_id(db)) is not None:
        return found
    with db.transaction():
        db.execute(
            "INSERT INTO store_identity (id, store_id) VALUES (1, ?) ON CONFLICT (id) DO NOTHING",
            (new,),
        )
    return stored_id(db) or new


def store_key(db: Database, purpose: str) -> bytes:
    """Return a secret key that is the same for all instances on the store and after restarts.

    It is derived from the store's id, which is random and never given to callers.

    Args:
        purpose: each purpose has a different key.

    Raises:
        LookupError: the store has no id yet.
        DatabaseRefused, DatabaseOutOfReach: the store cannot be read; only a start derives keys.
    """
    with refusing(db.name):
        found = stored_id(db)
    if found is None:
        raise LookupError("the store has no id")
    return hashlib.blake2b(purpose.encode(), key=found.encode(), digest_size=32).digest()


def sqlite_store_id(path: Path) -> str | None:
    """Return the id of an undamaged SQLite store; None if it has none. The store is only read."""
    with contextlib.closing(connect_read_only(path)) as connection:
        try:
            row = connection.execute("SELECT store_id FROM store_identity").fetchone()
        except sqlite3.OperationalError:  # an older store: the next start migrates it
            return None
    return None if row is None else str(row[0])


def stored_id(db: Database) -> str | None:
    """Return the id of the store; None if it has none yet."""
    row = db.fetch_one("SELECT store_id FROM store_identity")
    return None if row is None else str(row[0])
