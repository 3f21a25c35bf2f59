"""How the event loop reads and writes a store: many callers at once, failures, connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import peewee as pw
import pytest
from psycopg.conninfo import conninfo_to_dict
from runrecovery_service.domain.errors import (
    RunNotFound,
    StorageBusy,
    StorageFull,
    StorageUnavailable,
)
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import async_storage, postgresql, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import (
    open_database,
    open_direct,
    postgresql_problems,
)
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.store_identity import store_id
from storage.service_store import ServiceStore
from support.pg_proxy import proxied


def add(name: str) -> Callable[[Database], str]:
    """Return a write that adds a row with this name."""

    def use(db: Database) -> str:
        db.execute("INSERT INTO request_receipt VALUES (?, 'm', 'f', 1, 1, '')", (name,))
        return name

    return use


def traces(db: Database) -> list[str]:
    return [row[0] for row in db.fetch_all("SELECT request_id FROM request_receipt ORDER BY 1")]


@pytest.fixture
async def storage(store: ServiceStore) -> AsyncIterator[Storage]:
    storage = Storage(store.db)
    yield storage
    await asyncio.to_thread(storage.close)


async def test_every_kind_of_read_and_write_returns_results_and_raises_domain_errors(
    store: ServiceStore, storage: Storage
) -> None:
    run = await storage.write(lambda db: store.create())

    assert run == await storage.read_row(runs.get, run.run_id)
    assert run == await storage.read(runs.get, run.run_id)
    assert run == await storage.run_exclusive(lambda db: runs.get(db, run.run_id))
    for way in (storage.read_row, storage.read, storage.write):
        with pytest.raises(RunNotFound):
            await way(runs.get, "nobody")


async def test_changes_that_were_rolled_back_are_not_announced_with_the_next_write(
    storage: Storage,
) -> None:
    run, other = asyncio.Event(), asyncio.Event()

    def touch_and_fail(db: Database) -> None:
        db.mark_changed(7)
        raise ValueError("rolled back")

    with storage.changes.of_run(7, run), storage.changes.of_run(8, other):
        for _ in range(30):  # on every connection of a pool
            with pytest.raises(ValueError, match="rolled back"):
                await storage.write(touch_and_fail)
        for _ in range(30):
            await storage.write(lambda db: db.mark_changed(8))

    assert (run.is_set(), other.is_set()) == (False, True)


async def test_only_a_use_case_without_a_transaction_of_its_own_gets_one_around_it(
    store: ServiceStore, storage: Storage
) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL commits each write by itself")
    run, statements = store.create(), list[str]()
    await storage.write(
        lambda db: db.peewee.connection().set_trace_callback(
            lambda text: statements.append(text.split()[0])
        )
    )
    statements.clear()
    await storage.write(
        runs.cancel, run.run_id, owner=store.owner, etag=None, receipt=None, now=store.tick()
    )
    changes, end = ["UPDATE", "INSERT", "UPDATE"], ["UPDATE", "COMMIT"]  # `commit_count`
    assert statements == ["BEGIN", "SELECT", *changes, "SELECT", *end]

    statements.clear()
    await storage.write(add("plain"))
    assert statements == ["BEGIN", "INSERT", *end]


async def test_a_hundred_callers_at_once_all_get_their_result(
    store: ServiceStore, storage: Storage
) -> None:
    made = await asyncio.gather(*(storage.write(lambda db: store.create()) for _ in range(100)))

    read = await asyncio.gather(*(storage.read(runs.get, run.run_id) for run in made))

    assert len({run.run_id for run in read}) == 100


async def test_of_writes_at_once_each_caller_gets_its_own_outcome(storage: Storage) -> None:
    def write(number: int) -> Callable[[Database], int]:
        def use(db: Database) -> int:
            if number % 3 == 0:
                raise RunNotFound(str(number))
            if number == 50:
                raise ZeroDivisionError
            return number

        return use

    outcomes = await asyncio.gather(
        *(storage.write(write(number)) for number in range(100)), return_exceptions=True
    )

    found = [each if isinstance(each, int) else type(each) for each in outcomes]
    expected = [RunNotFound if number % 3 == 0 else number for number in range(100)]
    assert found == [*expected[:50], ZeroDivisionError, *expected[51:]]
    assert str(outcomes[27]) == str(RunNotFound("27"))


async def test_a_write_whose_caller_is_gone_before_it_begins_is_dropped(
    store: ServiceStore, storage: Storage
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    many = 8  # all connections of the pool of PostgreSQL

    def wait(db: Database) -> None:
        begun.set()
        assert go_on.wait(30)

    waiting = [storage.start_write(wait) for _ in range(many)]
    await asyncio.to_thread(begun.wait)
    dropped, kept = storage.start_write(add("a")), storage.start_write(add("b"))
    dropped.cancel()
    await asyncio.sleep(0)  # the pool learns of the cancel in the next turn of the loop
    go_on.set()

    assert await kept == "b"
    await asyncio.gather(*waiting)
    assert await storage.read(traces) == ["b"]


async def test_a_failing_database_is_reported_as_unavailable_and_used_again_afterwards(
    store: ServiceStore, storage: Storage
) -> None:
    sqlite = store.db.dialect.kind is DatabaseKind.SQLITE

    def fail(db: Database) -> None:
        if sqlite:
            db.execute("ATTACH '/nowhere/at/all.db' AS gone")
        db.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(StorageUnavailable) as met:
        await storage.read(fail)

    assert str(met.value) == (
        "the database cannot be opened; its files must exist, and the service's user must be"
        " able to read and write them"
        if sqlite
        else "the database is stopping or starting; retry later"
    )
    assert await storage.read(lambda db: db.fetch_one("SELECT 1")) == (1,)


@pytest.mark.parametrize("way", ["read_row", "read", "write", "renew", "run_exclusive"])
@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_a_transaction_that_conflicts_with_another_is_repeated(
    store: ServiceStore, storage: Storage, way: str, state: str
) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("conflicts of PostgreSQL")
    tries: list[str] = []

    def conflict_twice(db: Database) -> int:
        tries.append(way)
        with db.transaction():
            add(f"{way}-{len(tries)}")(db)
            if len(tries) < 3:
                db.execute(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}'; END $$")
        return len(tries)

    assert await getattr(storage, way)(conflict_twice) == 3
    assert await storage.read(traces) == [f"{way}-3"]


async def test_a_transaction_that_conflicts_six_times_fails_as_busy(
    store: ServiceStore, storage: Storage
) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("conflicts of PostgreSQL")
    tries: list[None] = []

    def conflict(db: Database) -> None:
        tries.append(None)
        db.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")

    with pytest.raises(StorageBusy):
        await storage.write(conflict)

    assert len(tries) == 6


async def test_a_connection_that_does_not_answer_is_replaced(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_storage, "STATEMENT_MOST_S", 0.2)
    monkeypatch.setattr(async_storage, "POSTGRESQL_CONNECTIONS", 1)
    with proxied(postgresql_url) as proxy:
        db = open_database(proxy.url, tmp_path)
        db.close()
        storage = Storage(db)
        assert await storage.read(traces) == []
        proxy.stall()
        hanging = asyncio.create_task(storage.read(traces))

        while not hanging.done():
            with suppress(TimeoutError, StorageUnavailable):
                async with asyncio.timeout(0.1):
                    await storage.renew(traces)

        with pytest.raises(StorageUnavailable):
            hanging.result()
        assert await storage.read(traces) == []
        await asyncio.to_thread(storage.close)


PID = "SELECT pg_backend_pid()"


async def test_the_lease_is_renewed_over_the_direct_url_while_the_pooler_does_not_answer(
    postgresql_url: str, tmp_path: Path
) -> None:
    with proxied(postgresql_url) as pooler:
        db = open_database(pooler.url, tmp_path)
        open_direct(postgresql_url, db)
        db.close()
        storage = Storage(db)
        await storage.renew(lambda db: db.fetch_one(PID))
        pooler.refusing = True
        pooler.cut()

        with pytest.raises(StorageUnavailable):
            await storage.read(traces)
        renewed = await storage.renew(lambda db: db.fetch_one("SELECT 1"))

        assert renewed == (1,)
        await asyncio.to_thread(storage.close)


async def test_an_abandoned_database_is_cut_on_its_direct_connection_too(
    postgresql_url: str, tmp_path: Path
) -> None:
    db = open_database(postgresql_url, tmp_path)
    open_direct(postgresql_url, db)
    db.close()
    storage = Storage(db)
    await storage.renew(lambda db: db.fetch_one(PID))

    storage.abandon()

    with pytest.raises(StorageUnavailable):
        await storage.renew(lambda db: db.fetch_one(PID))
    await asyncio.to_thread(storage.close)


def test_a_direct_url_to_another_database_is_refused(postgresql_url: str, tmp_path: Path) -> None:
    db = open_database(postgresql_url, tmp_path)
    store_id(db, new="one")
    folder = conninfo_to_dict(postgresql_url)["host"]
    other_url = f"postgresql://postgres@/postgres?host={folder}"

    with pytest.raises(DatabaseRefused) as refusal:
        open_direct(other_url, db)

    assert str(refusal.value) == (
        "the PostgreSQL database of `database_direct`: is not the one that `database` leads to"
    )
    assert postgresql_problems(postgresql_url, other_url) == [str(refusal.value)]
    db.close()


async def test_the_renewals_connection_is_kept_while_no_new_one_can_be_opened(
    postgresql_url: str, tmp_path: Path
) -> None:
    with proxied(postgresql_url) as proxy:
        db = open_database(proxy.url, tmp_path)
        db.close()
        storage = Storage(db)
        before = await storage.renew(lambda db: db.fetch_one(PID))
        proxy.refusing = True
        answers, under_way = threading.Event(), threading.Event()

        def slow(db: Database) -> None:
            under_way.set()
            answers.wait()

        for _ in range(3):
            renewing = asyncio.create_task(storage.renew(slow))
            await asyncio.to_thread(under_way.wait)
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing
        answers.set()

        assert await storage.renew(lambda db: db.fetch_one(PID)) == before
        await asyncio.to_thread(storage.close)


@pytest.mark.parametrize("state", ["55P03", "57014", "53100"])
async def test_an_error_that_does_not_break_the_connection_does_not_close_it(
    store: ServiceStore, storage: Storage, state: str
) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("connections of PostgreSQL")

    def fail(db: Database) -> None:
        with db.transaction():
            db.execute(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}'; END $$")

    before = await storage.renew(lambda db: db.fetch_one(PID))
    with pytest.raises((StorageBusy, StorageFull)):
        await storage.renew(fail)

    assert await storage.renew(lambda db: db.fetch_one(PID)) == before


async def test_each_statement_has_its_own_timeout(
    store: ServiceStore, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("connections of PostgreSQL")
    loop, time_s = asyncio.get_running_loop(), [1000.0]
    for module in (async_storage, postgresql):
        monkeypatch.setattr(module, "monotonic", lambda: time_s[0])

    def four_statements_of_50_s(db: Database) -> int:
        for _ in range(4):
            db.fetch_one("SELECT 1")
            time_s[0] += 50.0
            look = storage.renew(lambda db: None)  # cuts hanging connections
            asyncio.run_coroutine_threadsafe(look, loop).result()
        return 4

    assert await storage.read(four_statements_of_50_s) == 4


async def test_a_trial_does_not_queue_behind_callers(storage: Storage) -> None:
    ends = threading.Event()
    callers = [asyncio.create_task(storage.read(lambda db: ends.wait())) for _ in range(20)]

    answer = await storage.run_trial(lambda db: db.fetch_one("SELECT 1"))

    assert not any(caller.done() for caller in callers)
    ends.set()
    await asyncio.gather(*callers)
    assert answer == (1,)


async def test_an_error_in_sql_is_raised_as_a_defect_not_as_a_failing_database(
    storage: Storage,
) -> None:
    with pytest.raises(pw.PeeweeException):
        await storage.read(lambda db: db.execute("SELECT nothing FROM run"))


async def test_closing_leaves_no_thread(store: ServiceStore) -> None:
    before = set(threading.enumerate())
    storage = Storage(store.db)
    await asyncio.gather(*(storage.write(lambda db: store.create()) for _ in range(5)))
    await storage.read(lambda db: None)
    await asyncio.to_thread(lambda: None)  # creates the loop's own thread pool

    await asyncio.to_thread(storage.close)

    left = {t.name for t in set(threading.enumerate()) - before if t.name.startswith("storage")}
    assert set() == left
