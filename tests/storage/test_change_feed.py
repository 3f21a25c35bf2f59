"""A commit announces the runs that it has changed, to watchers and to subscribers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from runrecovery_service.domain.errors import RunNotFound, StorageFull, StorageUnavailable
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.changes import Change, Changes, Subscription
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database

BOUND_S = 30.0
NOTHING_S = 0.02
RUN, OTHER = 7, 8


@pytest_asyncio.fixture
async def storage(tmp_path: Path) -> AsyncIterator[Storage]:
    db = open_database("", tmp_path)
    made = Storage(db)
    yield made
    await asyncio.to_thread(made.close)
    db.close()


def touching(*run_keys: int) -> Any:
    """Return a write that changes these runs."""

    def use(db: Database) -> str:
        for key in run_keys:
            db.mark_changed(key)
        return "done"

    return use


def failing(error: Exception) -> Any:
    def use(db: Database) -> None:
        db.mark_changed(RUN)
        raise error

    return use


async def changed(changes: Subscription) -> Change | None:
    return await changes.next(BOUND_S)


def announced(*run_keys: int, in_doubt: bool = False) -> Change:
    return Change(frozenset(run_keys), in_doubt)


async def test_a_commit_announces_the_runs_that_it_has_changed(storage: Storage) -> None:
    with storage.changes.subscribe() as changes:
        assert await storage.write(touching(RUN, OTHER)) == "done"

        assert await changed(changes) == announced(RUN, OTHER)
        assert await changes.next(NOTHING_S) is None


async def test_a_change_in_doubt_is_announced_once(storage: Storage) -> None:
    """Each announcement makes the execution read every record."""
    with storage.changes.subscribe() as changes:
        with pytest.raises(StorageUnavailable):
            await storage.write(failing(StorageUnavailable()))
        assert await changed(changes) == announced(in_doubt=True)
        await storage.write(touching(RUN))

        assert await changed(changes) == announced(RUN)


async def test_changes_before_a_subscription_are_not_announced_to_it(storage: Storage) -> None:
    await storage.write(touching(RUN))

    with storage.changes.subscribe() as changes:
        assert await changes.next(NOTHING_S) is None


async def test_changes_of_several_commits_are_collected_until_they_are_read(
    storage: Storage,
) -> None:
    with storage.changes.subscribe() as changes:
        for _ in range(3):
            await storage.write(touching(RUN))
        await storage.write(touching(OTHER))

        assert await changed(changes) == announced(RUN, OTHER)


async def test_a_write_that_changes_no_run_announces_nothing(storage: Storage) -> None:
    with storage.changes.subscribe() as changes:
        await storage.write(touching())

        assert await changes.next(NOTHING_S) is None


@pytest.mark.parametrize("error", [StorageUnavailable(), OSError("never seen")])
async def test_a_write_whose_commit_is_in_doubt_is_announced_as_such(
    storage: Storage, error: Exception
) -> None:
    with storage.changes.subscribe() as changes:
        with pytest.raises(type(error)):
            await storage.write(failing(error))

        assert await changed(changes) == announced(in_doubt=True)


@pytest.mark.parametrize("error", [RunNotFound("r"), StorageFull()])
async def test_a_refused_write_announces_nothing(storage: Storage, error: Exception) -> None:
    with storage.changes.subscribe() as changes:
        with pytest.raises(type(error)):
            await storage.write(failing(error))

        assert await changes.next(NOTHING_S) is None


async def test_a_write_by_execution_wakes_watchers_only(storage: Storage) -> None:
    woken = asyncio.Event()
    with storage.changes.subscribe() as changes, storage.changes.of_run(RUN, woken):
        await storage.write_own(touching(RUN))
        with pytest.raises(StorageUnavailable):
            await storage.write_own(failing(StorageUnavailable()))

        assert woken.is_set()
        assert await changes.next(NOTHING_S) is None


@pytest.mark.parametrize("outcome", [None, StorageUnavailable()])
async def test_a_commit_whose_caller_has_gone_is_announced(
    storage: Storage, outcome: Exception | None
) -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slowly(db: Database) -> None:
        db.mark_changed(RUN)
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(BOUND_S)
        if outcome is not None:
            raise outcome

    with storage.changes.subscribe() as changes:
        writing = asyncio.create_task(storage.write(slowly))
        await asyncio.wait_for(begun.wait(), BOUND_S)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        go_on.set()

        expected = announced(RUN) if outcome is None else announced(in_doubt=True)
        assert await changed(changes) == expected


async def test_a_wake_up_without_changes_is_an_empty_change() -> None:
    with Changes().subscribe() as changes:
        changes.wake()

        assert await changed(changes) == announced()


def test_a_closed_subscription_collects_nothing() -> None:
    feed = Changes()
    with feed.subscribe():
        pass

    assert not feed._subscriptions
