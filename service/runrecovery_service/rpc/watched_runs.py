"""Runs as their watchers see them: read and encoded once after a change, for all watchers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Final
from weakref import WeakValueDictionary

from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.domain.run import Run, RunEvent
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import run_messages
from runrecovery_service.storage import events, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.changes import RunWaiters
from runrecovery_service.storage.runs import RunProgress

SHARED_EVENTS: Final = 16
"""The most events that a state keeps encoded. A watcher that is further behind reads for itself, so
that a long history takes no memory once it is sent."""


@dataclass(slots=True, eq=False)
class RunState:
    """The state of a run at one time.

    Attributes:
        message: the run, as a message.
        latest: the encoded responses of the latest events, as far as they are shared.
    """

    run: Run
    message: run_pb2.Run = field(default_factory=run_pb2.Run)
    latest: Sequence[bytes] = ()

    def __post_init__(self) -> None:
        run_messages.fill_run(self.message, self.run)

    def is_current(self, progress: RunProgress | None) -> bool:
        """True when the run has not changed since this state was read."""
        return progress == RunProgress(self.run.version, self.run.event_count)

    def shared_after(self, sequence: int) -> Sequence[bytes] | None:
        """Return the responses after a sequence number; None if they are not shared."""
        behind = self.run.event_count - sequence
        return self.latest[len(self.latest) - behind :] if 0 <= behind <= len(self.latest) else None

    def encode(self, event: RunEvent) -> bytes:
        """Return the response with an event. That of the latest event has the run."""
        response = pb.WatchRunResponse(sequence=event.sequence)
        run_messages.fill_event(response.event, event)
        if event.sequence == self.run.event_count:
            response.event.run.CopyFrom(self.message)
        return response.SerializeToString()


class WatchedRun:
    """One run that has watchers. They share its state until the next change is announced."""

    def __init__(self, storage: Storage, run_id: str, key: int, waiters: RunWaiters) -> None:
        self._storage = storage
        self._run_id = run_id
        self._key = key
        self.waiters = waiters
        self._state: RunState | None = None
        self._changes_seen = -1
        # One watcher reads, and all others wait for what it has read.
        self._reading = asyncio.Lock()

    async def state(self, *, missed_changes: bool) -> RunState:
        """Return the state of the run; read the database only after an announced change.

        Args:
            missed_changes: read the database in any case.
        """
        if not missed_changes and (state := self._unchanged()) is not None:
            return state
        async with self._reading:
            if not missed_changes and (state := self._unchanged()) is not None:
                return state
            seen = self.waiters.changes  # before the read, which may miss a later change
            state = self._state
            if state is None or not state.is_current(
                await self._storage.read_row(runs.progress, self._key)
            ):
                state = RunState(await self._storage.read_row(runs.get, self._run_id))
            self._state, self._changes_seen = state, seen
            return state

    def _unchanged(self) -> RunState | None:
        return self._state if self._changes_seen == self.waiters.changes else None

    async def responses(self, state: RunState, after: int) -> Iterable[bytes]:
        """Return the encoded responses of the events after sequence number `after`.

        Raises:
            WatchHistoryPruned, WatchSequenceUnknown: see `events_after`.
        """
        if (shared := state.shared_after(after)) is not None:
            return shared
        async with self._reading:
            if (shared := state.shared_after(after)) is not None:
                return shared
            found = await self._storage.read_row(events.events_after, state.run, after)
            if len(found) > SHARED_EVENTS:
                return map(state.encode, found)
            state.latest = tuple(map(state.encode, found))
            return state.latest


class WatchedRuns:
    """All runs that have watchers."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._runs: WeakValueDictionary[str, WatchedRun] = WeakValueDictionary()

    def get(self, run_id: str, key: int, waiters: RunWaiters) -> WatchedRun:
        """Return the run that all its present watchers share."""
        found = self._runs.get(run_id)
        # After the database lost commits, another run may have the key, or the run another key.
        if found is None or found.waiters is not waiters:
            found = self._runs[run_id] = WatchedRun(self._storage, run_id, key, waiters)
        return found
