"""Watchers: which changes wake them, and that they miss no change while they read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.domain.caller import ANYONE
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.reconciliation import Cause, RecoveredFilter
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy
from runrecovery_service.domain.steady_time import Due, SteadyTime
from runrecovery_service.rpc import watch_streams, watched_runs
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
from runrecovery_service.storage.changes import Changes, RunWaiters, SharedPoll
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.recovery_scope import ApplyScope

RUN, OTHER = 7, 8

Subscribe = Callable[[asyncio.Event], AbstractContextManager[object]]
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


class HandDrivenLoop:
    """The clock and the timers of an event loop, in a time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> HandDrivenLoop:
        self.timers.append((self.now + delay_s, callback))
        return self

    def cancel(self) -> None:
        """Cancel the only timer. The loop is also the handle of its timer."""
        self.timers.clear()

    def wait_until(self, now: float) -> None:
        self.now = now
        due = [timer for timer in self.timers if timer[0] <= now]
        self.timers = [timer for timer in self.timers if timer[0] > now]
        for _, callback in due:
            callback()


def test_a_bookmark_is_due_15_s_after_the_latest_response(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, woken = HandDrivenLoop(), asyncio.Event()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    with watch_streams._BookmarkTimer(woken, sent=True) as timer:
        loop.wait_until(1010.0)
        timer.restart()
        loop.wait_until(1024.0)
        assert (woken.is_set(), timer.left_s) == (False, 1.0)
        loop.wait_until(1025.0)
        assert (woken.is_set(), timer.left_s) == (True, 0.0)

        woken.clear()
        timer.restart()
        loop.wait_until(1039.0)
        assert (woken.is_set(), timer.left_s) == (False, 1.0)
        loop.wait_until(1040.0)
        assert (woken.is_set(), timer.left_s) == (True, 0.0)


async def test_a_resumed_watch_gets_a_bookmark_at_once() -> None:
    woken = asyncio.Event()
    with watch_streams._BookmarkTimer(woken, sent=False) as timer:
        assert (timer.left_s, woken.is_set()) == (0, True)


async def test_the_end_of_a_stream_ends_its_timer() -> None:
    woken = asyncio.Event()
    with watch_streams._BookmarkTimer(woken, sent=True) as timer:
        armed = timer._timer
    assert armed is not None
    assert armed.cancelled()


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


def watch(watcher: RunWatcher, after: int | None = None) -> AsyncIterator[pb.WatchRunResponse]:
    """Watch the run as a caller that may see every run."""
    CALLER.set(ANYONE)
    return parsed(watcher.stream(pb.WatchRunRequest(run_id="mine", after_sequence=after)))


async def parsed(
    stream: AsyncGenerator[pb.WatchRunResponse | bytes, None],
) -> AsyncGenerator[pb.WatchRunResponse, None]:
    async with aclosing(stream):
        async for one in stream:
            yield pb.WatchRunResponse.FromString(one) if isinstance(one, bytes) else one


def kinds(told: Iterable[pb.WatchRunResponse]) -> list[tuple[int, str | None]]:
    return [(one.sequence, one.WhichOneof("update")) for one in told]


def sequences(responses: Iterable[bytes]) -> list[int]:
    return [pb.WatchRunResponse.FromString(response).sequence for response in responses]


async def cancel(storage: Storage, owner: Owner) -> None:
    await storage.write(runs.cancel, "mine", owner=owner, etag=None, receipt=None, now=NOW)


@pytest.mark.parametrize(
    ("last_read", "after", "first"),
    [(runs.get, None, "snapshot"), (runs.progress, None, "snapshot"),
     (events.events_after, 0, "event")],
)  # fmt: skip
async def test_an_event_during_the_read_of_a_run_watcher_is_sent(
    storage: Storage,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    last_read: Callable[..., object],
    after: int | None,
    first: str,
) -> None:
    owner = claimed(database)
    created(database, owner)
    (key,) = database.fetch_all("SELECT id FROM run")[0]
    read_row, cancels = storage.read_row, iter([cancel])

    async def read_then_cancel(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        found = await read_row(use, *args, **named)
        if use is last_read and storage.changes.runs_watched:
            for cancel_now in cancels:
                await cancel_now(storage, owner)
        return found

    monkeypatch.setattr(storage, "read_row", read_then_cancel)
    told = []
    async with asyncio.timeout(20):
        async for response in watch(RunWatcher(storage, Gate()), after):
            told.append(response)
            storage.changes.announce([key])  # a change without an event: only counters are read

    assert kinds(told) == [(1, first), (2, "event")]


async def test_watchers_of_a_run_read_and_serialize_a_change_once(
    storage: Storage, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = claimed(database)
    created(database, owner)
    CALLER.set(ANYONE)
    watcher, request = RunWatcher(storage, Gate()), pb.WatchRunRequest(run_id="mine")
    streams = [watcher.stream(request) for _ in range(20)]
    for stream in streams:
        await anext(stream)
    read_row, reads = storage.read_row, list[Callable[..., object]]()

    async def noted(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        reads.append(use)
        return await read_row(use, *args, **named)

    monkeypatch.setattr(storage, "read_row", noted)
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await cancel(storage, owner)
    async with asyncio.timeout(20):
        sent = await asyncio.gather(*waiting)
    for stream in streams:
        await stream.aclose()

    assert reads == [runs.progress, runs.get, events.events_after]
    assert len({id(response) for response in sent}) == 1


async def test_a_change_that_nobody_announced_is_sent_when_a_bookmark_is_due(
    storage: Storage, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = claimed(database)
    created(database, owner)
    monkeypatch.setattr(watch_streams, "BOOKMARK_S", 0.05)
    told, cancels = [], iter([runs.cancel])
    async with asyncio.timeout(20):
        async for response in watch(RunWatcher(storage, Gate())):
            if response.HasField("bookmark"):
                for unannounced in cancels:
                    unannounced(database, "mine", owner=owner, etag=None, receipt=None, now=NOW)
            else:
                told.append(response)

    assert kinds(told) == [(1, "snapshot"), (2, "event")]


async def test_a_watcher_reads_again_what_another_watcher_failed_to_read(
    storage: Storage, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = claimed(database)
    created(database, owner)
    watcher = RunWatcher(storage, Gate())
    fails, reads = watch(watcher), watch(watcher)
    for stream in (fails, reads):
        await anext(stream)
    read_row, failures = storage.read_row, iter([StorageUnavailable("cut")])

    async def read_or_fail(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        for failure in failures:
            raise failure
        return await read_row(use, *args, **named)

    monkeypatch.setattr(storage, "read_row", read_or_fail)
    await cancel(storage, owner)
    async with asyncio.timeout(20):
        with pytest.raises(StorageUnavailable):
            await anext(fails)
        told = [response async for response in reads]

    assert kinds(told) == [(2, "event")]


@pytest.mark.parametrize(("shared", "kept"), [(1, [2]), (2, [1, 2])])
async def test_only_a_short_history_is_kept_for_other_watchers(
    storage: Storage,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    shared: int,
    kept: list[int],
) -> None:
    monkeypatch.setattr(watched_runs, "SHARED_EVENTS", shared)
    owner = claimed(database)
    created(database, owner)
    await cancel(storage, owner)
    run = await storage.read_row(runs.get, "mine")
    watched = watched_runs.WatchedRun(storage, "mine", run.key, RunWaiters())
    state = await watched.state(missed_changes=False)

    found = [
        [
            pb.WatchRunResponse.FromString(response).sequence
            for response in await watched.responses(state, after)
        ]
        for after in (0, 1, 2)
    ]

    assert found == [[1, 2], [2], []]
    assert [pb.WatchRunResponse.FromString(response).sequence for response in state.latest] == kept


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
