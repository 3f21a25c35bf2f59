"""Writes that wait share a commit, and fail each for itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import peewee as pw
import pytest
from runrecovery_service.domain.errors import (
    RunNotFound,
    StorageBusy,
    StorageFull,
    StorageUnavailable,
)
from runrecovery_service.storage import async_storage, group_commit, postgresql, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.group_commit import WRITES_PER_COMMIT, GroupCommitWriter
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from support.pg_proxy import proxied

from .conftest import World


class CountingDatabase(Database):
    """Counts outermost transactions that committed; the next `failing` of them fail to."""

    commits = 0
    failing = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        outermost = not self.peewee.in_transaction()
        with super().transaction():
            yield
            if outermost and self.failing:
                self.failing -= 1
                raise pw.IntegrityError("the shared commit fails")
        self.commits += outermost


@pytest.fixture
def counting(world: World) -> CountingDatabase:
    """The world's database, counting. SQLite only: the writer thread is SQLite's."""
    if world.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL commits each write by itself")
    return CountingDatabase(world.db.peewee, world.db.dialect, world.db.name)


def add(name: str) -> Callable[[Database], str]:
    """A write that leaves a trace."""

    def use(db: Database) -> str:
        db.execute("INSERT INTO request_receipt VALUES (?, 'm', 'f', 1, 1)", (name,))
        return name

    return use


def refused(name: str) -> Callable[[Database], str]:
    """A write that the domain refuses after it has written."""

    def use(db: Database) -> str:
        add(name)(db)
        raise RunNotFound(name)

    return use


def broken(name: str) -> Callable[[Database], str]:
    """A write that is a defect."""

    def use(db: Database) -> str:
        add(name)(db)
        raise ZeroDivisionError

    return use


def traces(db: Database) -> list[str]:
    return [row[0] for row in db.fetch_all("SELECT request_id FROM request_receipt ORDER BY 1")]


def submit_together(db: Database, uses: list[Callable[[Database], str]]) -> list[Future[str]]:
    """Let writes pile up behind one that waits, so that they make one batch."""
    writer, release, begun = GroupCommitWriter(db), threading.Event(), threading.Event()

    def wait(db: Database) -> None:
        begun.set()
        release.wait()

    writer.submit(wait)
    begun.wait()
    futures = [writer.submit(use) for use in uses]
    release.set()
    writer.close()
    return futures


def test_writes_that_wait_share_a_commit(counting: CountingDatabase) -> None:
    names = [f"w{n:03}" for n in range(WRITES_PER_COMMIT)]

    futures = submit_together(counting, [add(name) for name in names])

    assert names == [future.result() for future in futures] == traces(counting)
    assert counting.commits == 2  # the one that was waited for, and all the others


def test_more_writes_than_a_commit_holds_take_another(counting: CountingDatabase) -> None:
    futures = submit_together(counting, [add(f"w{n}") for n in range(WRITES_PER_COMMIT + 1)])

    assert len({future.result() for future in futures}) == WRITES_PER_COMMIT + 1
    assert counting.commits == 3


def test_a_refused_write_fails_alone_within_the_shared_commit(counting: CountingDatabase) -> None:
    good, bad, last = submit_together(counting, [add("a"), refused("b"), add("c")])

    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(bad.exception(), RunNotFound)
    assert traces(counting) == ["a", "c"]
    assert counting.commits == 2


def test_a_broken_write_takes_no_other_down(counting: CountingDatabase) -> None:
    uses = [add("a"), broken("b"), add("c"), add("a")]

    good, bad, last, twice = submit_together(counting, uses)

    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(bad.exception(), ZeroDivisionError)
    assert isinstance(twice.exception(), pw.IntegrityError)
    assert traces(counting) == ["a", "c"]


def test_a_shared_commit_that_fails_is_done_one_by_one(counting: CountingDatabase) -> None:
    names = ["a", "b", "c"]
    writer, release, begun = GroupCommitWriter(counting), threading.Event(), threading.Event()

    def wait(db: Database) -> None:
        begun.set()
        release.wait()

    first = writer.submit(wait)
    begun.wait()
    futures = [writer.submit(add(name)) for name in names]
    first.add_done_callback(lambda done: setattr(counting, "failing", 1))
    release.set()
    writer.close()

    assert names == [future.result() for future in futures] == traces(counting)
    assert 1 + len(names) == counting.commits


def test_a_log_that_fails_does_not_end_the_writer(
    counting: CountingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def info(self, *_: object, **__: object) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr(group_commit, "log", Broken())
    batch = submit_together(counting, [broken("a"), add("b")])
    writer = GroupCommitWriter(counting)

    later = writer.submit(add("c"))
    writer.close()

    assert later.result() == "c"
    assert all(future.exception() is not None for future in batch)


def test_a_write_that_was_given_up_before_it_began_is_not_done(counting: CountingDatabase) -> None:
    writer, release, begun = GroupCommitWriter(counting), threading.Event(), threading.Event()

    def wait(db: Database) -> None:
        begun.set()
        release.wait()

    writer.submit(wait)
    begun.wait()
    given_up, kept = writer.submit(add("a")), writer.submit(add("b"))
    assert given_up.cancel()
    release.set()
    writer.close()

    assert (kept.result(), traces(counting)) == ("b", ["b"])


# -- Storage -----------------------------------------------------------------------------------


@pytest.fixture
async def storage(world: World) -> AsyncIterator[Storage]:
    storage = Storage(world.db)
    yield storage
    await asyncio.to_thread(storage.close)


async def test_reads_and_writes_answer_and_raise_the_words_of_the_domain(
    world: World, storage: Storage
) -> None:
    run = await storage.write(lambda db: world.create())

    assert run == await storage.read_row(runs.get, run.run_id)
    assert run == await storage.read(runs.get, run.run_id)
    assert run == await storage.run_exclusive(lambda db: runs.get(db, run.run_id))
    for way in (storage.read_row, storage.read, storage.write):
        with pytest.raises(RunNotFound):
            await way(runs.get, "nobody")


async def test_what_was_rolled_back_is_not_announced_with_the_next_write(storage: Storage) -> None:
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


async def test_many_callers_at_once_are_all_answered(world: World, storage: Storage) -> None:
    made = await asyncio.gather(*(storage.write(lambda db: world.create()) for _ in range(100)))

    read = await asyncio.gather(*(storage.read(runs.get, run.run_id) for run in made))

    assert len({run.run_id for run in read}) == 100


async def test_a_failing_database_is_told_in_the_words_of_the_domain(
    world: World, storage: Storage
) -> None:
    sqlite = world.db.dialect.kind is DatabaseKind.SQLITE

    def fail(db: Database) -> None:
        if sqlite:
            db.execute("ATTACH '/nowhere/at/all.db' AS gone")
        db.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(StorageUnavailable) as met:
        await storage.read(fail)

    assert str(met.value) == (
        "the database cannot be opened; its files must be there, and be the service's to read and"
        " to write"
        if sqlite
        else "the database is stopping or starting; retry later"
    )
    assert await storage.read(lambda db: db.fetch_one("SELECT 1")) == (1,)


@pytest.mark.parametrize("way", ["read_row", "read", "write", "renew", "run_exclusive"])
@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_a_transaction_that_met_another_one_is_repeated(
    world: World, storage: Storage, way: str, state: str
) -> None:
    if world.db.dialect.kind is not DatabaseKind.POSTGRESQL:
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


async def test_conflicts_without_end_are_told(world: World, storage: Storage) -> None:
    if world.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("conflicts of PostgreSQL")
    tries: list[None] = []

    def conflict(db: Database) -> None:
        tries.append(None)
        db.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")

    with pytest.raises(StorageBusy):
        await storage.write(conflict)

    assert len(tries) == 6


async def test_a_connection_that_gives_no_answer_is_replaced(
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


async def test_the_connection_of_the_lease_is_kept_while_no_other_can_be_had(
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
async def test_an_error_that_leaves_a_connection_sound_does_not_close_it(
    world: World, storage: Storage, state: str
) -> None:
    if world.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("connections of PostgreSQL")

    def fail(db: Database) -> None:
        with db.transaction():
            db.execute(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}'; END $$")

    before = await storage.renew(lambda db: db.fetch_one(PID))
    with pytest.raises((StorageBusy, StorageFull)):
        await storage.renew(fail)

    assert await storage.renew(lambda db: db.fetch_one(PID)) == before


async def test_each_statement_of_a_use_has_its_own_time(
    world: World, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("connections of PostgreSQL")
    loop, time_s = asyncio.get_running_loop(), [1000.0]
    for module in (async_storage, postgresql):
        monkeypatch.setattr(module, "monotonic", lambda: time_s[0])

    def four_statements_of_50_s(db: Database) -> int:
        for _ in range(4):
            db.fetch_one("SELECT 1")
            time_s[0] += 50.0
            look = storage.renew(lambda db: None)  # cuts off what hangs
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


async def test_a_defect_of_ours_is_not_told_as_the_databases(storage: Storage) -> None:
    with pytest.raises(pw.PeeweeException):
        await storage.read(lambda db: db.execute("SELECT nothing FROM run"))


async def test_closing_leaves_no_thread(world: World) -> None:
    before = set(threading.enumerate())
    storage = Storage(world.db)
    await asyncio.gather(*(storage.write(lambda db: world.create()) for _ in range(5)))
    await storage.read(lambda db: None)
    await asyncio.to_thread(lambda: None)  # the loop's own thread pool is not ours

    await asyncio.to_thread(storage.close)

    left = {t.name for t in set(threading.enumerate()) - before if t.name.startswith("storage")}
    assert set() == left
