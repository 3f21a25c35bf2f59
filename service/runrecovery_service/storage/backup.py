"""Copies of a SQLite store: the backup, and the rescue of a store whose files were removed."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.domain.start_errors import BackupRefused, DatabaseRefused
from runrecovery_service.storage import commit_count
from runrecovery_service.storage.commit_count import CommitMarker
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import fault_of, is_damage
from runrecovery_service.storage.integrity import integrity_problems
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sqlite_file import install_marker, lost_commits
from runrecovery_service.storage.sqlite_header import check_header

log = structlog.get_logger()

_COMPANIONS: Final = ("-wal", "-shm", "-journal")
"""The suffixes of the files that SQLite keeps next to a database file."""


def backup_sqlite(path: Path, destination: Path) -> dict[str, int]:
    """Copy a SQLite store and check the copy. A service may use the store meanwhile.

    The check: the copy is not damaged, has every row, and has every commit that was acknowledged
    before.

    Returns:
        The number of runs in the copy, by instance.

    Raises:
        DatabaseRefused: there is no such store, or the copy failed the check and was removed.
        BackupRefused: a file with the destination's name exists.
    """
    if not path.exists():
        raise DatabaseRefused(str(path), "does not exist")
    with refusing(str(path)):
        check_header(path)
        if reason := lost_commits(path):  # checked first, because a connection may change the log
            raise DatabaseRefused(str(path), reason)
    _make_backup_file(destination, path)
    try:
        rows = _copy_and_prove(path, destination)
    except (OSError, sqlite3.Error) as error:
        destination.unlink(missing_ok=True)
        if (fault := fault_of(error)) and is_damage(error):  # the destination was empty
            raise DatabaseRefused(str(path), fault.refusal(str(error))) from error
        raise DatabaseRefused(str(destination), f"could not be written: {error}") from error
    except BaseException:
        destination.unlink(missing_ok=True)
        raise
    return {name: count for (table, name), count in sorted(rows.items()) if table == "run"}


def run_keys(path: Path) -> list[int]:
    """Return the key of every run of a SQLite store, in order."""
    with refusing(str(path)), contextlib.closing(sqlite3.connect(path)) as store:
        return [key for (key,) in store.execute("SELECT id FROM run ORDER BY id")]


def waiting_runs(path: Path) -> dict[int, tuple[str, int]]:
    """Return by key the run_id and version of runs that wait without a process.

    While such a run keeps its version, the service does not change its files.
    """
    waiting = "SELECT id, run_id, version FROM run WHERE status = ? AND profile = ?"
    words = (RunStatus.WAITING_USER.value, Profile.RESUMABLE.value)
    with refusing(str(path)), contextlib.closing(sqlite3.connect(path)) as store:
        return {key: (run_id, version) for key, run_id, version in store.execute(waiting, words)}


def _copy_and_prove(path: Path, destination: Path) -> dict[tuple[str, str], int]:
    marker = install_marker(path)
    acknowledged = CommitMarker(marker).read()
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(destination)) as copy,
    ):
        with refusing(str(path)):
            source.execute("BEGIN")  # one snapshot for the check and for the copy
            if reason := commit_count.describe_loss(acknowledged, source, marker):
                raise DatabaseRefused(str(path), reason)
            wanted = _row_counts(source)
        _copy_pages(source, copy)
        source.rollback()
        found = _row_counts(copy)
    for table, instance in wanted.keys() | found.keys():
        pair = wanted.get((table, instance), 0), found.get((table, instance), 0)
        if pair[0] != pair[1]:
            which = f"{table}, instance {instance!r}" if instance else table
            reason = f"has {pair[1]} rows, not {pair[0]} ({which})"
            raise DatabaseRefused(str(destination), reason)
    if problems := integrity_problems(destination):
        # The copy has the pages of the source, and therefore the damage in those pages.
        damaged = path if integrity_problems(path) else destination
        raise DatabaseRefused(str(damaged), problems[0].removeprefix(f"{destination}: "))
    return found


def _copy_pages(source: sqlite3.Connection, copy: sqlite3.Connection) -> None:
    source.backup(copy)


def _row_counts(connection: sqlite3.Connection) -> dict[tuple[str, str], int]:
    """Return the number of rows by table and, for runs, by instance."""
    tables = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
    counts: dict[tuple[str, str], int] = {}
    for (table,) in connection.execute(tables).fetchall():
        instance = "owner" if table == "run" else "''"
        by_instance = f'SELECT {instance}, count(*) FROM "{table}" GROUP BY 1'
        for name, count in connection.execute(by_instance):
            counts[table, name] = count
    return counts


def _make_backup_file(destination: Path, path: Path) -> None:
    """Create the empty file for the copy. Refuse a name that exists, even as a dangling link."""
    companions = [f"{name}{suffix}" for name in (destination, path) for suffix in _COMPANIONS]
    if destination.absolute() in map(Path.absolute, map(Path, companions)):
        raise BackupRefused(str(destination), "is a name that SQLite uses next to the database")
    for name in (str(destination), *companions[: len(_COMPANIONS)]):
        if os.path.lexists(name):
            raise BackupRefused(name, "exists; a backup overwrites nothing")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        os.close(os.open(destination, flags, 0o600))
    except FileExistsError as error:
        raise BackupRefused(str(destination), "exists; a backup overwrites nothing") from error
    except OSError as error:
        reason = f"could not be written: {error.strerror}"
        raise DatabaseRefused(str(destination), reason) from error


def rescue(db: Database) -> Path | None:
    """Copy a SQLite store of which a file was removed, and return the path of the copy.

    The calling thread's connection, opened before the loss, can still read the removed file. Return
    None if the copy is damaged or cannot be written. A store with an overwritten file is not
    copied: the connection reads the damage too, and even an undamaged copy might lack rows.
    """
    if not db.can_be_rescued:
        return None
    path = Path(f"{db.name}.rescued-{secrets.token_hex(4)}")
    try:
        path.touch(mode=0o600, exist_ok=False)
        with contextlib.closing(sqlite3.connect(path)) as copy:
            db.peewee.connection().backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # leaves one file only
        problems = integrity_problems(path)
    except (OSError, sqlite3.Error) as error:
        problems = [str(error)]
    if problems:
        log.error("storage.not_rescued", problem=problems[0])
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None if problems else path
