"""Streams of the events of one run, and of the decisions of restarts.

Nothing is buffered for a reader. A stream always reads the events after its last response from the
database. So a slow reader costs no memory, and a broken stream can be resumed later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import field
from typing import Final
from weakref import WeakValueDictionary

from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.domain.errors import ShuttingDown
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.run import Run, RunEvent
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import recovery_messages, run_messages, validation
from runrecovery_service.rpc.fair_wakeup import FairWakeup
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.visibility import demand_visible
from runrecovery_service.storage import decision_feed, events, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.decision_feed import FeedCursor
from runrecovery_service.storage.runs import RunProgress

BOOKMARK_S: Final = 15.0
"""After this time without a response, a stream sends a bookmark, and reads the database for missed
changes."""
DECISIONS_PER_READ: Final = 500


class _BookmarkTimer:
    """Computes the time of the next bookmark of a stream.

    Args:
        sent: True when a response has just been sent; False makes a bookmark due at once.
    """

    def __init__(self, *, sent: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time() if sent else -BOOKMARK_S

    def restart(self) -> None:
        """Record that a response was sent."""
        self._since = self._loop.time()

    @property
    def left_s(self) -> float:
        """Seconds until a bookmark is due. A wake-up without a response does not postpone it."""
        return max(0.0, self._since + BOOKMARK_S - self._loop.time())

    async def wait(self, woken: asyncio.Event) -> None:
        """Wait until the event is set or a bookmark is due."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.left_s):
                await woken.wait()


@dataclass(slots=True, weakref_slot=True, eq=False)
class _CachedRun:
    """The present state of a run, decoded and encoded once for all its watchers."""

    run: Run
    message: run_pb2.Run = field(default_factory=run_pb2.Run)

    def __post_init__(self) -> None:
        run_messages.fill_run(self.message, self.run)

    def is_current(self, progress: RunProgress | None) -> bool:
        """True when the run has not changed since this state was read."""
        return progress == RunProgress(self.run.version, self.run.event_count)


class RunWatcher:
    """Streams the events of one run to each caller of WatchRun."""

    def __init__(self, storage: Storage, gate: Gate) -> None:
        self._storage = storage
        self._gate = gate
        self._wakeup = FairWakeup()
        self._states: WeakValueDictionary[str, _CachedRun] = WeakValueDictionary()

    async def stream(
        self, request: pb.WatchRunRequest
    ) -> AsyncGenerator[pb.WatchRunResponse, None]:
        """Yield a snapshot, or resume after the caller's sequence; then yield every event.

        Raises:
            InvalidFields, RunNotFound, WatchHistoryPruned, WatchSequenceUnknown: see their docs.
            ShuttingDown: the caller can resume after the restart.
        """
        validation.require_valid(validation.watch_run(request))
        run_id = request.run_id
        await demand_visible(self._storage, run_id)
        key = (await self._storage.read_row(runs.get, run_id)).key
        woken = asyncio.Event()
        with self._storage.changes.of_run(key, woken), self._gate.notify(woken):
            state = await self._state(run_id, key)
            resumes = request.HasField("after_sequence")
            at = request.after_sequence if resumes else state.run.event_count
            if not resumes:
                yield pb.WatchRunResponse(sequence=at, snapshot=state.message)
            timer = _BookmarkTimer(sent=not resumes)
            while True:
                await self._wakeup.wait_turn()
                woken.clear()
                state = await self._state(run_id, key)
                for event in await self._storage.read_row(events.events_after, state.run, at):
                    yield _event_response(event, state)
                    timer.restart()
                at = state.run.event_count
                if _has_ended(state.run):
                    return
                if self._gate.ends_streams:
                    raise ShuttingDown
                if not timer.left_s:
                    yield pb.WatchRunResponse(sequence=at, bookmark=run_pb2.WatchBookmark())
                    timer.restart()
                await timer.wait(woken)

    async def _state(self, run_id: str, run_key: int) -> _CachedRun:
        """Return the present state of the run; read and encode it only when it has changed.

        The cache is keyed by run_id: after the database lost commits, another run may have the key.
        """
        state = self._states.get(run_id)
        if state is None or not state.is_current(
            await self._storage.read_row(runs.progress, run_key)
        ):
            state = _CachedRun(await self._storage.read_row(runs.get, run_id))
            self._states[run_id] = state
        return state


def _has_ended(run: Run) -> bool:
    """True when no further event will come by itself: the run is terminal or quarantined."""
    return run.quarantined or (run.status is not None and run.status.is_terminal)


def _event_response(event: RunEvent, state: _CachedRun) -> pb.WatchRunResponse:
    response = pb.WatchRunResponse(sequence=event.sequence)
    run_messages.fill_event(response.event, event)
    if event.sequence == state.run.event_count:
        response.event.run.CopyFrom(state.message)
    return response


class RecoveredWatcher:
    """Streams the decisions of restarts to each caller of WatchRecovered."""

    def __init__(self, storage: Storage, gate: Gate, page_tokens: PageTokens) -> None:
        self._storage = storage
        self._gate = gate
        self._page_tokens = page_tokens
        self._wakeup = FairWakeup()

    async def stream(
        self, request: recovery_pb.WatchRecoveredRequest, wanted: RecoveredFilter
    ) -> AsyncGenerator[recovery_pb.WatchRecoveredResponse, None]:
        """Yield a bookmark with the first cursor, then every later decision of the filter.

        Raises:
            WatchCursorInvalid: no decision has this cursor.
            ShuttingDown: the caller can resume after the restart.
        """
        woken = asyncio.Event()
        with self._storage.changes.of_decisions(woken), self._gate.notify(woken):
            place = self._page_tokens.decode_cursor(request.after_cursor)
            if place is None:
                place = await self._storage.read(decision_feed.end_cursor)
            else:
                await self._storage.read(decision_feed.demand_valid, place)
            timer = _BookmarkTimer(sent=False)
            while True:
                await self._wakeup.wait_turn()
                if self._gate.ends_streams:
                    raise ShuttingDown
                if not timer.left_s:
                    yield self._bookmark(place)
                    timer.restart()
                woken.clear()
                stretch = await self._storage.read(
                    decision_feed.decisions_after, place, wanted, limit=DECISIONS_PER_READ
                )
                for decided in stretch.decided:
                    await self._wakeup.wait_turn()
                    response = recovery_pb.WatchRecoveredResponse(
                        cursor=self._page_tokens.encode_cursor(decided.cursor)
                    )
                    recovery_messages.fill_recovered_run(response.decision, decided)
                    yield response
                    timer.restart()
                place = stretch.upto
                if not stretch.more:
                    await timer.wait(woken)

    def _bookmark(self, place: FeedCursor) -> recovery_pb.WatchRecoveredResponse:
        return recovery_pb.WatchRecoveredResponse(
            cursor=self._page_tokens.encode_bookmark(place), bookmark=run_pb2.WatchBookmark()
        )
