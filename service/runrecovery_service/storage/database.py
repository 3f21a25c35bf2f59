"""Opens a store: which database it is, whether it is ours, the settings that keep it durable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

import peewee as pw
import structlog

from runrecovery_service.domain.errors import (
    BackupRefused,
    DatabaseOutOfReach,
    DatabaseRefused,
    StorageUnavailable,
    StoreLost,
)
from runrecovery_service.storage import commit_count, postgresql, soundness, tables
from runrecovery_service.storage.commit_count import MARKER_TEXT, CommitMarker
from runrecovery_service.storage.faults import (
    DRIVER_ERRORS,
    MENDING,
    UNREACHABLE,
    chain,
    fault_of,
    is_damage,
    words_of,
)
from runrecovery_service.storage.locks import (
    APPLICATION_ID,
    SQLITE_HEADER_SIZE,
    SQLITE_MAGIC,
    DatabaseLock,
    Lock,
    StoreFiles,
)

log = structlog.get_logger()

MIGRATIONS: Final = Path(__file__).parent / "migrations"

# Measured (docs/operations.md): synchronous=NORMAL loses acknowledged commits in a power cut;
# deferred transactions fail with "database is locked" in spite of the timeout.
SQLITE_PRAGMAS: Final = {
    "journal_mode": "wal",
    "synchronous": 2,  # FULL
    "foreign_keys": 1,
    "busy_timeout": 5000,
    "trusted_schema": 0,
    "cell_size_check": 1,
}
FILES_LOST: Final = (
    "a file of the database was removed, replaced or overwritten; the service is stopping"
)
FILES_UNSEEN: Final = "the system does not tell whether the files of the database are in place"
NO_TABLES: Final = "has none of the service's tables; restore a backup"
HISTORY: Final = ("migration_checksum", "schema_migration")
TABLES: Final = tuple(table._meta.table_name for table in tables.EVERY)  # noqa: SLF001 - peewee has no other way
"""What the service reads and writes, without the records of the migrations."""
SQLITE_FLOOR: Final = (3, 37, 0)  # STRICT tables

_COMPANIONS: Final = ("-wal", "-shm", "-journal")
"""What SQLite appends to a file's name for files that belong to it."""

Row = tuple[Any, ...]  # a row is whatever the columns hold; it is typed where it is decoded
T = TypeVar("T")

CONFLICT_TRIES: Final = 6
CONFLICT_PAUSE_S: Final = 0.01


class Stale(Exception):
    """Another writer was quicker between our read and our write; start the use case over."""


class Kind(StrEnum):
    """The databases that a store can live in."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What differs between the databases in the SQL that we write by hand."""

    kind: Kind
    param: str
    now_us: str
    """Microseconds UTC by the database's clock; not frozen at the start of a transaction."""

    def is_json(self, expression: str) -> str:
        """Return a condition that is true when a text column can be parsed as JSON."""
        if self.kind is Kind.SQLITE:
            return f"json_valid({expression})"
        return f"({expression}) IS JSON"


SQLITE: Final = Dialect(
    kind=Kind.SQLITE,
    param="?",
    now_us="CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)",
)
POSTGRESQL: Final = Dialect(
    kind=Kind.POSTGRESQL,
    param="%s",
    now_us="CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)",
)


POSTGRESQL_PLACE: Final = "the PostgreSQL database"


class _Touched(threading.local):
    """Keys of runs, by thread."""

    def __init__(self) -> None:
        self.keys: set[int] = set()


class _Undone(threading.local):
    """How many changes of rows were rolled back to a savepoint, by thread."""

    rows = 0


class Database:
    """An open store. Each thread that uses it gets a connection of its own."""

    def __init__(
        self, peewee: pw.Database, dialect: Dialect, place: str, *, file: Path | None = None
    ) -> None:
        self.peewee = peewee
        self.dialect = dialect
        self.place = place
        self._file = file
        self._files: StoreFiles | None = None
        self._keeper: int | None = None
        self._commits: CommitMarker | None = None
        self._touched = _Touched()
        self._undone = _Undone()
        self._guard: Callable[[Database], object] | None = None

    def guard(self, demand: Callable[[Database], object]) -> None:
        """Begin every transaction from now on with a check; what the check raises ends it."""
        self._guard = demand

    def touch(self, run_key: int) -> None:
        """Note, for whoever watches it, that the calling thread's transaction changes a run."""
        self._touched.keys.add(run_key)

    def take_touched(self) -> frozenset[int]:
        """Return, and forget, what the calling thread has noted since it was last asked."""
        keys, self._touched.keys = frozenset(self._touched.keys), set()
        return keys

    def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
        """Run SQL written with `?` for parameters and return the driver's cursor."""
        if self.dialect.param != "?":
            sql = sql.replace("?", self.dialect.param)
        return self.peewee.execute_sql(sql, params)

    def fetch_one(self, sql: str, params: Sequence[object] = ()) -> Row | None:
        """Return the first row, or None."""
        row: Row | None = self.execute(sql, params).fetchone()
        return row

    def fetch_all(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Return all rows."""
        rows: list[Row] = self.execute(sql, params).fetchall()
        return rows

    def transaction(self) -> contextlib.AbstractContextManager[object]:
        """One transaction, which begins with the guard's check; inside another one a savepoint."""
        return self._savepoint() if self.peewee.in_transaction() else self._guarded()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        self.demand_files()
        with self.peewee.transaction() as transaction:
            before, undone = self._changes(), self._undone.rows
            if self._guard is not None:
                self._guard(self)
            yield
            count = self._count_commit() if self._changes() != before else None
            if count is None and self._undone.rows != undone:
                # SQLite would write, and sync, the pages that were changed and changed back.
                transaction.rollback()
        self.demand_files()
        if count is not None and self._commits is not None:
            self._commits.write(count)

    def count_commits(self, marker: Path) -> None:
        """Count commits from now on, in the SQLite store and beside it."""
        commits, count = CommitMarker(marker), commit_count.stored(self.peewee.connection())
        if count is None:
            return
        if commits.read() is None:
            _durably_write(marker, commits.first_text(count))
        self._commits = commits

    def _changes(self) -> int:
        """Return how many rows this thread's connection has changed so far, but for what it has
        undone, if that matters."""
        if self._commits is None:
            return 0
        return int(self.peewee.connection().total_changes) - self._undone.rows

    def _count_commit(self) -> int | None:
        counted = "UPDATE commit_count SET commits = commits + 1 RETURNING commits"
        rows = self.peewee.execute_sql(counted).fetchall()
        return int(rows[0][0]) if rows else None

    def snapshot(self) -> contextlib.AbstractContextManager[object]:
        """A transaction that only reads, and sees one state of the store throughout."""
        if self.dialect.kind is Kind.SQLITE:
            deferred: contextlib.AbstractContextManager[object] = self.peewee.transaction(
                "DEFERRED"
            )
            return deferred
        return self._repeatable_read()

    @contextlib.contextmanager
    def _repeatable_read(self) -> Iterator[None]:
        with self.peewee.transaction():
            self.peewee.execute_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield

    @contextlib.contextmanager
    def _savepoint(self) -> Iterator[None]:
        # Always by one name, which may nest: with a new one each time, as peewee does it, the
        # driver would have to prepare it each time, and forget a statement of ours for it.
        self.peewee.execute_sql("SAVEPOINT inner_step")
        before = self._changes()
        try:
            yield
        except BaseException:
            self.peewee.execute_sql("ROLLBACK TO SAVEPOINT inner_step")
            self._undone.rows += self._changes() - before
            raise
        finally:
            self.peewee.execute_sql("RELEASE SAVEPOINT inner_step")

    def keep_files(self) -> None:
        """Demand from now on that the files of a SQLite store stay where, and what, they are.

        Every transaction is preceded and followed by a look at them, so that nothing is answered
        for that was written into a removed log. The calling thread's connection must stay open
        until all others are closed.
        """
        if self._file is not None:
            # After a crash the index tells how far the file was written only once a checkpoint has
            # copied the log; until then the watch would know little of the file.
            with contextlib.suppress(*DRIVER_ERRORS):
                self.fetch_all("PRAGMA wal_checkpoint(PASSIVE)")
            self._files, self._keeper = StoreFiles(self._file), threading.get_ident()

    def demand_in_place(self) -> None:
        """Refuse to go on with a SQLite store of which a file was lost or damaged.

        Raises:
            StoreLost: it is named.
            OSError: the system does not tell.
        """
        lost = self._files and self._files.lost()
        if lost:
            raise StoreLost(self.place, f"{lost} under the running service")

    def demand_files(self) -> None:
        """Raise StorageUnavailable, for a caller of a method, where `demand_in_place` raises."""
        try:
            self.demand_in_place()
        except StoreLost as error:
            raise StorageUnavailable(FILES_LOST) from error
        except OSError as error:
            raise StorageUnavailable(FILES_UNSEEN) from error

    def read_leniently(self) -> None:
        """Read text that is not UTF-8 as far as it is, on the calling thread's connection.

        One such column would fail a whole query, with what it holds in the driver's error. Not
        the default, since it doubles the time of a row.
        """
        if self.dialect.kind is Kind.SQLITE:
            self.peewee.connection().text_factory = _lenient_text

    def abandon(self) -> None:
        """Cut off every connection to PostgreSQL, and open none any more. From any thread."""
        if isinstance(self.peewee, postgresql.PostgreSQL):
            self.peewee.abandon()

    def close(self) -> None:
        """Close the calling thread's connection.

        A store of which a file is lost stays open: the last connection to be closed would write
        the lost log into whatever file is there now.
        """
        with contextlib.suppress(OSError):
            if self._files is not None and self._files.lost() is not None:
                return
        self.peewee.close()
        if self._files is not None and self._keeper == threading.get_ident():
            self._files.close()
            self._files = None

    def rescue(self) -> Path | None:
        """Copy a SQLite store of which a file is lost, as the calling thread's connection, which
        must be from before, still sees it. Return the sound copy, if one could be made.

        There is none of files that were overwritten: the connection sees the damage as well, and a
        copy may be sound and lack rows all the same.
        """
        if self._files is not None and not self._files.can_be_rescued:
            return None
        path = Path(f"{self.place}.rescued-{secrets.token_hex(4)}")
        try:
            path.touch(mode=0o600, exist_ok=False)
            with contextlib.closing(sqlite3.connect(path)) as copy:
                self.peewee.connection().backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # leaves one file only
            problems = integrity_problems(path)
        except (OSError, sqlite3.Error) as error:
            problems = [str(error)]
        if problems:
            log.error("storage.not_rescued", problem=problems[0])
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return None if problems else path


def _lenient_text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def is_undecodable(error: Exception) -> bool:
    """True when a query failed over text that is not UTF-8; see `Database.read_leniently`."""
    return isinstance(error, sqlite3.OperationalError) and "decode" in str(error)


class Statement:
    """A peewee query that is compiled once per kind of database, its values left open.

    Building a peewee query costs ~230 µs, running its compiled SQL 17 µs.
    Values are left open by `slot("name")` and given to `run` by name.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._compiled: dict[Kind, tuple[str, tuple[object, ...]]] = {}

    def run(self, db: Database, **values: object) -> Any:
        """Execute with these values and return the driver's cursor."""
        compiled = self._compiled.get(db.dialect.kind)
        if compiled is None:
            sql, params = db.peewee.get_sql_context().parse(self._build())
            compiled = self._compiled[db.dialect.kind] = (sql, tuple(params))
        sql, params = compiled
        return db.peewee.execute_sql(
            sql, [values[p.name] if type(p) is _Slot else p for p in params]
        )


@dataclass(frozen=True, slots=True)
class _Slot:
    name: str


def slot(name: str) -> pw.Value:
    """A value of a `Statement` that is given when it runs."""
    return pw.Value(_Slot(name), converter=False)


# -- errors ------------------------------------------------------------------------------------


def repeated(use: Callable[[], T]) -> T:
    """Return what a whole transaction returns; repeat it, a few times, when PostgreSQL rolled it
    back over a conflict with another one."""
    for tries_left in reversed(range(CONFLICT_TRIES)):
        try:
            return use()
        except DRIVER_ERRORS as error:
            if not tries_left or not any(map(postgresql.is_conflict, chain(error))):
                raise
        time.sleep(random.uniform(0, CONFLICT_PAUSE_S * 2 ** (CONFLICT_TRIES - tries_left)))  # noqa: S311 - no secret
    raise AssertionError


# -- opening -----------------------------------------------------------------------------------


def sqlite_path(url: str, data_dir: Path) -> Path | None:
    """Return the file that `database` names, or None when it names a PostgreSQL database.

    Symbolic links are followed: SQLite keeps the log beside the file that they lead to, and so
    must what belongs to the file.
    """
    if not url:
        return Path(os.path.realpath(data_dir / "runrecovery.db"))
    if url.startswith("sqlite:///"):
        return Path(os.path.realpath(url.removeprefix("sqlite:///")))
    return None


def path_lock(path: Path) -> Path:
    """Return the lock file beside a SQLite file. It also guards the path before the file exists."""
    return path.with_name(path.name + ".lock")


def install_marker(path: Path) -> Path:
    """Return the file that says that a database was created at `path` once."""
    return path.with_name(path.name + ".installed")


def open_database(url: str, data_dir: Path, *, locks: list[Lock] | None = None) -> Database:
    """Open the store that the configuration names, creating and migrating it as needed.

    The caller holds the locks of the data directory and of the path. The lock of a SQLite file
    is added to `locks`, for the caller to release after the last connection was closed.

    Raises:
        Held: another service uses the SQLite file.
        DatabaseRefused: it is empty, foreign, newer, damaged or too old a kind.
        DatabaseOutOfReach: it does not answer, or not in time; a later start may succeed.
    """
    path = sqlite_path(url, data_dir)
    with refusing(str(path) if path is not None else POSTGRESQL_PLACE):
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
    if soundness.is_empty(db.peewee.connection()):
        raise DatabaseRefused(db.place, NO_TABLES)
    if found := soundness.damage(db.peewee.connection()):
        raise DatabaseRefused(db.place, f"is damaged ({found}); {MENDING}")


@contextlib.contextmanager
def refusing(place: str) -> Iterator[None]:
    """Turn what a database answers at a start into a refusal of the start.

    Raises:
        DatabaseRefused: it cannot be used.
        DatabaseOutOfReach: it does not answer, or not in time; a later start may succeed.
    """
    try:
        yield
    except DRIVER_ERRORS as error:
        fault, words = fault_of(error), words_of(error)
        if fault is None:
            raise DatabaseRefused(place, words) from error
        refused = DatabaseRefused if fault.lasts else DatabaseOutOfReach
        # PostgreSQL says why it is not reached: role, password, database, host, TLS.
        reason = words if fault is UNREACHABLE else fault.refusal(words)
        raise refused(place, reason) from error
    except OSError as error:
        raise DatabaseRefused(place, error.strerror or "cannot be opened") from error


def _open_postgresql(url: str) -> Database:
    if postgresql.PSYCOPG is None:  # an extra
        raise DatabaseRefused("postgresql", "needs `pip install runrecovery-service[postgres]`")
    try:
        peewee = postgresql.prepare(url)
    except postgresql.Unreadable:
        reason = "its URL cannot be read; are special characters of the password percent-encoded?"
        raise DatabaseRefused(POSTGRESQL_PLACE, reason) from None
    db = Database(peewee, POSTGRESQL, POSTGRESQL_PLACE)
    try:
        _check_postgresql(db)
    except BaseException:
        db.close()
        raise
    return db


def _check_postgresql(db: Database) -> None:
    reason = postgresql.unfitness(db.fetch_one)
    if reason is not None:
        raise DatabaseRefused(db.place, reason)
    if reason := _unusable(db, known_migrations()):
        raise DatabaseRefused(db.place, reason)


def _unusable(db: Database, known: dict[str, str]) -> str | None:
    """Return what the role lacks in PostgreSQL for the steps that are missing and for the work.

    A start and `check` ask the same, so that `check` finds what a start would be refused for.
    """
    rights = postgresql.Rights(db.fetch_all)
    if reason := rights.no_schema():
        return reason
    if not all(name in rights.tables for name in HISTORY):
        foreign = [name for name in TABLES if name in rights.tables]
        if foreign:
            return f"has a table `{foreign[0]}` that is not ours"
        return rights.cannot_migrate(HISTORY)
    for name in HISTORY:
        if reason := rights.cannot_use(name, ("SELECT",)):
            return reason
    if _demand_known(db, known).keys() != known.keys():
        return rights.cannot_migrate((*HISTORY, *TABLES))
    return _unusable_table(rights)


def lacking_right(db: Database) -> str | None:
    """Return what the role lacks for the work in PostgreSQL, None if it may do all of it."""
    if db.dialect.kind is Kind.SQLITE:
        return None
    rights = postgresql.Rights(db.fetch_all)
    return rights.no_schema() or _unusable_table(rights)


def _unusable_table(rights: postgresql.Rights) -> str | None:
    return next(filter(None, map(rights.cannot_use, TABLES)), None)


def _open_sqlite(path: Path, locks: list[Lock] | None) -> Database:
    if sqlite3.sqlite_version_info < SQLITE_FLOOR:
        raise DatabaseRefused(str(path), "SQLite 3.37 or newer is needed")
    marker = install_marker(path)
    made_now = not path.exists()
    if made_now and marker.exists():
        raise DatabaseRefused(
            str(path), f"is gone, but {marker.name} says that it was here; restore a backup"
        )
    if made_now:
        _create_sqlite(path)
    if locks is not None:
        locks.append(DatabaseLock(path))
    _check_header(path)
    if not marker.exists():
        _durably_write(marker, MARKER_TEXT.encode())
    if reason := _lost_commits(path):
        raise DatabaseRefused(str(path), reason)
    return _connect_sqlite(path)


def _check_header(path: Path) -> None:
    """Refuse what is not ours by its first 100 bytes, before SQLite opens (and may touch) it."""
    with path.open("rb") as file:
        header = file.read(SQLITE_HEADER_SIZE)
        links = os.fstat(file.fileno()).st_nlink
    if not header:
        raise DatabaseRefused(str(path), "is empty; it was truncated, or is not ours")
    if not header.startswith(SQLITE_MAGIC) or len(header) < SQLITE_HEADER_SIZE:
        raise DatabaseRefused(str(path), "is not a SQLite database")
    (application_id,) = struct.unpack(">I", header[68:72])
    if application_id != APPLICATION_ID:
        raise DatabaseRefused(str(path), "belongs to another application")
    if links > 1:  # SQLite keeps a log beside each name: a start would miss the other's commits
        raise DatabaseRefused(str(path), "has another name (a hard link); remove that one")


def _create_sqlite(path: Path) -> None:
    """Make the file under another name and rename it, so that a crash leaves no half of one."""
    new = path.with_name(path.name + ".new")
    for stale in (new, new.with_name(new.name + "-wal"), new.with_name(new.name + "-shm")):
        stale.unlink(missing_ok=True)
    new.touch(mode=0o600)
    db = _connect_sqlite(new)
    try:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        migrate(db)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()
    new.rename(path)
    _sync_directory(path.parent)


class _Sqlite(pw.SqliteDatabase):
    """Opens no connection to a store of which a file is lost: it would make a second log."""

    before_connecting: Callable[[], None] | None = None

    def _connect(self) -> sqlite3.Connection:
        if self.before_connecting is not None:
            self.before_connecting()
        connection: sqlite3.Connection = super()._connect()  # type: ignore[misc] # not in its stub
        return connection


def _connect_sqlite(path: Path) -> Database:
    peewee = _Sqlite(
        str(path), lock_type="IMMEDIATE", pragmas=SQLITE_PRAGMAS, check_same_thread=False
    )
    db = Database(peewee, SQLITE, str(path), file=path)
    peewee.before_connecting = db.demand_files
    with contextlib.ExitStack() as refused:
        refused.callback(db.close)
        for name, wanted in SQLITE_PRAGMAS.items():
            row = db.fetch_one(f"PRAGMA {name}")
            if row is None or row[0] != wanted:
                raise DatabaseRefused(str(path), f"PRAGMA {name} is {row}, not {wanted}")
        refused.pop_all()
    return db


def _durably_write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- migrations --------------------------------------------------------------------------------

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
    """Bring the schema up to date and return the names of the steps that were missing.

    Raises:
        DatabaseRefused: a newer version was here, or a released step was edited since.
    """
    known = known_migrations()
    applied = _demand_known(db, known)
    missing = [name for name in known if name not in applied]
    if missing:
        _apply_missing(db, known)
    return missing


def _demand_known(db: Database, known: dict[str, str]) -> dict[str, str]:
    """Return the steps that were applied; refuse a store whose steps do not fit this version."""
    applied = _recorded_migrations(db)
    if reason := _misfit(applied, known, has_runs=db.peewee.table_exists("run")):
        raise DatabaseRefused(db.place, reason)
    return applied


def _misfit(applied: dict[str, str], known: dict[str, str], *, has_runs: bool) -> str | None:
    """Return why the applied steps do not fit the known ones: a newer version was here, a step was
    edited since, or the record of one is lost."""
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
    """Return the names of the steps that this store has had, in order."""
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
    """All steps and their records in one transaction, one migrator at a time."""
    with db.transaction():
        if db.dialect.kind is Kind.POSTGRESQL:
            db.execute("SELECT pg_advisory_xact_lock(?)", (APPLICATION_ID,))
        yield


# -- copies ------------------------------------------------------------------------------------


def backup_sqlite(path: Path, destination: Path) -> dict[str, int]:
    """Copy a SQLite store, also while a service uses it, and prove the copy: it is sound, has every
    row, and lacks no commit that was acknowledged before.

    Returns:
        How many runs of each instance are in the copy.

    Raises:
        DatabaseRefused: there is no such store, or no copy of it can be proved; none is left.
        BackupRefused: something has the destination's name already.
    """
    if not path.exists():
        raise DatabaseRefused(str(path), "does not exist")
    with refusing(str(path)):
        _check_header(path)
        if reason := _lost_commits(path):  # before a connection that may change the log
            raise DatabaseRefused(str(path), reason)
    _make_backup_file(destination, path)
    try:
        rows = _copy_proved(path, destination)
    except (OSError, sqlite3.Error) as error:
        destination.unlink(missing_ok=True)
        if (fault := fault_of(error)) and is_damage(error):  # the destination was empty
            raise DatabaseRefused(str(path), fault.refusal(str(error))) from error
        raise DatabaseRefused(str(destination), f"could not be written: {error}") from error
    except BaseException:
        destination.unlink(missing_ok=True)
        raise
    return {name: count for (table, name), count in sorted(rows.items()) if table == "run"}


def _copy_proved(path: Path, destination: Path) -> dict[tuple[str, str], int]:
    marker = install_marker(path)
    acknowledged = CommitMarker(marker).read()
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(destination)) as copy,
    ):
        with refusing(str(path)):
            source.execute("BEGIN")  # one snapshot for the proof and for the copy
            if reason := commit_count.loss(acknowledged, source, marker):
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
        # The copy has the pages of the source, and so the damage that is in them.
        place = path if integrity_problems(path) else destination
        raise DatabaseRefused(str(place), problems[0].removeprefix(f"{destination}: "))
    return found


def _copy_pages(source: sqlite3.Connection, copy: sqlite3.Connection) -> None:
    source.backup(copy)


def _row_counts(connection: sqlite3.Connection) -> dict[tuple[str, str], int]:
    """Return the number of rows of every table, that of runs for each instance."""
    tables = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
    counts: dict[tuple[str, str], int] = {}
    for (table,) in connection.execute(tables).fetchall():
        instance = "owner" if table == "run" else "''"
        by_instance = f'SELECT {instance}, count(*) FROM "{table}" GROUP BY 1'
        for name, count in connection.execute(by_instance):
            counts[table, name] = count
    return counts


def _make_backup_file(destination: Path, path: Path) -> None:
    """Make the empty file that takes the copy; what is there, or a link to nothing, stays."""
    companions = [f"{name}{suffix}" for name in (destination, path) for suffix in _COMPANIONS]
    if destination.absolute() in map(Path.absolute, map(Path, companions)):
        raise BackupRefused(str(destination), "is a name that SQLite uses beside the database")
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


def _lost_commits(path: Path) -> str | None:
    """Return why a store may not be used if commits are missing in it; it is only read."""
    marker = install_marker(path)
    acknowledged = CommitMarker(marker).read()
    with contextlib.closing(_read_only(path)) as connection:
        return commit_count.loss(acknowledged, connection, marker)


def _read_only(path: Path) -> sqlite3.Connection:
    """Open a SQLite store so that nothing in it is changed, not even when it is closed again."""
    # Without a -wal file nobody has it open, and SQLite need not leave files beside it.
    unused = not path.with_name(path.name + "-wal").exists()
    uri = f"{path.absolute().as_uri()}?{'immutable=1' if unused else 'mode=ro'}"
    timeout_s = int(SQLITE_PRAGMAS["busy_timeout"]) / 1000  # type: ignore[call-overload]
    return sqlite3.connect(uri, uri=True, timeout=timeout_s)


def integrity_problems(path: Path) -> list[str]:
    """Return what is wrong with a SQLite store, one sentence each; it is only read."""
    try:
        with refusing(str(path)):
            _check_header(path)
            if reason := _lost_commits(path):
                return [f"{path}: {reason}"]
            with contextlib.closing(_read_only(path)) as connection:
                found = [row[0] for row in connection.execute("PRAGMA integrity_check(20)")]
                if soundness.is_empty(connection):
                    return [f"{path}: {NO_TABLES}"]
                if found == ["ok"]:
                    applied = dict(connection.execute(APPLIED_SQL).fetchall())
                    reason = _misfit(applied, known_migrations(), has_runs=True)
                    return [f"{path}: {reason}"] if reason else []
    except DatabaseRefused as error:
        return [str(error)]
    return [f"{path}: is damaged ({soundness.one_line(one)}); {MENDING}" for one in found]


def postgresql_problems(url: str) -> list[str]:
    """Return what stands against a start on this PostgreSQL database; nothing is changed."""
    try:
        with refusing(POSTGRESQL_PLACE):
            _open_postgresql(url).close()
    except DatabaseRefused as error:
        return [str(error)]
    return []
