"""Applies the steps in `migrations/` that a store lacks, and refuses a store that does not fit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.sqlite_header import APPLICATION_ID

log = structlog.get_logger()

MIGRATIONS: Final = Path(__file__).parent / "migrations"
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
    return missing


def demand_known(db: Database, known: dict[str, str]) -> dict[str, str]:
    """Return the name and checksum of every applied step.

    Raises:
        DatabaseRefused: a newer version used the store, a released step was edited since, or the
            record of a step is lost.
    """
    applied = _recorded_migrations(db)
    if reason := describe_misfit(applied, known, has_runs=db.peewee.table_exists("run")):
        raise DatabaseRefused(db.name, reason)
    return applied


def describe_misfit(
    applied: dict[str, str], known: dict[str, str], *, has_runs: bool
) -> str | None:
    """Return why the applied steps do not fit the known ones, None if they fit."""
    for name, checksum in applied.items():
        if name not in known:
            return f"was made by a newer version (step {name})"
        if checksum not in {known[name], ""}:
            return f"step {name} is not what was applied here"
    last = max(applied, default="")
    lost = next((name for name in known if name < last and name not in applied), None)
    if not applied and has_runs:
        lost = min(known)
    if lost is None:
        return None
    return f"has tables, but no record of the migration step {lost} that makes them: {RESTORE}"


def applied_migrations(db: Database) -> list[str]:
    """Return the names of the applied steps, in order."""
    return sorted(_recorded_migrations(db))


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
            db.execute("INSERT INTO migration_checksum VALUES (?, ?)", (name, known[name]))
            log.info("storage.migrated", step=name)


@contextlib.contextmanager
def _migration_lock(db: Database) -> Iterator[None]:
    """Run all steps and their records in one transaction, one migrating service at a time."""
    with db.transaction():
        if db.dialect.kind is DatabaseKind.POSTGRESQL:
            db.execute("SELECT pg_advisory_xact_lock(?)", (APPLICATION_ID,))
        yield
