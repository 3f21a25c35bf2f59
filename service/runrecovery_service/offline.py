"""Commands that need no server: check the settings, migrate the store, back it up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from runrecovery_service import paths
from runrecovery_service.agents.trust_keeper import trust_problem
from runrecovery_service.config.settings import ContainmentPolicy, Settings
from runrecovery_service.config.values import is_loopback
from runrecovery_service.data_dir_store import foreign_folders
from runrecovery_service.domain.start_errors import (
    CgroupRefused,
    DatabaseRefused,
    DataDirRefused,
    OpenFilesRefused,
)
from runrecovery_service.extras import missing_packages
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.locks import ServiceLocks, runs_dir, sqlite_file
from runrecovery_service.machine_limits import open_cgroup_parent, plan_open_files
from runrecovery_service.process.agent_command import launch_problem
from runrecovery_service.process.probe import prove_containment
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.runs_backup import RunsCopy, runs_copy_of
from runrecovery_service.setup.access import access_problems
from runrecovery_service.setup.engines import environment_of
from runrecovery_service.setup.webhooks import webhook_problems
from runrecovery_service.storage.backup import backup_sqlite, run_keys, waiting_runs
from runrecovery_service.storage.integrity import integrity_problems
from runrecovery_service.storage.migrate import applied_migrations
from runrecovery_service.storage.opening import (
    open_database,
    postgresql_problems,
    postgresql_store_id,
)
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sqlite_file import install_marker
from runrecovery_service.storage.store_identity import sqlite_store_id


def migrate(settings: Settings) -> list[str]:
    """Migrate the store of a stopped service, as a start does.

    Returns:
        The names of all migrations that the store has now.

    Raises:
        StartRefused: another process holds the store, or the store cannot be opened.
    """
    path = sqlite_file(settings, paths.absolute(settings.data_dir))
    if path is not None and not os.path.lexists(path):
        raise DatabaseRefused(paths.shown(path), "does not exist; a first start creates it")
    with ServiceLocks.acquire(settings) as locks:
        db = open_database(settings.database, locks.data_dir, locks=locks.locks)
        try:
            with refusing(db.name):
                return applied_migrations(db)
        finally:
            db.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """The content of a finished backup.

    Attributes:
        runs: the number of runs in the copy, by instance.
        folders: how many runs have a folder in the copy; None: the backup is without folders.
        size: the total bytes of the files in these folders.
        waiting: how many resumable runs wait for a reply in the copy.
        changed: the run_ids of waiting runs whose folder may be newer or older than the copied
            database.
    """

    runs: Mapping[str, int]
    folders: int | None = None
    size: int = 0
    waiting: int = 0
    changed: tuple[str, ...] = ()


def backup(settings: Settings, destination: Path, *, with_runs: bool = False) -> Backup:
    """Copy the SQLite store of a running or stopped service, and check the copy.

    Args:
        with_runs: also copy the folders of the runs in the copied database.

    Raises:
        DatabaseRefused: the store is not SQLite, does not exist, or its copy is damaged.
        BackupRefused: a file or folder with the name of the backup exists.
        DataDirRefused: a file of a run could not be copied. The incomplete backup is removed.
    """
    data_dir = paths.absolute(settings.data_dir)
    path = sqlite_file(settings, data_dir)
    if path is None:
        raise DatabaseRefused(
            "PostgreSQL", "this command copies SQLite only; use PostgreSQL's own tools (pg_dump)"
        )
    if not with_runs:
        return Backup(runs=backup_sqlite(path, destination))
    copy = RunsCopy(runs_dir(settings, data_dir), runs_copy_of(destination))
    copy.begin()
    try:
        runs = backup_sqlite(path, destination)
        try:
            copy.copy(run_keys(destination))
            in_copy, now = waiting_runs(destination), waiting_runs(path)
        except BaseException:
            destination.unlink()
            raise
    except BaseException:
        copy.undo()
        raise
    changed = [run[0] for key, run in in_copy.items() if now.get(key) != run or key in copy.changed]
    return Backup(
        runs=runs,
        folders=copy.folders,
        size=copy.size,
        waiting=len(in_copy),
        changed=tuple(changed),
    )


def check(settings: Settings) -> list[str]:
    """Return every problem that a start would have, one sentence each.

    A configured cgroup is created if only its parent exists. Nothing else is changed.
    """
    problems = [
        f"engine {name!r}: {reason}"
        for name, engine in settings.engines.items()
        if (reason := launch_problem(engine.command, env_allow=engine.env_allow)) is not None
    ]
    problems += _trust_problems(settings)
    problems += _containment_problems(settings)
    problems += _open_files_problems(settings)
    problems += access_problems(settings)
    problems += webhook_problems(settings)
    problems += missing_packages(settings)
    problems += _store_problems(settings)
    return problems


def check_notes(settings: Settings) -> list[str]:
    """Return every warning that does not prevent a start, one sentence each."""
    return [*_data_dir_notes(settings), *_metrics_notes(settings)]


def _data_dir_notes(settings: Settings) -> list[str]:
    notes = []
    runs = [Path(settings.runs_dir)] if settings.runs_dir else []
    for configured in (settings.data_dir, *runs):
        # `check` reports a problem, or the directory does not exist yet.
        with suppress(DataDirRefused, OSError):
            place = paths.absolute(configured)
            if others := paths.others_who_may_write(place):
                notes.append(f"{place}: may also be changed by {others}")
    return notes


def _metrics_notes(settings: Settings) -> list[str]:
    if not settings.metrics_listen or is_loopback(settings.metrics_listen):
        return []
    place = f"metrics_listen = {settings.metrics_listen}"
    return [f"{place}: anyone who connects can read the names of engines, and the load of each"]


def _open_files_problems(settings: Settings) -> list[str]:
    try:
        plan_open_files(settings)
    except OpenFilesRefused as error:
        return [str(error)]
    return []


def _store_problems(settings: Settings) -> list[str]:
    try:
        data_dir = paths.absolute(settings.data_dir)
        path, runs = sqlite_file(settings, data_dir), runs_dir(settings, data_dir)
    except DataDirRefused as error:
        return [str(error)]
    problems = [
        f"{paths.shown(place)}: {reason}"
        for place in (data_dir, *([runs] if settings.runs_dir else []))
        if (reason := paths.directory_problem(place))
    ]
    if path is None:
        problems += _postgresql_problems(settings, runs)
    elif problems and path.parent == data_dir:
        pass  # the file cannot be checked without its directory
    elif reason := paths.database_problem(path, data_dir):
        problems.append(f"{paths.shown(path)}: {reason}")
    elif path.exists():
        damaged = integrity_problems(path)
        problems += damaged
        if not damaged and (reason := foreign_folders(sqlite_store_id(path), runs)):
            problems.append(reason)
    elif install_marker(path).exists():
        problems.append(f"{path}: is gone; restore a backup")
    elif reason := foreign_folders(None, runs):
        problems.append(reason)
    return problems


def _postgresql_problems(settings: Settings, runs: Path) -> list[str]:
    if problems := postgresql_problems(settings.database, settings.database_direct):
        return problems
    reason = foreign_folders(postgresql_store_id(settings.database), runs)
    return [] if reason is None else [reason]


def _trust_problems(settings: Settings) -> list[str]:
    return [
        f"engine {name!r}: {reason}"
        for name, engine in settings.engines.items()
        if engine.trust is not None
        and (reason := trust_problem(engine.trust, environment_of(engine))) is not None
    ]


def _containment_problems(settings: Settings) -> list[str]:
    problems = []
    try:
        open_cgroup_parent(settings)
    except CgroupRefused as error:
        problems.append(str(error))
    if settings.containment is ContainmentPolicy.STRICT:
        proved = prove_containment(watermark_bits())
        if not proved.level.is_strict:
            problems.append(
                f'containment = "strict", but {proved.level} is proved: {proved.detail}'
            )
    return problems
