"""The locks that a service holds until it ends: on its data directory and on a SQLite file."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service import paths
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import DatabaseRefused, DataDirRefused
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.file_locks import Lock, LockFile
from runrecovery_service.storage.sqlite_file import path_lock, sqlite_path

log = structlog.get_logger()

LOCK_NAME: Final = "lock"


def prepare_data_dir(settings: Settings) -> Path:
    """Return the absolute path of the data directory; create it, and `runs_dir` if that is set.

    Raises:
        DataDirRefused: the directory cannot be created or written to.
        DatabaseRefused: the configured path cannot have a SQLite store.
    """
    data_dir = paths.absolute(settings.data_dir)
    _demand_usable(data_dir)
    database = sqlite_file(settings, data_dir)
    if database is not None and (reason := paths.database_problem(database, data_dir)):
        raise DatabaseRefused(paths.shown(database), reason)
    for place in (data_dir, *([runs_dir(settings, data_dir)] if settings.runs_dir else [])):
        _make(place)
        if others := paths.others_who_may_write(place):
            log.warning("service.data_dir_shared", place=str(place), writable_by=others)
    return data_dir


def _demand_usable(place: Path) -> None:
    if reason := paths.directory_problem(place):
        raise DataDirRefused(paths.shown(place), reason)


def _make(place: Path) -> None:
    _demand_usable(place)
    try:
        paths.make_directory(place)
    except OSError as error:
        raise DataDirRefused(str(place), error.strerror or "cannot be created") from error


def runs_dir(settings: Settings, data_dir: Path) -> Path:
    """Return the absolute path of the folder with the folders of the runs.

    Raises:
        DataDirRefused: the path is relative, and the working directory was removed.
    """
    if not settings.runs_dir:
        return data_dir / "runs"
    return paths.absolute(Path(settings.runs_dir))


def sqlite_file(settings: Settings, data_dir: Path) -> Path | None:
    """Return the absolute path of the SQLite file; None with PostgreSQL.

    Raises:
        DataDirRefused: the path is relative, and the working directory was removed.
    """
    path = sqlite_path(settings.database, data_dir)
    return None if path is None else paths.absolute(path)


@dataclass(frozen=True, slots=True)
class ServiceLocks:
    """The locks on the data directory, on the path of a SQLite file, and on that file itself.

    `acquire` takes the first two. `open_database` appends the third to `locks`.
    """

    data_dir: Path
    locks: list[Lock]

    @classmethod
    def acquire(cls, settings: Settings) -> ServiceLocks:
        """Acquire the locks on the data directory and on the path of a SQLite file.

        Raises:
            DataDirRefused, DatabaseRefused: see `prepare_data_dir`; or a lock cannot be created.
            Held: another service holds a lock; the error names that service.
        """
        data_dir = prepare_data_dir(settings)
        holder = f"instance {settings.instance!r}, pid {os.getpid()}, on {settings.listen}"
        with ExitStack() as acquired:
            service_locks = acquired.enter_context(cls(data_dir, []))
            wanted = [(data_dir / LOCK_NAME, f"data directory {data_dir}")]
            if (database := sqlite_file(settings, data_dir)) is not None:
                wanted.append((path_lock(database), f"database {database}"))
            for path, what in wanted:
                try:
                    service_locks.locks.append(LockFile(path, what, holder))
                except OSError as error:
                    reason = error.strerror or "cannot be created"
                    raise DataDirRefused(str(path), reason) from error
            acquired.pop_all()
        return service_locks

    def demand_in_place(self) -> None:
        """Raise DataDirRefused if another service could take one of the locks now."""
        for lock in self.locks:
            lock.demand_in_place()

    def __enter__(self) -> ServiceLocks:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self.locks):
            lock.release()
