"""Streams of what happens: to one run, and of decisions. Nothing is kept for a reader: each reads
on from where it stands, so that a slow one costs nothing and a broken one goes on later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.domain.errors import ShuttingDown
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.run import Run, RunEvent
from runrecovery_service.rpc import paging, recovery_messages, run_messages, validation
from runrecovery_service.rpc.fair_wakeup import FairWakeup
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.storage import events, feed, runs
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.feed import Place
from runrecovery_service.storage.runs import Stand

BOOKMARK_S: Final = 15.0
"""After so long with nothing to tell: a sign of life, and a look whether something was missed."""
DECISIONS_PER_LOOK: Final = 500


class _Quiet:
    """Since when a stream has told nothing. `told`: it has just told something."""

    def __init__(self, *, told: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time() if told else -BOOKMARK_S

    def told(self) -> None:
        """Something was told."""
        self._since = self._loop.time()

    @property
    def left_s(self) -> float:
        """Seconds until a sign of life is due; 0 when it is. What only wakes us delays it not."""
        return max(0.0, self._since + BOOKMARK_S - self._loop.time())

    async def wait(self, woken: asyncio.Event) -> None:
        """Return when the event is set, or a sign of life is due."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.left_s):
                await woken.wait()


@dataclass(slots=True, weakref_slot=True, eq=False)
class _State:
    """A run as it stands, decoded and built once for all who watch it."""

    run: Run
    message: run_pb2.Run = field(default_factory=run_pb2.Run)

    def __post_init__(self) -> None:
        run_messages.fill_run(self.message, self.run)

    def is_of(self, stand: Stand | None) -> bool:
        """True while nothing has changed since."""
        return stand == Stand(self.run.version, self.run.event_count)


class RunWatcher:
    """Tells what happens to one run, to each of its callers."""

    def __init__(self, storage: Storage, gate: Gate) -> None:
        self._storage = storage
        self._gate = gate
        self._wakeup = FairWakeup()
        self._states: WeakValueDictionary[str, _State] = WeakValueDictionary()

    async def stream(
        self, request: pb.WatchRunRequest
    ) -> AsyncGenerator[pb.WatchRunResponse, None]:
        """Yield a snapshot, unless the caller stands somewhere already; then every event.

        Raises:
            InvalidFields, RunNotFound, WatchHistoryPruned, WatchSequenceUnknown: it cannot begin.
            ShuttingDown: it can be gone on with elsewhere, or after the restart.
        """
        validation.demand_valid(validation.watch_run(request))
        run_id = request.run_id
        key = (await self._storage.point(runs.get, run_id)).key
        woken = asyncio.Event()
        with self._storage.changes.of_run(key, woken), self._gate.following(woken):
            state = await self._state(run_id, key)
            goes_on = request.HasField("after_sequence")
            at = request.after_sequence if goes_on else state.run.event_count
            if not goes_on:
                yield pb.WatchRunResponse(sequence=at, snapshot=state.message)
            quiet = _Quiet(told=not goes_on)
            while True:
                await self._wakeup.wait_turn()
                woken.clear()
                state = await self._state(run_id, key)
                for event in await self._storage.point(events.between, state.run, at):
                    yield _told(event, state)
                    quiet.told()
                at = state.run.event_count
                if _is_over(state.run):
                    return
                if self._gate.draining:
                    raise ShuttingDown
                if not quiet.left_s:
                    yield pb.WatchRunResponse(sequence=at, bookmark=run_pb2.WatchBookmark())
                    quiet.told()
                await quiet.wait(woken)

    async def _state(self, run_id: str, run_key: int) -> _State:
        """Return how the run stands; it is read and built again only when it has changed. By its
        run_id: the key is another run's where the database has lost commits."""
        state = self._states.get(run_id)
        if state is None or not state.is_of(await self._storage.point(runs.stand, run_key)):
            state = _State(await self._storage.point(runs.get, run_id))
            self._states[run_id] = state
        return state


def _is_over(run: Run) -> bool:
    """True when nothing will happen any more by itself: it has ended, or was set aside."""
    return run.quarantined or (run.status is not None and run.status.is_terminal)


def _told(event: RunEvent, state: _State) -> pb.WatchRunResponse:
    response = pb.WatchRunResponse(sequence=event.sequence)
    run_messages.fill_event(response.event, event)
    if event.sequence == state.run.event_count:
        response.event.run.CopyFrom(state.message)
    return response


class RecoveredWatcher:
    """Tells the decisions of restarts, to each of its callers."""

    def __init__(self, storage: Storage, gate: Gate) -> None:
        self._storage = storage
        self._gate = gate
        self._wakeup = FairWakeup()

    async def stream(
        self, request: recovery_pb.WatchRecoveredRequest, wanted: RecoveredFilter
    ) -> AsyncGenerator[recovery_pb.WatchRecoveredResponse, None]:
        """Yield where it begins, then every decision behind that which the filter lets through.

        Raises:
            WatchCursorInvalid: it cannot begin there.
            ShuttingDown: it can be gone on with elsewhere, or after the restart.
        """
        woken = asyncio.Event()
        with self._storage.changes.of_decisions(woken), self._gate.following(woken):
            place = paging.decode_cursor(request.after_cursor)
            if place is None:
                place = await self._storage.read(feed.end)
            else:
                await self._storage.read(feed.demand_known, place)
            quiet = _Quiet(told=False)
            while True:
                await self._wakeup.wait_turn()
                if self._gate.draining:
                    raise ShuttingDown
                if not quiet.left_s:
                    yield _bookmark(place)
                    quiet.told()
                woken.clear()
                stretch = await self._storage.read(
                    feed.behind, place, wanted, limit=DECISIONS_PER_LOOK
                )
                for decided in stretch.decided:
                    await self._wakeup.wait_turn()
                    response = recovery_pb.WatchRecoveredResponse(
                        cursor=paging.encode_cursor(decided.place)
                    )
                    recovery_messages.fill_recovered_run(response.decision, decided)
                    yield response
                    quiet.told()
                place = stretch.upto
                if not stretch.more:
                    await quiet.wait(woken)


def _bookmark(place: Place) -> recovery_pb.WatchRecoveredResponse:
    return recovery_pb.WatchRecoveredResponse(
        cursor=paging.encode_cursor(place), bookmark=run_pb2.WatchBookmark()
    )
