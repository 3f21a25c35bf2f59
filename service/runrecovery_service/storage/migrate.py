"""Applies the steps in `migrations/` that a store lacks, and refuses a store that does not fit."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.sqlite_header import APPLICATION_ID

log = structlog.get_logger()

MIGRATIONS: Final = Path(__file__).parent / "migrations"
COMPATIBLE_SINCE: Final = re.compile(rb'^COMPATIBLE_SINCE: Final = "(\w+)"$', re.MULTILINE)
"""What a step declares: versions whose last step is this one, or a later one, can work with a store
that has the step, although they do not know it."""
HISTORY: Final = ("migration_checksum", "schema_migration")
"""The tables that record the applied steps."""
APPLIED_SQL: Final = (
    "SELECT m.name, COALESCE(c.checksum, '') FROM schema_migration m"
    " LEFT JOIN migration_checksum c ON c.name = m.name"
)
RESTORE: Final = "rows were lost, or another application made them; restore a backup"


def known_migrations() -> dict[str, str]:
    """Return the name and checksum of every migration of this version, in order."""
    files = sorted(MIGRATIONS.glob("[0-9]*.py"))
    return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def migrate(db: Database) -> list[str]:
    """Apply the missing steps and return their names.

    Raises:
        DatabaseRefused: see `demand_known`.
    """
    known = known_migrations()
    applied = demand_known(db, known)
    missing = [name for name in known if name not in applied]
    if missing:
        _apply_missing(db, known)
    if newer := sorted(applied.keys() - known.keys()):
        log.warning("storage.newer_version", steps=newer)
    return missing


def demand_known(db: Database, known: dict[str, str]) -> dict[str, str]:
    """Return the name and checksum of every applied step.

    Raises:
        DatabaseRefused: a newer version used the store, and its steps do not allow this version;
            a released step was edited since; or the record of a step is lost.
    """
    applied = _recorded_migrations(db)
    if reason := describe_misfit(applied, known, has_runs=db.peewee.table_exists("run")):
        raise DatabaseRefused(db.name, reason)
    return applied


def describe_misfit(
    applied: Mapping[str, str], known: Mapping[str, str], *, has_runs: bool
) -> str | None:
    """Return why the applied steps do not fit the known ones, None if they fit.

    Args:
        applied: for each step its checksum and, after a space, what it declares as
            `COMPATIBLE_SINCE`.
    """
    for name, recorded in applied.items():
        checksum, _, since = recorded.partition(" ")
        if name not in known:
            if since and since <= max(known):
                continue
            return f"was made by a newer version (step {name})"
        if checksum not in {known[name], ""}:
            return f"step {name} is not what was applied here"
    last = max(applied.keys() & known.keys(), default="")
    lost = next((name for name in known if name < last and name not in applied), None)
    if not applied and has_runs:
        lost = min(known)
    if lost is None:
        return None
    return f"has tables, but no record of the migration step {lost} that makes them: {RESTORE}"


def applied_migrations(db: Database) -> list[str]:
    """Return the names of the applied steps, in order."""
    return sorted(_recorded_migrations(db))


def is_newer(db: Database) -> bool:
    """Return True if a newer version has migrated the store, at its start or since."""
    known = {file.stem for file in MIGRATIONS.glob("[0-9]*.py")}
    return not _recorded_migrations(db).keys() <= known


def _recorded_migrations(db: Database) -> dict[str, str]:
    if not db.peewee.table_exists("migration_checksum"):
        return {}
    return dict(db.fetch_all(APPLIED_SQL))


def _apply_missing(db: Database, known: dict[str, str]) -> None:
    from playhouse.migrations import Runner  # noqa: PLC0415 - slow to import, seldom needed

    with _migration_lock(db):
        db.execute(
            "CREATE TABLE IF NOT EXISTS migration_checksum"
            " (name TEXT NOT NULL PRIMARY KEY, checksum TEXT NOT NULL)"
        )
        applied = Runner(db.peewee, directory=str(MIGRATIONS)).up()
        for name in applied:
            since = COMPATIBLE_SINCE.search((MIGRATIONS / f"{name}.py").read_bytes())
            recorded = known[name] if since is None else f"{known[name]} {since[1].decode()}"
            db.execute("INSERT INTO migration_checksum VALUES (?, ?)", (name, recorded))
            log.info("storage.migrated", step=name)


@contextlib.contextmanager
def _migration_lock(db: Database) -> Iterator[None]:
    """Run all steps and their records in one transaction, one migrating service at a time."""
    with db.transaction():
        if db.dialect.kind is DatabaseKind.POSTGRESQL:
            db.execute("SELECT pg_advisory_xact_lock(?)", (APPLICATION_ID,))
        yield
