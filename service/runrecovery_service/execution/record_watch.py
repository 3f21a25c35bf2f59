"""Passes on to running turns what callers had accepted for their runs: cancels and replies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

import structlog

from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import turns
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.changes import Subscription
from runrecovery_service.storage.instances import Owner

log = structlog.get_logger()

CHECK_INTERVAL_S: Final = 5.0
"""On a shared store, all records are read after so long without a change."""
RETRY_S: Final = 0.5
"""After a read that failed."""


@dataclass(slots=True, kw_only=True, eq=False)
class RecordWatch:
    """Reads the record of each running turn whose run has changed, and informs its supervisor.

    A change in doubt, whose COMMIT answer was lost, makes it read the records of all turns at once:
    a cancel or a reply may be committed although its caller got an error.
    """

    storage: Storage
    owner: Owner
    turns: RunningTurns
    stop_signal: StopSignal
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _due_keys: set[int] = field(default_factory=set, init=False)
    _all_due: bool = field(default=False, init=False)

    def start(self) -> None:
        """Start to watch. Every change from now on is noticed."""
        changes = self.storage.changes.subscribe()
        self._task = asyncio.create_task(self._work(changes), name="record-watch")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self, changes: Subscription) -> None:
        reported = ""
        with changes:
            while True:
                try:
                    await self._inform()
                    reported = ""
                except Fenced as error:
                    self.stop_signal.fail(error)
                    return
                except Exception as error:  # the edge of this task: the next round tries again
                    if reported != (reported := type(error).__name__):
                        log.warning(
                            "execution.records_unread",
                            **error_facts(error),
                            exc_info=not is_outage(error),
                        )
                await self._wait(changes)

    async def _wait(self, changes: Subscription) -> None:
        """Return at a change, or when it is time to read without one."""
        is_due = self._all_due or bool(self._due_keys)
        change = await changes.next(RETRY_S if is_due else CHECK_INTERVAL_S)
        if change is not None:
            self._due_keys |= change.run_keys
            self._all_due = self._all_due or change.in_doubt
        elif self.storage.is_shared:
            self._all_due = True  # another process may have written

    async def _inform(self) -> None:
        """Read what is due, and inform the supervisors. What failed stays due."""
        due_keys, self._due_keys = self._due_keys, set()
        all_due, self._all_due = self._all_due, False
        try:
            for supervisor in self.turns.supervisors:
                is_due = all_due or supervisor.turn.run.key in due_keys
                if is_due and supervisor in self.turns:  # otherwise it has ended meanwhile
                    await self._inform_one(supervisor)
        except BaseException:
            self._due_keys |= due_keys
            self._all_due = self._all_due or all_due
            raise

    async def _inform_one(self, supervisor: TurnSupervisor) -> None:
        """Pass an accepted cancel or reply to the supervisor. It may get the same one twice."""
        run = await self.storage.read_row(turns.current_run, supervisor.turn, owner=self.owner)
        if run.cancel_requested:
            supervisor.cancel()
        elif run.status is RunStatus.RUNNING:
            supervisor.deliver()
