"""An open database: connections, transactions, and hand-written SQL."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar

import peewee as pw

from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.start_errors import StoreLost
from runrecovery_service.domain.webhook import WebhookFilter
from runrecovery_service.storage import commit_count, postgresql
from runrecovery_service.storage.commit_count import CommitMarker
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS
from runrecovery_service.storage.durable_files import durably_write
from runrecovery_service.storage.file_watch import StoreFiles
from runrecovery_service.storage.sql_dialects import DatabaseKind, SqlDialect

FILES_LOST: Final = (
    "a file of the database was removed, replaced or overwritten; the service is stopping"
)
FILES_UNSEEN: Final = "the system does not report whether the files of the database exist"

T = TypeVar("T")
Row = tuple[Any, ...]  # the columns of a query; each value gets its type where it is decoded


class Stale(Exception):
    """Another writer changed the row between this use case's read and its write.

    `use_case.retried` then repeats the use case.
    """


class _ChangedRuns(threading.local):
    """The keys of the runs that the thread's transaction has changed."""

    def __init__(self) -> None:
        self.keys: set[int] = set()


class _RolledBack(threading.local):
    """The number of row changes that the thread has undone by rolling back to a savepoint."""

    rows = 0


class _CheckedOwner(threading.local):
    """The owner that the thread's transaction has found to be current."""

    owner: object = None


class _ThreadGuard(threading.local):
    """An extra check for transactions of this thread, besides `Database.guard` for all threads."""

    check: Callable[[Database], object] | None = None


class Database:
    """An open database. Each thread that uses it gets a connection of its own.

    Attributes:
        name: names the database in errors: the path of the file, or "the PostgreSQL database".
        direct: the same PostgreSQL database, reached without the connection pooler; None:
            `database_direct` is not set.
        webhooks: the configured webhooks. Each event of a run records its deliveries to them.
        queue_counts: by instance: the number of queued runs at the last count of `queue_room.py`,
            and the `next_mark` of that moment.
    """

    def __init__(
        self, peewee: pw.Database, dialect: SqlDialect, name: str, *, file: Path | None = None
    ) -> None:
        self.peewee = peewee
        self.dialect = dialect
        self.name = name
        self._file = file
        self._files: StoreFiles | None = None
        self._watching_thread: int | None = None
        self._commits: CommitMarker | None = None
        self._changed_runs = _ChangedRuns()
        self._marks = count()
        self.queue_counts: dict[str, tuple[int, int]] = {}
        self._rolled_back = _RolledBack()
        self._checked = _CheckedOwner()
        self._guard: Callable[[Database], object] | None = None
        self._note_acknowledged: Callable[[Any], object] | None = None
        self.direct: Database | None = None
        self._thread_guard = _ThreadGuard()
        self.webhooks: tuple[WebhookFilter, ...] = ()

    def guard(
        self,
        check: Callable[[Database], T | None],
        *,
        acknowledged: Callable[[T], object] | None = None,
    ) -> None:
        """Begin every later transaction with a check, whose error rolls the transaction back.

        Args:
            acknowledged: called with the result of the check, after the commit of a transaction
                that has changed something.
        """
        self._guard, self._note_acknowledged = check, acknowledged

    @contextlib.contextmanager
    def guarded_by(self, check: Callable[[Database], object]) -> Iterator[None]:
        """Inside the context, begin the calling thread's transactions with this check too."""
        self._thread_guard.check = check
        try:
            yield
        finally:
            self._thread_guard.check = None

    def note_current(self, owner: object) -> None:
        """Record that this owner stays current until the thread's transaction ends."""
        self._checked.owner = owner

    def is_known_current(self, owner: object) -> bool:
        """Return whether `note_current` was called with this owner in the thread's transaction."""
        return self._checked.owner == owner

    def mark_changed(self, run_key: int) -> None:
        """Record that this thread's transaction changes a run, which the commit will announce."""
        self._changed_runs.keys.add(run_key)
        self.next_mark()

    def next_mark(self) -> int:
        """Return a number that rises with each call, and with each `mark_changed` of any thread."""
        return next(self._marks)

    def take_changed_runs(self) -> frozenset[int]:
        """Return and forget the runs that the calling thread has marked as changed."""
        keys = frozenset(self._changed_runs.keys)
        self._changed_runs.keys = set()
        return keys

    def demand_primary(self) -> None:
        """Raise if a standby has answered the preceding read.

        New connections refuse a standby, but a pooler may replace the server behind an open
        connection.

        Raises:
            psycopg.errors.ReadOnlySqlTransaction: as for a write to a standby.
        """
        if isinstance(self.peewee, postgresql.PostgreSQL):
            self.peewee.demand_primary()

    def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
        """Run SQL with `?` for each parameter, and return the driver's cursor."""
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
        """Return a transaction that begins with the guard's check; inside another, a savepoint."""
        return self._savepoint() if self.peewee.in_transaction() else self._guarded()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        self.demand_files()
        self._checked.owner = None
        with self.peewee.transaction() as transaction:
            before, rolled_back = self._changes(), self._rolled_back.rows
            checked = None if self._guard is None else self._guard(self)
            if self._thread_guard.check is not None:
                self._thread_guard.check(self)
            yield
            has_changed = self._changes() != before
            count = self._count_commit() if has_changed and self._commits is not None else None
            if not has_changed and self._rolled_back.rows != rolled_back:
                # Nothing has changed in the end, but SQLite would write and sync pages that were
                # changed and changed back.
                transaction.rollback()
        self.demand_files()
        if has_changed and checked is not None and self._note_acknowledged is not None:
            self._note_acknowledged(checked)
        if count is not None and self._commits is not None:
            self._commits.write(count)

    def count_commits(self, marker: Path) -> None:
        """Count every later commit of a SQLite store, in the store and in the file `marker`."""
        commits, count = CommitMarker(marker), commit_count.stored_count(self.peewee.connection())
        if count is None:
            return
        if commits.read() is None:
            durably_write(marker, commits.first_text(count))
        self._commits = commits

    def _changes(self) -> int:
        """Return the number of this thread's row changes that were not rolled back.

        The number is 0 unless `count_commits` was called.
        """
        if isinstance(self.peewee, postgresql.PostgreSQL):
            return self.peewee.changed_rows - self._rolled_back.rows
        if self._commits is None:
            return 0
        return int(self.peewee.connection().total_changes) - self._rolled_back.rows

    def _count_commit(self) -> int | None:
        counted = "UPDATE commit_count SET commits = commits + 1 RETURNING commits"
        rows = self.peewee.execute_sql(counted).fetchall()
        return int(rows[0][0]) if rows else None

    def snapshot(self) -> contextlib.AbstractContextManager[object]:
        """Return a read-only transaction in which every query sees the same state of the store."""
        if self.dialect.kind is DatabaseKind.SQLITE:
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
        # All savepoints have one name, because savepoints of one name can be nested. With peewee's
        # new name for each, the driver would prepare a new statement each time, and drop a cached
        # one of the service.
        self.peewee.execute_sql("SAVEPOINT inner_step")
        before = self._changes()
        try:
            yield
        except BaseException:
            self.peewee.execute_sql("ROLLBACK TO SAVEPOINT inner_step")
            self._rolled_back.rows += self._changes() - before
            self._checked.owner = None  # the rollback has released locks
            raise
        finally:
            self.peewee.execute_sql("RELEASE SAVEPOINT inner_step")

    def watch_files(self) -> None:
        """Check the files of a SQLite store before and after every later transaction.

        Without the check, the service would acknowledge commits into a removed log. The calling
        thread's connection must stay open until all others are closed.
        """
        if self._file is not None:
            # After a crash the log's index lacks the position up to which the log was copied into
            # the database file. A checkpoint writes the position into the index.
            with contextlib.suppress(*DRIVER_ERRORS):
                self.fetch_all("PRAGMA wal_checkpoint(PASSIVE)")
            self._files, self._watching_thread = StoreFiles(self._file), threading.get_ident()

    def demand_in_place(self) -> None:
        """Raise if a file of a watched SQLite store was lost or damaged.

        Raises:
            StoreLost: the error names the file.
            OSError: the system does not report whether the files exist.
        """
        lost = self._files and self._files.lost()
        if lost:
            raise StoreLost(self.name, f"{lost} under the running service")

    def demand_files(self) -> None:
        """Check the files as `demand_in_place` does, but raise an error that callers can get.

        Raises:
            StorageUnavailable: a file is lost, or the system does not report whether one is.
        """
        try:
            self.demand_in_place()
        except StoreLost as error:
            raise StorageUnavailable(FILES_LOST) from error
        except OSError as error:
            raise StorageUnavailable(FILES_UNSEEN) from error

    @property
    def can_be_rescued(self) -> bool:
        """Whether the open connections can still read every row: no file was overwritten."""
        return self._files is None or self._files.can_be_rescued

    def decode_leniently(self) -> None:
        """Replace undecodable bytes in text that the calling thread's connection reads.

        Without this, one value that is not UTF-8 makes the whole query fail, and the driver's error
        quotes the value. Lenient decoding is not the default, because it doubles the time per row.
        """
        if self.dialect.kind is DatabaseKind.SQLITE:
            self.peewee.connection().text_factory = _lenient_text

    def abandon(self) -> None:
        """Cut every connection to PostgreSQL, and open no new one. Callable from any thread."""
        if isinstance(self.peewee, postgresql.PostgreSQL):
            self.peewee.abandon()
        if self.direct is not None:
            self.direct.abandon()

    def close(self) -> None:
        """Close the calling thread's connection.

        The connection stays open if a file of a SQLite store is lost. The close of the last
        connection would write the lost log into the file that is now at the path.
        """
        with contextlib.suppress(OSError):
            if self._files is not None and self._files.lost() is not None:
                return
        self.peewee.close()
        if self._files is not None and self._watching_thread == threading.get_ident():
            self._files.close()
            self._files = None


def _lenient_text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def is_undecodable(error: Exception) -> bool:
    """Return whether a query failed because text in a row is not UTF-8.

    See `Database.decode_leniently`.
    """
    return isinstance(error, sqlite3.OperationalError) and "decode" in str(error)
