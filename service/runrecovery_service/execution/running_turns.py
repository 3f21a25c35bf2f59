"""The turns under way. Each has a slot until its end is recorded."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import field

from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.execution.lease_deadline import TreeDeadline
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.lazy_dataclass import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class RunningTurns:
    """The supervisors of all turns under way, with their tasks."""

    tree_deadline: TreeDeadline
    _tasks: dict[TurnSupervisor, asyncio.Task[None]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, supervisor: TurnSupervisor) -> bool:
        return supervisor in self._tasks

    def add(self, supervisor: TurnSupervisor, task: asyncio.Task[None]) -> None:
        """Add a supervisor, and the task that follows its turn."""
        self._tasks[supervisor] = task

    def remove(self, supervisor: TurnSupervisor) -> None:
        """Free the slot of a turn."""
        del self._tasks[supervisor]

    def clear(self) -> None:
        """Free every slot."""
        self._tasks.clear()

    @property
    def supervisors(self) -> list[TurnSupervisor]:
        """A copy of the present supervisors."""
        return list(self._tasks)

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The tasks that follow the turns."""
        return list(self._tasks.values())

    @property
    def ending_tasks(self) -> list[asyncio.Task[None]]:
        """The tasks of turns that are over, whose end is being carried out and recorded."""
        return [task for supervisor, task in self._tasks.items() if supervisor.is_ending]

    @property
    def ending_runs(self) -> frozenset[int]:
        """The keys of the runs whose turn is over, but still has a supervisor.

        The end can be recorded without the supervisor's knowledge, because the answer to the COMMIT
        is late or was lost.
        """
        return frozenset(one.turn.run.key for one in self._tasks if one.is_ending)

    @property
    def at_work(self) -> int:
        """The number of turns that do not wait for their user."""
        return sum(not supervisor.state.is_waiting for supervisor in self._tasks)

    @property
    def cookies(self) -> frozenset[str]:
        """The cookies of the launches that have a supervisor."""
        return frozenset(supervisor.turn.launch.cookie for supervisor in self._tasks)

    @property
    def engines_in_use(self) -> Counter[str]:
        """The number of turns of each engine."""
        return Counter(supervisor.turn.run.engine for supervisor in self._tasks)

    def time_out(self, run_id: str, kind: DueKind) -> None:
        """End the process of a run whose deadline has passed.

        A run that is just being taken from the queue is missed here. The next check of the
        deadlines finds it.
        """
        for supervisor in self._tasks:
            if supervisor.turn.run.run_id == run_id:
                supervisor.time_out(kind)

    def heartbeat(self, deadline_ns: int) -> None:
        """Set a later tree deadline, and send it to every shim.

        Args:
            deadline_ns: nanoseconds of CLOCK_BOOTTIME.
        """
        self.tree_deadline.move_to(deadline_ns)
        for supervisor in self._tasks:
            supervisor.launch.heartbeat()

    def check_shims(self) -> None:
        """Check that every turn has a working shim."""
        for supervisor in self._tasks:
            supervisor.check_shim()
