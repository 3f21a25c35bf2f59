"""The locks that a service holds for life: of its data directory and of a SQLite file."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service import paths
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import DatabaseRefused, DataDirRefused
from runrecovery_service.storage.file_locks import Lock, LockFile
from runrecovery_service.storage.sqlite_file import path_lock, sqlite_path

log = structlog.get_logger()

LOCK_NAME: Final = "lock"


def prepare_data_dir(settings: Settings) -> Path:
    """Make the data directory, if there is none, and return its absolute path.

    Raises:
        DataDirRefused: it cannot be made or written to.
        DatabaseRefused: there can be no SQLite store where the configuration wants it.
    """
    data_dir = paths.absolute(settings.data_dir)
    if reason := paths.directory_problem(data_dir):
        raise DataDirRefused(paths.shown(data_dir), reason)
    database = sqlite_file(settings, data_dir)
    if database is not None and (reason := paths.database_problem(database, data_dir)):
        raise DatabaseRefused(paths.shown(database), reason)
    try:
        paths.make_directory(data_dir)
    except OSError as error:
        raise DataDirRefused(str(data_dir), error.strerror or "cannot be made") from error
    if others := paths.others_who_may_write(data_dir):
        log.warning("service.data_dir_shared", place=str(data_dir), writable_by=others)
    return data_dir


def sqlite_file(settings: Settings, data_dir: Path) -> Path | None:
    """Return the absolute path of the SQLite file, None with PostgreSQL.

    Raises:
        DataDirRefused: it is relative, and the working directory was removed.
    """
    path = sqlite_path(settings.database, data_dir)
    return None if path is None else paths.absolute(path)


@dataclass(frozen=True, slots=True)
class Holdings:
    """The locks that a service holds for life: of its data directory, of the path of a SQLite
    file, and, once `open_database` has it, of that file."""

    data_dir: Path
    locks: list[Lock]

    @classmethod
    def take(cls, settings: Settings) -> Holdings:
        """Take them.

        Raises:
            DataDirRefused, DatabaseRefused: as `prepare_data_dir`; or a lock cannot be made.
            Held: another service has them; it is named.
        """
        data_dir = prepare_data_dir(settings)
        holder = f"instance {settings.instance!r}, pid {os.getpid()}, on {settings.listen}"
        with ExitStack() as taken:
            held = taken.enter_context(cls(data_dir, []))
            wanted = [(data_dir / LOCK_NAME, f"data directory {data_dir}")]
            if (database := sqlite_file(settings, data_dir)) is not None:
                wanted.append((path_lock(database), f"database {database}"))
            for path, what in wanted:
                try:
                    held.locks.append(LockFile(path, what, holder))
                except OSError as error:
                    reason = error.strerror or "cannot be made"
                    raise DataDirRefused(str(path), reason) from error
            taken.pop_all()
        return held

    def demand_in_place(self) -> None:
        """Raise DataDirRefused if another service could take one of the locks now."""
        for lock in self.locks:
            lock.demand_in_place()

    def __enter__(self) -> Holdings:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self.locks):
            lock.release()
