"""Carries out the deadlines of runs: of waits, whole runs, pauses, and sessions kept for ReopenRun.

Deadlines are stored, so a restart forgets none. Those that passed while the service was down are
carried out right after its start.
"""

from __future__ import annotations

import asyncio
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, error_facts
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import passed_deadlines
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.passed_deadlines import PassedDeadline

log = structlog.get_logger()

CHECK_INTERVAL_S: Final = 0.25
"""Pause between two checks, by which a deadline can be carried out late."""
PER_CHECK: Final = 500
_TOGETHER: Final = {
    DueKind.RESUME: passed_deadlines.end_pauses,
    DueKind.REOPEN: passed_deadlines.end_reopening,
}
"""Deadlines that only change rows, so that one write carries out many of one kind. The kind that
deletes data comes last."""


@dataclass(slots=True, kw_only=True, eq=False)
class Deadlines:
    """Carries out deadlines that have passed, until it is stopped."""

    storage: Storage
    owner: Owner
    clock: Clock
    turns: RunningTurns
    stop_signal: StopSignal
    _loop: PeriodicTask = field(init=False)
    _failed: set[PassedDeadline] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._loop = PeriodicTask(
            name="deadlines",
            step=self.check,
            interval_s=CHECK_INTERVAL_S,
            failure_event="execution.deadlines_failed",
            stop_signal=self.stop_signal,
            first_wait_s=0.0,
        )

    def start(self) -> None:
        """Start the checks. The recovery has converted all deadlines to the present clock."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the checks. The store can still commit writes that it already has."""
        await self._loop.cancel()

    async def check(self) -> None:
        """Carry out passed deadlines concurrently, so that their writes share commits."""
        found = await self.storage.read_row(
            passed_deadlines.find,
            self.owner,
            steady=self.clock.steady(),
            limit=PER_CHECK,
        )
        if not all(one.is_of_clock for one in found):  # a peer on another clock has reopened a run
            await self.storage.write_own(
                passed_deadlines.move_to_clock,
                self.owner,
                now=self.clock.now(),
                steady=self.clock.steady(),
            )
            found = [one for one in found if one.is_of_clock]
        async with asyncio.TaskGroup() as group:
            for one in found:
                if one.kind not in _TOGETHER:
                    group.create_task(self._try_to_carry_out(one))
        for kind, end in _TOGETHER.items():
            if run_keys := [one.run_key for one in found if one.kind is kind]:
                await self.storage.write(
                    end, run_keys, owner=self.owner, steady=self.clock.steady()
                )

    async def _try_to_carry_out(self, one: PassedDeadline) -> None:
        """Carry out one deadline. A failure does not prevent the others."""
        try:
            await self._carry_out(one)
            self._failed.discard(one)
        except Fenced as error:
            self.stop_signal.fail(error)
        except Exception as error:  # noqa: BLE001 - the next check tries again
            if one not in self._failed:
                self._failed.add(one)
                log.warning(
                    "execution.deadline_failed",
                    run_key=one.run_key,
                    kind=one.kind.value,
                    **error_facts(error),
                )

    async def _carry_out(self, one: PassedDeadline) -> None:
        end = passed_deadlines.end_wait if one.kind is DueKind.WAIT else passed_deadlines.end_run
        run = await self.storage.write(
            end,
            one.run_key,
            owner=self.owner,
            now=self.clock.now(),
            steady=self.clock.steady(),
        )
        if run is None:
            return
        if run.holds_slot and (one.kind is DueKind.RUN or run.status is RunStatus.WAITING_USER):
            self.turns.time_out(run.run_id, one.kind)
        elif one.kind is DueKind.WAIT:
            log.info("execution.auto_decided", run_id=run.run_id)
        else:
            log.info("execution.run_timed_out", run_id=run.run_id)
