"""Watchers: which changes wake them, and that they miss no change while they read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.domain.caller import ANYONE
from runrecovery_service.domain.reconciliation import Cause, RecoveredFilter
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy
from runrecovery_service.domain.steady_time import Due, SteadyTime
from runrecovery_service.rpc import watch_streams
from runrecovery_service.rpc.callers import CALLER
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.watch_streams import RecoveredWatcher, RunWatcher
from runrecovery_service.storage import (
    decision_feed,
    events,
    instances,
    recovery_apply,
    reports,
    runs,
)
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.changes import Changes, SharedPoll
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.recovery_scope import ApplyScope

RUN, OTHER = 7, 8

Subscribe = Callable[[asyncio.Event], AbstractContextManager[None]]
Announce = Callable[[], None]


def of_run() -> tuple[Subscribe, Announce]:
    changes = Changes()
    return lambda event: changes.of_run(RUN, event), lambda: changes.announce([OTHER, RUN])


def of_decisions() -> tuple[Subscribe, Announce]:
    changes = Changes()
    return changes.of_decisions, changes.announce_decisions


def of_gate() -> tuple[Subscribe, Announce]:
    gate = Gate()
    return gate.notify, gate.drain


@pytest.mark.parametrize("make", [of_run, of_decisions, of_gate])
async def test_a_change_wakes_a_waiter_and_not_a_cancelled_one(
    make: Callable[[], tuple[Subscribe, Announce]],
) -> None:
    subscribe, announce = make()
    stays, goes = asyncio.Event(), asyncio.Event()

    async def wait(event: asyncio.Event) -> None:
        with subscribe(event):
            await event.wait()

    staying, going = (asyncio.create_task(wait(event)) for event in (stays, goes))
    await asyncio.sleep(0)
    going.cancel()
    await ended(going)
    announce()

    await asyncio.wait_for(staying, 10)
    assert (stays.is_set(), goes.is_set()) == (True, False)


async def ended(task: Awaitable[None]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_run_without_waiters_is_no_longer_watched() -> None:
    changes, first, second = Changes(), asyncio.Event(), asyncio.Event()
    with changes.of_run(RUN, first):
        with changes.of_run(RUN, second), changes.of_decisions(second):
            assert (changes.runs_watched, changes.decisions_watched) == ([RUN], True)
        assert (changes.runs_watched, changes.decisions_watched) == ([RUN], False)
    assert changes.runs_watched == []


async def test_a_change_of_one_run_wakes_no_waiter_of_another() -> None:
    changes, mine, other = Changes(), asyncio.Event(), asyncio.Event()
    with changes.of_run(RUN, mine), changes.of_run(OTHER, other):
        changes.announce([RUN])

    assert (mine.is_set(), other.is_set()) == (True, False)


async def test_a_wake_up_without_news_does_not_postpone_the_bookmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch_streams, "BOOKMARK_S", 0.3)
    timer, woken = watch_streams._BookmarkTimer(sent=True), asyncio.Event()
    woken.set()  # and is never cleared: it wakes all the time

    async with asyncio.timeout(30):
        while timer.left_s:
            await timer.wait(woken)
            await asyncio.sleep(0)

    timer.restart()
    assert timer.left_s > 0


async def test_a_resumed_watch_gets_a_bookmark_at_once() -> None:
    assert watch_streams._BookmarkTimer(sent=False).left_s == 0


def test_a_poll_of_a_shared_store_announces_new_events_and_runs_that_are_newly_watched() -> None:
    look = SharedPoll()

    told = [
        look.changed(counts)
        for counts in (
            {RUN: 1},
            {RUN: 1},
            {RUN: 2, OTHER: 5},
            {RUN: 2},
            {RUN: 2, OTHER: 5},
        )
    ]

    assert told == [[RUN], [], [RUN, OTHER], [], [OTHER]]


# -- changes during a read -----------------------------------------------------------------------

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NEVER_S = 3600.0
"""The interval of bookmarks, at which a watcher reads again without a wake-up."""


def claimed(db: Database) -> Owner:
    boot = InstanceStart(
        instance="default",
        boot_token="t",  # noqa: S106 - no password
        host_id="h",
        data_dir="/d",
        pid=7,
        lock_id="boot/1:2",
    )
    return instances.claim(db, boot, now=NOW)


def created(db: Database, owner: Owner) -> None:
    new = NewRun(
        run_id="mine",
        engine="demo",
        labels={},
        profile=Profile.RESUMABLE,
        restart_policy=RestartPolicy.FAIL,
        max_attempts=1,
        input={},
    )
    runs.create(db, new, owner=owner, max_queued=9, receipt=None, now=NOW)


def restarted(db: Database) -> None:
    """Decide every run, as a restart does."""
    owner = claimed(db)
    key = reports.open_report(
        db, owner, reconciliation_id="report", cause=Cause.STARTUP, safe_mode=False, now=NOW
    )
    scope = ApplyScope(
        owner=owner,
        before=owner.epoch,
        reconciliation_key=key,
        reopen=Due(at=NOW, clock="boot-1", us=0),
        now=NOW,
        steady=SteadyTime("boot-1", 0),
    )
    batch = recovery_apply.next_batch(db, scope, after=0, rows=9)
    assert batch is not None
    recovery_apply.apply_batch(db, scope, batch, report=lambda _, __: None)


@pytest.fixture
async def storage(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Storage]:
    monkeypatch.setattr(watch_streams, "BOOKMARK_S", NEVER_S)
    storage = Storage(database)
    yield storage
    await asyncio.to_thread(storage.close)


@pytest.mark.parametrize("last_read", [runs.progress, events.events_after])
async def test_an_event_during_the_read_of_a_run_watcher_is_sent(
    storage: Storage,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    last_read: Callable[..., object],
) -> None:
    owner = claimed(database)
    created(database, owner)
    read_row, cancels = storage.read_row, iter([runs.cancel])

    async def read_then_cancel(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        found = await read_row(use, *args, **named)
        if use is last_read:
            for cancel in cancels:
                await storage.write(cancel, "mine", owner=owner, etag=None, receipt=None, now=NOW)
        return found

    monkeypatch.setattr(storage, "read_row", read_then_cancel)
    CALLER.set(ANYONE)
    stream = RunWatcher(storage, Gate()).stream(pb.WatchRunRequest(run_id="mine"))

    async with aclosing(stream), asyncio.timeout(20):
        told = [response async for response in stream]

    assert [(one.sequence, one.WhichOneof("update")) for one in told] == [
        (1, "snapshot"), (2, "event"),
    ]  # fmt: skip


async def test_a_decision_during_the_read_of_a_watcher_is_sent(
    storage: Storage, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    created(database, claimed(database))
    read, restarts = storage.read, iter([restarted])

    async def read_then_restart(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        found = await read(use, *args, **named)
        if use is decision_feed.decisions_after:
            for restart in restarts:
                await read(restart)
                storage.changes.announce_decisions()
        return found

    monkeypatch.setattr(storage, "read", read_then_restart)
    stream = RecoveredWatcher(storage, Gate(), PageTokens(key=b"key")).stream(
        recovery_pb.WatchRecoveredRequest(), RecoveredFilter()
    )

    async with aclosing(stream), asyncio.timeout(20):
        bookmark, decided = [await anext(stream) for _ in range(2)]

    assert bookmark.HasField("bookmark")
    assert decided.decision.run_id == "mine"
