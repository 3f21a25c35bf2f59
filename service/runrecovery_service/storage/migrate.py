"""Applies the steps in `migrations/` that a store lacks, and refuses a store that does not fit."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.sqlite_header import APPLICATION_ID

log = structlog.get_logger()

MIGRATIONS: Final = Path(__file__).parent / "migrations"
NEW_SQLITE_STORE: Final = MIGRATIONS / "new_sqlite_store.sql"
"""SQL that creates all tables in an empty SQLite file at once. Its first line names the last
migration step that it replaces. Without it, each new step would make a first start slower. `make
schema` writes the file."""
COMPATIBLE_SINCE: Final = re.compile(rb'^COMPATIBLE_SINCE: Final = "(\w+)"$', re.MULTILINE)
"""Matches the line with which a step names an earlier step. Versions that know the named step can
work with a store that has this step, even if they do not know this step."""
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
        DatabaseRefused: the store does not fit this version; see `demand_known`.
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
    """Return the name and checksum of every applied step, if they fit this version.

    Raises:
        DatabaseRefused: a newer version has migrated the store, and its steps exclude this version;
            or a released step was edited after it was applied; or the record of a step is lost.
    """
    applied = _recorded_migrations(db)
    if reason := describe_misfit(applied, known, has_runs=db.peewee.table_exists("run")):
        raise DatabaseRefused(db.name, reason)
    return applied


def describe_misfit(
    applied: Mapping[str, str], known: Mapping[str, str], *, has_runs: bool
) -> str | None:
    """Return why the applied steps do not fit the known steps; None if they fit.

    Args:
        applied: by step: its checksum and, after a space, the step that it declares as
            `COMPATIBLE_SINCE`, if any.
    """
    for name, recorded in applied.items():
        checksum, _, since = recorded.partition(" ")
        if name not in known:
            if since and since <= max(known):
                continue
            return f"was made by a newer version (step {name})"
        if checksum not in {known[name], ""}:
            return f"step {name} has changed since it was applied here"
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
    """Return whether a newer version has migrated the store, before or after this start."""
    known = {file.stem for file in MIGRATIONS.glob("[0-9]*.py")}
    return not _recorded_migrations(db).keys() <= known


def _recorded_migrations(db: Database) -> dict[str, str]:
    if not db.peewee.table_exists("migration_checksum"):
        return {}
    return dict(db.fetch_all(APPLIED_SQL))


def _apply_missing(db: Database, known: dict[str, str]) -> None:
    with _migration_lock(db):
        is_empty = db.dialect.kind is DatabaseKind.SQLITE and not db.peewee.get_tables()
        db.execute(
            "CREATE TABLE IF NOT EXISTS migration_checksum"
            " (name TEXT NOT NULL PRIMARY KEY, checksum TEXT NOT NULL)"
        )
        applied = _create_at_once(db, list(known)) if is_empty else []
        if len(applied) < len(known):
            applied += _apply_steps(db)
        for name in applied:
            since = COMPATIBLE_SINCE.search((MIGRATIONS / f"{name}.py").read_bytes())
            recorded = known[name] if since is None else f"{known[name]} {since[1].decode()}"
            db.execute("INSERT INTO migration_checksum VALUES (?, ?)", (name, recorded))
            log.info("storage.migrated", step=name)


def _create_at_once(db: Database, known: Sequence[str]) -> list[str]:
    """Create all tables in an empty SQLite file, and return the names of the replaced steps."""
    first_line, _, script = NEW_SQLITE_STORE.read_text(encoding="utf-8").partition("\n")
    last = first_line.split()[-1]
    if last not in known:
        return []
    for statement in script.split(";\n")[:-1]:
        db.execute(statement)
    saved = [name for name in known if name <= last]
    now = str(datetime.now(UTC).replace(tzinfo=None))
    for name in saved:
        db.execute("INSERT INTO schema_migration (name, applied) VALUES (?, ?)", (name, now))
    return saved


def _apply_steps(db: Database) -> list[str]:
    from playhouse.migrations import Runner  # noqa: PLC0415 - slow to import, seldom needed

    applied: list[str] = Runner(db.peewee, directory=str(MIGRATIONS)).up()
    return applied


@contextlib.contextmanager
def _migration_lock(db: Database) -> Iterator[None]:
    """Open a transaction for all steps, which only one service at a time can have."""
    with db.transaction():
        if db.dialect.kind is DatabaseKind.POSTGRESQL:
            db.execute("SELECT pg_advisory_xact_lock(?)", (APPLICATION_ID,))
        yield
