"""Passes accepted cancels and replies of callers on to running turns."""

from __future__ import annotations

import asyncio
from dataclasses import field
from typing import Final

from runrecovery_service.clock import loop_time_s
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import FailureLog
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import turns
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.changes import SharedPoll, Subscription, event_counts
from runrecovery_service.storage.instances import Owner

CHECK_INTERVAL_S: Final = 2.0
"""Seconds between two polls of a shared store for runs that peers have changed. The commits of
peers announce nothing on this instance."""
RETRY_S: Final = 0.5
"""Pause after a failed read."""


@dataclass(slots=True, kw_only=True, eq=False)
class RecordWatch:
    """Reads the run of each turn under way after a change, and informs the turn's supervisor.

    If the answer to a COMMIT was lost, the runs of all turns are read at once: the COMMIT possibly
    recorded a cancel or a reply, although the caller got an error. On a shared store, one query
    for all turns also polls for runs with new events.
    """

    storage: Storage
    owner: Owner
    turns: RunningTurns
    stop_signal: StopSignal
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _due_keys: set[int] = field(default_factory=set, init=False)
    _all_due: bool = field(default=False, init=False)
    _poll: SharedPoll = field(default_factory=SharedPoll, init=False)
    _is_poll_due: bool = field(default=False, init=False)
    _poll_due_s: float = field(default=0.0, init=False)
    _failures: FailureLog = field(init=False)

    def __post_init__(self) -> None:
        self._failures = FailureLog(failure_event="execution.records_unread")

    def start(self) -> None:
        """Start to watch. Every later change is noticed."""
        changes = self.storage.changes.subscribe()
        self._task = asyncio.create_task(self._work(changes), name="record-watch")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self, changes: Subscription) -> None:
        self._schedule_poll()
        with changes:
            while True:
                await self._wait(changes)
                try:
                    await self._inform()
                except Fenced as error:
                    self.stop_signal.fail(error)
                    return

    def _schedule_poll(self) -> None:
        self._poll_due_s = loop_time_s() + CHECK_INTERVAL_S

    async def _wait(self, changes: Subscription) -> None:
        """Wait for a change, or for the time of the next read without a change."""
        pause_s = max(0.0, self._poll_due_s - loop_time_s())
        if self._due_keys:
            pause_s = min(pause_s, RETRY_S)
        change = await changes.next(pause_s)
        if change is not None:
            self._due_keys |= change.run_keys
            self._all_due = change.in_doubt
        if loop_time_s() >= self._poll_due_s:
            self._is_poll_due = self.storage.is_shared
            self._schedule_poll()

    async def _inform(self) -> None:
        """Read the due runs, and inform their supervisors. A run that cannot be read stays due."""
        if self._is_poll_due:
            self._is_poll_due = False
            self._due_keys |= await self._changed_by_peers()
        due_keys, self._due_keys = self._due_keys, set()
        all_due, self._all_due = self._all_due, False
        for supervisor in self.turns.supervisors:
            key = supervisor.turn.run.key
            is_due = all_due or key in due_keys
            is_due = is_due and supervisor in self.turns  # a turn can have ended meanwhile
            if is_due and not await self._could_inform(supervisor):
                self._due_keys.add(key)
        if not self._due_keys:
            self._failures.note_success()

    async def _changed_by_peers(self) -> set[int]:
        """Return the runs of turns here that peers have possibly changed since the last poll."""
        keys = {supervisor.turn.run.key for supervisor in self.turns.supervisors}
        if not keys:
            return keys
        try:
            counts = await self.storage.read(event_counts, keys)
        except Exception as error:  # noqa: BLE001 - the reads of the records meet it too, and are retried
            self._failures.report(error)
            return keys
        gone = keys - counts.keys()  # lost by a failover, as the next read of each run will find
        return {*self._poll.changed(counts), *gone}

    async def _could_inform(self, supervisor: TurnSupervisor) -> bool:
        """Inform a supervisor. Return False, and log why, if its run could not be read.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        try:
            await self._inform_one(supervisor)
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 - one run must not delay the others
            self._failures.report(error)
            return False
        return True

    async def _inform_one(self, supervisor: TurnSupervisor) -> None:
        """Pass an accepted cancel or reply to the supervisor, possibly for a second time."""
        run = await self.storage.read_row(turns.current_run, supervisor.turn, owner=self.owner)
        if run.cancel_requested:
            supervisor.cancel()
        elif run.status is RunStatus.RUNNING:
            supervisor.deliver()
