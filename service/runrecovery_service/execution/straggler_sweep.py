"""Ends leftover processes of launches that are over, while the service runs.

If a process tree could not be ended, sweeps retry until it is gone. Its run can continue then. For
launches that ended recently, sweeps search again, because one scan of the process table can miss a
process.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service.agents.end_launches import remove_cgroup
from runrecovery_service.agents.launch_markers import launch_markers
from runrecovery_service.clock import Clock
from runrecovery_service.execution.blocking import run_blocking
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import launch_records
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd, LaunchRecord

log = structlog.get_logger()

SWEEP_INTERVAL_S: Final = 2.0
"""Pause between sweeps. A sweep takes some 30 ms if there are launches to search for."""
CLOSED_WITHIN_S: Final = 60.0
"""How long sweeps search for processes of a launch after it was closed."""
SWEEP_DEADLINE_S: Final = 10.0
"""Time limit, after `cancel_grace_s`, for ending the processes that a sweep finds."""


@dataclass(slots=True, kw_only=True, eq=False)
class StragglerSweep:
    """Sweeps until it is stopped, and checks the shims of running turns at the same time."""

    storage: Storage
    owner: Owner
    clock: Clock
    turns: RunningTurns
    launcher: Launcher
    stop_signal: StopSignal
    _loop: PeriodicTask = field(init=False)
    _reported: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._loop = PeriodicTask(
            name="straggler-sweep",
            step=self._step,
            interval_s=SWEEP_INTERVAL_S,
            failure_event="execution.patrol_failed",
            stop_signal=self.stop_signal,
        )

    def start(self) -> None:
        """Start the sweeps."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the sweeps, after the sweep that is under way."""
        await self._loop.finish()

    async def _step(self) -> None:
        self.turns.check_shims()
        await self.sweep()

    async def sweep(self) -> None:
        """Search once for processes of launches that are over, and end those that are found."""
        found = await self.storage.read(
            launch_records.launches_to_sweep,
            self.owner,
            now=self.clock.now(),
            closed_within_s=CLOSED_WITHIN_S,
        )
        supervised = self.turns.cookies
        launches = [launch for launch in found if launch.cookie not in supervised]
        if not launches:
            return
        endings = await run_blocking(self._threads, self._end, launches)
        late = [
            (launch, endings[launch.key])
            for launch in launches
            if launch.unended or endings[launch.key].found or not endings[launch.key].gone
        ]
        if late:
            await self._record(late)

    @property
    def _threads(self) -> Executor:
        return self.launcher.threads

    def _end(self, launches: Sequence[LaunchRecord]) -> dict[int, Ending]:
        return dict(
            self.launcher.end_trees(
                [launch_markers(launch) for launch in launches],
                why="patrol",
                deadline_s=self.launcher.cancel_grace_s + SWEEP_DEADLINE_S,
            )
        )

    async def _record(self, late: Sequence[tuple[LaunchRecord, Ending]]) -> None:
        ended = [
            (launch, LaunchEnd(exit_code=None, processes_ended=ending.ended, gone=ending.gone))
            for launch, ending in late
        ]
        await self.storage.write(launch_records.record_late_end, ended, now=self.clock.now())
        for launch, ending in late:
            self._report(launch, ending)

    def _report(self, launch: LaunchRecord, ending: Ending) -> None:
        if ending.gone:
            remove_cgroup(self.launcher.cgroups, launch)
        facts = {"run_id": launch.run_id, "attempt": launch.attempt, "turn": launch.turn}
        if ending.ended or ending.gone:
            log.warning(
                "execution.straggler_ended", **facts, processes=ending.ended, gone=ending.gone
            )
        for refusal in ending.refused:
            if refusal not in self._reported:  # logged once, not in every sweep
                self._reported.add(refusal)
                log.warning("execution.tree_not_ended", **facts, reason=refusal)
