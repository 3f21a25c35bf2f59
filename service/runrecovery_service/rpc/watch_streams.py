"""Streams of the events of one run, and of the decisions of restarts.

Nothing is buffered for a reader. A stream continues after its last response, with events that it
reads, or that all watchers of the run share. So a slow reader costs no memory, and a broken stream
can be resumed later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.domain.errors import ShuttingDown
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.run import Run
from runrecovery_service.rpc import recovery_messages, validation
from runrecovery_service.rpc.fair_wakeup import FairWakeup
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.visibility import demand_visible
from runrecovery_service.rpc.watched_runs import WatchedRuns
from runrecovery_service.storage import decision_feed, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.decision_feed import FeedCursor

BOOKMARK_S: Final = 15.0
"""After this time without a response, a stream sends a bookmark, and reads the database for missed
changes."""
DECISIONS_PER_READ: Final = 500


class _BookmarkTimer:
    """Sets an event when the next bookmark of a stream is due. A context manager.

    A response only records its time, because to set a timer again costs as much as to wake a
    stream. The timer finds out when it fires whether a response has postponed it.

    Args:
        sent: True when a response has just been sent; False makes a bookmark due at once.
    """

    def __init__(self, woken: asyncio.Event, *, sent: bool) -> None:
        self._woken = woken
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time() if sent else -BOOKMARK_S
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> _BookmarkTimer:
        self._fire()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def restart(self) -> None:
        """Record that a response was sent."""
        self._since = self._loop.time()
        if self._timer is None:
            self._fire()

    @property
    def left_s(self) -> float:
        """Seconds until a bookmark is due. A wake-up without a response does not postpone it."""
        return max(0.0, self._since + BOOKMARK_S - self._loop.time())

    def _fire(self) -> None:
        if left_s := self.left_s:
            self._timer = self._loop.call_later(left_s, self._fire)
        else:
            self._timer = None
            self._woken.set()


class RunWatcher:
    """Streams the events of one run to each caller of WatchRun."""

    def __init__(self, storage: Storage, gate: Gate) -> None:
        self._storage = storage
        self._gate = gate
        self._wakeup = FairWakeup()
        self._watched = WatchedRuns(storage)

    async def stream(
        self, request: pb.WatchRunRequest
    ) -> AsyncGenerator[pb.WatchRunResponse | bytes, None]:
        """Yield a snapshot, or resume after the caller's sequence; then yield every event, encoded.

        Raises:
            InvalidFields, RunNotFound, WatchHistoryPruned, WatchSequenceUnknown: see their docs.
            ShuttingDown: the caller can resume after the restart.
        """
        validation.require_valid(validation.watch_run(request))
        run_id = request.run_id
        await demand_visible(self._storage, run_id)
        key = (await self._storage.read_row(runs.get, run_id)).key
        woken = asyncio.Event()
        with (
            self._storage.changes.of_run(key, woken) as waiters,
            self._gate.notify(woken),
        ):
            watched = self._watched.get(run_id, key, waiters)
            state = await watched.state(missed_changes=True)
            resumes = request.HasField("after_sequence")
            at = request.after_sequence if resumes else state.run.event_count
            if not resumes:
                yield pb.WatchRunResponse(sequence=at, snapshot=state.message)
            with _BookmarkTimer(woken, sent=not resumes) as timer:
                while True:
                    await self._wakeup.wait_turn()
                    woken.clear()
                    is_due = not timer.left_s
                    state = await watched.state(missed_changes=is_due or self._gate.ends_streams)
                    for response in await watched.responses(state, at):
                        yield response
                        timer.restart()
                    at = state.run.event_count
                    if _has_ended(state.run):
                        return
                    if self._gate.ends_streams:
                        raise ShuttingDown
                    if is_due and not timer.left_s:
                        yield pb.WatchRunResponse(sequence=at, bookmark=run_pb2.WatchBookmark())
                        timer.restart()
                    await woken.wait()


def _has_ended(run: Run) -> bool:
    """True when no further event will come by itself: the run is terminal or quarantined."""
    return run.quarantined or (run.status is not None and run.status.is_terminal)


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
            with _BookmarkTimer(woken, sent=False) as timer:
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
                        await woken.wait()

    def _bookmark(self, place: FeedCursor) -> recovery_pb.WatchRecoveredResponse:
        return recovery_pb.WatchRecoveredResponse(
            cursor=self._page_tokens.encode_bookmark(place), bookmark=run_pb2.WatchBookmark()
        )
