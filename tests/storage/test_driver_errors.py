"""Each kind of database failure has its own domain error."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from runrecovery_service.domain.errors import StorageBusy, StorageFull, StorageUnavailable
from runrecovery_service.domain.start_errors import DatabaseOutOfReach, DatabaseRefused
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import is_unstorable
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore

ADD = "INSERT INTO request_receipt VALUES ('r', 'm', 'f', 1, 1, '')"
MENDING = "docs/operations.md, *A damaged database*, says how to repair it"
NO_ROOM = "cannot be written to: its disk is full"


@pytest.fixture
def storage(store: ServiceStore) -> Iterator[Storage]:
    storage = Storage(store.db)
    yield storage
    storage.close()


def sqlite_error(code: int) -> sqlite3.Error:
    """Return the error that the driver raises for an extended result code."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    return error


def raising(code: str) -> str:
    """Return a statement that PostgreSQL refuses with an SQLSTATE."""
    return f"DO $$ BEGIN RAISE EXCEPTION 'a row: %', 'secret' USING ERRCODE = '{code}'; END $$"


@pytest.mark.parametrize(
    ("statements", "kind", "said"),
    [
        (["SET TRANSACTION READ ONLY", ADD], StorageUnavailable,
         "the database is read-only; it is a standby, or default_transaction_read_only is set"),
        (["SET LOCAL ROLE pg_monitor", ADD], StorageUnavailable,
         ("the database denies the service's role a permission; the role must own the service's"
         " tables")),
        (["SELECT 1 FROM nowhere"], StorageUnavailable,
         ("the database lacks a table of the service; restore the table or a backup, and check"
         " search_path")),
        ([raising("53100")], StorageFull,
         "the database cannot be written to: its disk is full; make room"),
        ([raising("53300")], StorageUnavailable,
         ("the database has no connection left; raise its limit (max_connections, or that of the"
         " role, database or pooler), or end other clients")),
        ([raising("XX001")], StorageUnavailable,
         "the database is damaged; restore a backup"),
        ([raising("XX002")], StorageUnavailable,
         "the database has a damaged index; rebuild its indexes (REINDEX), or restore a backup"),
        ([raising("55P03")], StorageBusy,
         "the database is busy: another session holds a lock; retry later"),
        ([raising("57P03")], StorageUnavailable,
         "the database is stopping or starting; retry later"),
        (["SELECT pg_terminate_backend(pg_backend_pid())"], StorageUnavailable,
         "the database is stopping or starting; retry later"),
    ],
    ids=["read-only", "permission", "table", "full", "connections", "page", "index", "lock",
         "starting", "stopping"],
)  # fmt: skip
async def test_each_sqlstate_of_postgresql_has_its_domain_error(
    store: ServiceStore, storage: Storage, statements: list[str], kind: type[Exception], said: str
) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("failures of PostgreSQL")

    def fail(db: Database) -> None:
        with db.peewee.atomic():
            for statement in statements:
                db.peewee.execute_sql(statement.replace("%'", "%%'"), ())

    with pytest.raises(kind) as met:
        await storage.write(fail)

    assert str(met.value) == said


@pytest.mark.parametrize(
    ("statements", "kind", "said"),
    [
        (["PRAGMA query_only = 1", ADD], StorageUnavailable,
         ("the database cannot be written to: its files or directory are read-only; make them"
         " writable for the service's user")),
        (["ATTACH '/nowhere/at/all.db' AS gone"], StorageUnavailable,
         ("the database cannot be opened; its files must exist, and the service's user must be"
         " able to read and write them")),
        (["PRAGMA max_page_count = 1",
          "INSERT INTO request_receipt VALUES ('r', hex(zeroblob(9999)), 'f', 1, 1, '')"],
         StorageFull,
         "the database cannot be written to: its disk is full; make room"),
    ],
    ids=["read-only", "not there", "full"],
)  # fmt: skip
async def test_each_error_code_of_sqlite_has_its_domain_error(
    store: ServiceStore, storage: Storage, statements: list[str], kind: type[Exception], said: str
) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("failures of SQLite")

    def fail(db: Database) -> None:
        for statement in statements:
            db.execute(statement)

    with pytest.raises(kind) as met:
        await storage.read(fail)

    assert str(met.value) == said


@pytest.mark.parametrize(
    ("code", "said", "refusal"),
    [
        (sqlite3.SQLITE_IOERR_READ, "cannot be read: the system reports an I/O error",
         DatabaseRefused),
        (sqlite3.SQLITE_IOERR_WRITE, "cannot be written to: the system reports an I/O error",
         DatabaseRefused),
        (sqlite3.SQLITE_IOERR_FSYNC, "cannot be written to: the system reports an I/O error",
         DatabaseRefused),
        (sqlite3.SQLITE_IOERR_LOCK,
         "cannot be read or written to: the system reports an I/O error", DatabaseRefused),
        (sqlite3.SQLITE_READONLY_DIRECTORY,
         "cannot be written to: its files or directory are read-only", DatabaseRefused),
        (sqlite3.SQLITE_CORRUPT_INDEX, "is damaged", DatabaseRefused),
        (sqlite3.SQLITE_INTERRUPT, "is busy: it interrupts statements", DatabaseOutOfReach),
        (sqlite3.SQLITE_NOTADB, "is damaged", DatabaseRefused),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "is busy: another connection holds its lock",
         DatabaseOutOfReach),
        (sqlite3.SQLITE_FULL, NO_ROOM, DatabaseOutOfReach),
        (sqlite3.SQLITE_NOMEM, "cannot be used: the system has no memory left", DatabaseOutOfReach),
    ],
)  # fmt: skip
def test_a_start_and_check_report_the_text_that_callers_get(
    code: int, said: str, refusal: type[DatabaseRefused]
) -> None:
    with pytest.raises(DatabaseRefused) as refused, refusing("/data/x.db"):
        raise sqlite_error(code)

    assert type(refused.value) is refusal
    assert str(refused.value).startswith(f"/data/x.db: {said} (disk I/O error)")


async def test_a_value_that_can_never_be_stored_is_not_taken_for_a_failed_database(
    store: ServiceStore, storage: Storage
) -> None:
    turn = store.running()
    impossible: list[dict[str, object]] = [{"output": "\ud800"}, {"version": 2**70}]
    if store.db.dialect.kind is DatabaseKind.POSTGRESQL:
        impossible.append({"output": "\0"})

    def write(columns: dict[str, object]) -> Awaitable[None]:
        return storage.write_own(lambda _: store.set(turn.run, **columns))

    errors = await asyncio.gather(*map(write, impossible), return_exceptions=True)

    assert [isinstance(error, Exception) and is_unstorable(error) for error in errors] == (
        [True] * len(impossible)
    )
    assert not is_unstorable(StorageFull(cause="no room"))


def test_a_failed_rollback_does_not_hide_the_first_error() -> None:
    def fail() -> None:
        try:
            raise sqlite_error(sqlite3.SQLITE_FULL)
        except sqlite3.Error:
            raise sqlite3.OperationalError("cannot rollback - no transaction is active") from None

    with pytest.raises(DatabaseOutOfReach) as refused, refusing("x"):
        fail()

    assert str(refused.value) == f"x: {NO_ROOM} (disk I/O error); make room"


def test_a_damaged_page_is_reported_with_the_way_to_repair_it(tmp_path: Path) -> None:
    file = tmp_path / "x.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.commit()
    with file.open("r+b") as raw:
        raw.seek(4096)
        raw.write(b"\xff" * 4096)

    with (
        pytest.raises(DatabaseRefused) as refused,
        refusing("x"),
        closing(sqlite3.connect(file)) as connection,
    ):
        connection.execute("SELECT a FROM t")

    assert str(refused.value) == f"x: is damaged (database disk image is malformed); {MENDING}"
