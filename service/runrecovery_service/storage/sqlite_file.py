"""A SQLite store: the paths of its files, and connections with durable settings."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import peewee as pw

from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import commit_count
from runrecovery_service.storage.commit_count import CommitMarker
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import SQLITE

# Measured (docs/storage.md): synchronous=NORMAL loses acknowledged commits in a power cut;
# deferred transactions fail with "database is locked" in spite of the timeout.
SQLITE_PRAGMAS: Final = {
    "journal_mode": "wal",
    "synchronous": 2,  # FULL
    "foreign_keys": 1,
    "busy_timeout": 5000,
    "trusted_schema": 0,
    "cell_size_check": 1,
}


def sqlite_path(url: str, data_dir: Path) -> Path | None:
    """Return the file that the key `database` names; None for PostgreSQL.

    Symbolic links are followed. SQLite keeps the log next to the link's target, and the service's
    own files belong next to the log.
    """
    if not url:
        return Path(os.path.realpath(data_dir / "runrecovery.db"))
    if url.startswith("sqlite:///"):
        return Path(os.path.realpath(url.removeprefix("sqlite:///")))
    return None


def path_lock(path: Path) -> Path:
    """Return the lock file next to a SQLite file, which locks the path even without that file."""
    return path.with_name(path.name + ".lock")


def install_marker(path: Path) -> Path:
    """Return the file whose presence says that a database was once created at `path`."""
    return path.with_name(path.name + ".installed")


class _Sqlite(pw.SqliteDatabase):
    """Runs a check before each new connection, and executes SQL without peewee's detours.

    If the write-ahead log was removed, a new connection would create an empty one.
    """

    before_connecting: Callable[[], None] | None = None

    def _connect(self) -> sqlite3.Connection:
        if self.before_connecting is not None:
            self.before_connecting()
        connection: sqlite3.Connection = super()._connect()  # type: ignore[misc] # not in its stub
        return connection

    def execute_sql(self, sql: str, params: Sequence[object] | None = None) -> sqlite3.Cursor:
        """Execute SQL on the thread's connection, and convert errors as peewee does.

        Every statement of the service comes here. Through peewee's own method, a statement takes
        twice as long.
        """
        try:
            connection: sqlite3.Connection = self.connection()  # type: ignore[no-untyped-call] # its stub
            return connection.execute(sql, params or ())
        except sqlite3.Error:
            with pw.__exception_wrapper__:  # type: ignore[attr-defined] # not in its stub
                raise


def connect_sqlite(path: Path) -> Database:
    """Open a SQLite file, and check that every setting has taken effect.

    Raises:
        DatabaseRefused: SQLite ignores a setting.
    """
    peewee = _Sqlite(
        str(path), lock_type="IMMEDIATE", pragmas=SQLITE_PRAGMAS, check_same_thread=False
    )
    db = Database(peewee, SQLITE, str(path), file=path)
    peewee.before_connecting = db.demand_files
    with contextlib.ExitStack() as on_refusal:
        on_refusal.callback(db.close)
        for name, wanted in SQLITE_PRAGMAS.items():
            row = db.fetch_one(f"PRAGMA {name}")
            if row is None or row[0] != wanted:
                raise DatabaseRefused(str(path), f"PRAGMA {name} is {row}, not {wanted}")
        on_refusal.pop_all()
    return db


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open a SQLite file for reading. Neither the connection nor its close changes a file."""
    # Without a -wal file, no process has the store open. `immutable` then keeps SQLite from
    # creating files next to it.
    unused = not path.with_name(path.name + "-wal").exists()
    uri = f"{path.absolute().as_uri()}?{'immutable=1' if unused else 'mode=ro'}"
    timeout_s = int(SQLITE_PRAGMAS["busy_timeout"]) / 1000  # type: ignore[call-overload]
    return sqlite3.connect(uri, uri=True, timeout=timeout_s)


def lost_commits(path: Path) -> str | None:
    """Return how many acknowledged commits a store lacks, as a reason to refuse it; None: no loss.

    The store is only read.
    """
    marker = install_marker(path)
    acknowledged = CommitMarker(marker).read()
    with contextlib.closing(connect_read_only(path)) as connection:
        return commit_count.describe_loss(acknowledged, connection, marker)
