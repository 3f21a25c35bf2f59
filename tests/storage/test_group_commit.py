"""Queued writes share a commit, and each of them fails alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import peewee as pw
import pytest
from runrecovery_service.domain.errors import (
    RunNotFound,
)
from runrecovery_service.storage import group_commit, instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.group_commit import WRITES_PER_COMMIT, GroupCommitWriter
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.use_case import retried
from storage.service_store import ServiceStore

R = TypeVar("R")


class CountingDatabase(Database):
    """Counts outermost commits, and makes the next `failing` of them fail."""

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
def counting(store: ServiceStore) -> CountingDatabase:
    """A counting database of the store. SQLite only: PostgreSQL has no writer thread."""
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL commits each write by itself")
    return CountingDatabase(store.db.peewee, store.db.dialect, store.db.name)


def add(name: str) -> Callable[[Database], str]:
    """Return a write that adds a row with this name."""

    def use(db: Database) -> str:
        db.execute("INSERT INTO request_receipt VALUES (?, 'm', 'f', 1, 1, '')", (name,))
        return name

    return use


def refused(name: str) -> Callable[[Database], str]:
    """Return a write that raises a domain error after it has written."""

    def use(db: Database) -> str:
        add(name)(db)
        raise RunNotFound(name)

    return use


def broken(name: str) -> Callable[[Database], str]:
    """Return a write that raises an unexpected error."""

    def use(db: Database) -> str:
        add(name)(db)
        raise ZeroDivisionError

    return use


def traces(db: Database) -> list[str]:
    return [row[0] for row in db.fetch_all("SELECT request_id FROM request_receipt ORDER BY 1")]


def submit(
    writer: GroupCommitWriter, use: Callable[[Database], R], *, in_transaction: bool = False
) -> Future[R]:
    """Queue a write, and return the future of its result."""
    future: Future[R] = Future()
    writer.put(use, future, in_transaction=in_transaction)
    return future


def submit_together(
    db: Database, uses: list[Callable[[Database], str]], *, in_transaction: bool = False
) -> list[Future[str]]:
    """Queue writes while the writer is blocked, so that they form one batch."""
    writer, release, begun = GroupCommitWriter(db), threading.Event(), threading.Event()

    def wait(db: Database) -> None:
        begun.set()
        release.wait()

    submit(writer, wait)
    begun.wait()
    futures = [submit(writer, use, in_transaction=in_transaction) for use in uses]
    release.set()
    writer.close()
    return futures


def test_writes_that_wait_share_a_commit(counting: CountingDatabase) -> None:
    names = [f"w{n:03}" for n in range(WRITES_PER_COMMIT)]

    futures = submit_together(counting, [add(name) for name in names])

    assert names == [future.result() for future in futures] == traces(counting)
    assert counting.commits == 2  # the blocking write, and all the others together


def test_more_writes_than_a_commit_holds_take_a_second_commit(counting: CountingDatabase) -> None:
    futures = submit_together(counting, [add(f"w{n}") for n in range(WRITES_PER_COMMIT + 1)])

    assert len({future.result() for future in futures}) == WRITES_PER_COMMIT + 1
    assert counting.commits == 3


def test_a_refused_write_fails_alone_within_the_shared_commit(counting: CountingDatabase) -> None:
    good, bad, last = submit_together(counting, [add("a"), refused("b"), add("c")])

    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(bad.exception(), RunNotFound)
    assert traces(counting) == ["a", "c"]
    assert counting.commits == 2


def test_a_refused_write_with_its_own_transaction_fails_alone_within_the_shared_commit(
    counting: CountingDatabase,
) -> None:
    uses = [retried(add("a")), retried(refused("b")), retried(add("c"))]

    good, bad, last = submit_together(counting, uses, in_transaction=True)

    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(bad.exception(), RunNotFound)
    assert traces(counting) == ["a", "c"]
    assert counting.commits == 2


def test_runs_whose_creations_share_a_commit_need_three_statements_each(
    counting: CountingDatabase, store: ServiceStore
) -> None:
    counting.guard(partial(instances.demand_current, owner=store.owner))
    store.db = counting
    store.create()  # counts the queue
    statements: list[str] = []

    def create(db: Database) -> str:
        db.peewee.connection().set_trace_callback(statements.append)
        return store.create(labels={}).run_id

    submit_together(counting, [create, create], in_transaction=True)

    each = ["SAVEPOINT", "INSERT", "RELEASE"]
    assert [text.split()[0] for text in statements] == [*each, *each, "COMMIT"]


def test_a_write_with_a_defect_fails_alone(counting: CountingDatabase) -> None:
    uses = [add("a"), broken("b"), add("c"), add("a")]

    good, bad, last, twice = submit_together(counting, uses)

    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(bad.exception(), ZeroDivisionError)
    assert isinstance(twice.exception(), pw.IntegrityError)
    assert traces(counting) == ["a", "c"]


def test_a_shared_commit_that_fails_is_repeated_write_by_write(counting: CountingDatabase) -> None:
    names = ["a", "b", "c"]
    writer, release, begun = GroupCommitWriter(counting), threading.Event(), threading.Event()

    def wait(db: Database) -> None:
        begun.set()
        release.wait()

    first = submit(writer, wait)
    begun.wait()
    futures = [submit(writer, add(name)) for name in names]
    first.add_done_callback(lambda done: setattr(counting, "failing", 1))
    release.set()
    writer.close()

    assert names == [future.result() for future in futures] == traces(counting)
    assert 1 + len(names) == counting.commits


def test_an_error_of_the_log_does_not_end_the_writer(
    counting: CountingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def info(self, *_: object, **__: object) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr(group_commit, "log", Broken())
    batch = submit_together(counting, [broken("a"), add("b")])
    writer = GroupCommitWriter(counting)

    later = submit(writer, add("c"))
    writer.close()

    assert later.result() == "c"
    assert all(future.exception() is not None for future in batch)


def test_a_write_that_is_canceled_before_it_begins_is_not_done(counting: CountingDatabase) -> None:
    writer, release, begun = GroupCommitWriter(counting), threading.Event(), threading.Event()

    def wait(db: Database) -> None:
        begun.set()
        release.wait()

    submit(writer, wait)
    begun.wait()
    given_up, kept = submit(writer, add("a")), submit(writer, add("b"))
    assert given_up.cancel()
    release.set()
    writer.close()

    assert (kept.result(), traces(counting)) == ("b", ["b"])
