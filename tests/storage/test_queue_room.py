"""The limit of queued runs is kept, although the queue is seldom counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from runrecovery_service.domain.errors import Overloaded
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.storage import queue_room
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from storage.service_store import ServiceStore


@contextmanager
def counts_noted() -> Iterator[list[object]]:
    """Note how often a queue is counted."""
    count, noted = queue_room._count, list[object]()

    def noting(*arguments: Any) -> int:
        noted.append(arguments)
        return count(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_room, "_count", noting)
        yield noted


def test_a_queue_far_below_its_limit_is_counted_once(store: ServiceStore) -> None:
    with counts_noted() as noted:
        for _ in range(20):
            store.create(max_queued=1000)

    assert len(noted) == 1


def test_a_queue_that_may_be_full_is_counted(store: ServiceStore) -> None:
    for _ in range(20):
        store.create(max_queued=2)
        store.take()

    for _ in range(2):
        store.create(max_queued=2)
    with pytest.raises(Overloaded):
        store.create(max_queued=2)


def test_runs_that_replies_queue_count_towards_the_queue(store: ServiceStore) -> None:
    waiting = [store.waiting(), store.waiting()]
    store.db.queue_counts.clear()
    store.create(max_queued=4)  # counts the queue
    for run in waiting:
        assert store.reply(run).status is RunStatus.QUEUED

    store.create(max_queued=4)

    with pytest.raises(Overloaded):
        store.create(max_queued=4)


async def test_runs_that_a_recovery_queues_count_towards_the_queue(store: ServiceStore) -> None:
    lost = [store.running().run, store.running().run]
    store.db.queue_counts.clear()
    store.create(max_queued=3)  # counts the queue

    def recover(_: Database) -> None:
        for run in lost:
            store.set(run, status=RunStatus.QUEUED.value)

    storage = Storage(store.db)
    try:
        await storage.run_exclusive(recover)
    finally:
        await asyncio.to_thread(storage.close)

    with pytest.raises(Overloaded):
        store.create(max_queued=3)
