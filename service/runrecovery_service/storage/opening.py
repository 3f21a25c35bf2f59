"""Opens the store that the configuration names, and refuses a database that is unfit for it."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Final

from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import postgresql, postgresql_rights, quick_check
from runrecovery_service.storage.commit_count import MARKER_TEXT
from runrecovery_service.storage.commit_history import reports_positions
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import REPAIR_HINT
from runrecovery_service.storage.durable_files import durably_write, sync_directory
from runrecovery_service.storage.file_locks import DatabaseLock, Lock
from runrecovery_service.storage.integrity import NO_TABLES
from runrecovery_service.storage.migrate import migrate
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sql_dialects import NO_POSITION, POSTGRESQL
from runrecovery_service.storage.sqlite_file import (
    connect_sqlite,
    install_marker,
    lost_commits,
    sqlite_path,
)
from runrecovery_service.storage.sqlite_header import APPLICATION_ID, check_header
from runrecovery_service.storage.store_identity import stored_id

SQLITE_FLOOR: Final = (3, 37, 0)  # STRICT tables
POSTGRESQL_NAME: Final = "the PostgreSQL database"
DIRECT_NAME: Final = "the PostgreSQL database of `database_direct`"


def open_database(url: str, data_dir: Path, *, locks: list[Lock] | None = None) -> Database:
    """Open the store that the configuration names. Create and migrate it as needed.

    The caller already has the locks on the data directory and on the path. The lock on a SQLite
    file is added to `locks`. The caller releases it after the last connection is closed.

    Raises:
        Held: another service uses the SQLite file.
        DatabaseRefused: the database is lost, damaged, of another application or of a newer
            version, or the database software is too old.
        DatabaseOutOfReach: the database does not answer in time. A later start may succeed.
    """
    path = sqlite_path(url, data_dir)
    with refusing(str(path) if path is not None else POSTGRESQL_NAME):
        db = _open_postgresql(url) if path is None else _open_sqlite(path, locks)
        try:
            if path is not None:
                _demand_sound(db)
            migrate(db)
            if path is not None:
                db.count_commits(install_marker(path))
        except BaseException:
            db.close()
            raise
    return db


def _demand_sound(db: Database) -> None:
    if quick_check.lacks_tables(db.peewee.connection()):
        raise DatabaseRefused(db.name, NO_TABLES)
    if found := quick_check.find_damage(db.peewee.connection()):
        raise DatabaseRefused(db.name, f"is damaged ({found}); {REPAIR_HINT}")


def open_direct(url: str, db: Database) -> None:
    """Connect to the PostgreSQL database `db` without a pooler, and set the result as `db.direct`.

    Raises:
        DatabaseRefused: the URL leads to another database, or the database is unfit.
        DatabaseOutOfReach: the database does not answer in time. A later start may succeed.
    """
    with refusing(DIRECT_NAME):
        direct = _open_postgresql(url, DIRECT_NAME)
        try:
            if _store_of(direct) != _store_of(db):
                raise DatabaseRefused(DIRECT_NAME, "is not the one that `database` leads to")
        finally:
            direct.close()
    db.direct = direct


def _store_of(db: Database) -> str | None:
    return stored_id(db) if db.peewee.table_exists("store_identity") else None


def _open_postgresql(url: str, name: str = POSTGRESQL_NAME) -> Database:
    if postgresql.PSYCOPG is None:  # not installed
        raise DatabaseRefused("postgresql", "needs `pip install runrecovery-service[postgres]`")
    try:
        peewee = postgresql.prepare(url)
    except postgresql.Unreadable:
        reason = "its URL cannot be read; are special characters of the password percent-encoded?"
        raise DatabaseRefused(name, reason) from None
    db = Database(peewee, POSTGRESQL, name)
    try:
        _check_postgresql(db)
        peewee.find_pooler()
        if not reports_positions(db):
            db.dialect = replace(POSTGRESQL, log_position=NO_POSITION)
    except BaseException:
        db.close()
        raise
    return db


def _check_postgresql(db: Database) -> None:
    reason = postgresql.server_problem(db.fetch_one)
    if reason is not None:
        raise DatabaseRefused(db.name, reason)
    if reason := postgresql_rights.missing_for_start(db):
        raise DatabaseRefused(db.name, reason)


def postgresql_problems(url: str, direct_url: str = "") -> list[str]:
    """Return each reason to refuse a start on this PostgreSQL database. Nothing is changed."""
    try:
        with refusing(POSTGRESQL_NAME):
            db = _open_postgresql(url)
        try:
            if direct_url:
                open_direct(direct_url, db)
        finally:
            db.close()
    except DatabaseRefused as error:
        return [str(error)]
    return []


def postgresql_store_id(url: str) -> str | None:
    """Return the id of a PostgreSQL store; None if the store has none yet. Nothing is changed.

    Raises:
        DatabaseRefused: a start on this database would be refused.
    """
    with refusing(POSTGRESQL_NAME), contextlib.closing(_open_postgresql(url)) as db:
        return _store_of(db)


def _open_sqlite(path: Path, locks: list[Lock] | None) -> Database:
    if sqlite3.sqlite_version_info < SQLITE_FLOOR:
        raise DatabaseRefused(str(path), "SQLite 3.37 or newer is needed")
    marker = install_marker(path)
    is_new = not path.exists()
    if is_new and marker.exists():
        raise DatabaseRefused(
            str(path), f"is gone, but {marker.name} says that it was here; restore a backup"
        )
    if is_new:
        _create_sqlite(path)
    if locks is not None:
        locks.append(DatabaseLock(path))
    check_header(path)
    if not marker.exists():
        durably_write(marker, MARKER_TEXT.encode())
    if reason := lost_commits(path):
        raise DatabaseRefused(str(path), reason)
    return connect_sqlite(path)


def _create_sqlite(path: Path) -> None:
    """Create the file under another name and rename it, so that a crash leaves no partial store."""
    new = path.with_name(path.name + ".new")
    for stale in (new, new.with_name(new.name + "-wal"), new.with_name(new.name + "-shm")):
        stale.unlink(missing_ok=True)
    new.touch(mode=0o600)
    with contextlib.closing(sqlite3.connect(new)) as made:
        # Set before the journal mode, which writes the first page. Later it would need a VACUUM.
        made.execute("PRAGMA auto_vacuum = INCREMENTAL")
        made.execute("PRAGMA journal_mode = WAL")
    db = connect_sqlite(new)
    try:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        migrate(db)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()
    new.rename(path)
    sync_directory(path.parent)
