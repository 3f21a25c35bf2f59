"""Gives slots to queued runs, first come first served, and launches them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import structlog

from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow, RunGone
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.record_watch import RecordWatch
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.execution.supervisor_factory import SupervisorFactory
from runrecovery_service.periodic import FailureLog
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.changes import Subscription
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()

FINISH_S: Final = 5.0
"""How long a stop waits for turns that have ended and are only to be recorded."""
CHECK_INTERVAL_S = 5.0
"""The queue is checked when something changes, and at least this often."""
SHARED_CHECK_INTERVAL_S: Final = 1.0
"""On a shared store at least this often: peers queue runs, and have runs to take, without
notice."""


@dataclass(slots=True, kw_only=True, eq=False)
class Dispatcher:
    """Launches queued runs while slots are free.

    Attributes:
        capacity: processes at one time. Only a running turn holds a slot: the count cannot leak.
        failing_s: the time from the first to the last of the queue's failed checks in a row. A
            time and not their number, because many changes cause many checks within a moment.
    """

    queue: RunQueue
    supervisors: SupervisorFactory
    launcher: Launcher
    turns: RunningTurns
    capacity: int
    stop_signal: StopSignal
    failing_s: float = field(default=0.0, init=False)
    _failing_since: float | None = field(default=None, init=False)
    _is_taking: bool = field(default=True, init=False)
    _is_held: bool = field(default=False, init=False)
    _is_take_under_way: bool = field(default=False, init=False)
    _is_take_in_doubt: bool = field(default=False, init=False)
    _changes: Subscription | None = field(default=None, init=False)
    _record_watch: RecordWatch = field(init=False)
    _failures: FailureLog = field(init=False)
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._failures = FailureLog(failure_event="execution.queue_unreadable")
        self._record_watch = RecordWatch(
            storage=self.queue.storage,
            owner=self.queue.owner,
            turns=self.turns,
            stop_signal=self.stop_signal,
        )

    @property
    def slots_in_use(self) -> int:
        """Processes alive or being launched."""
        return len(self.turns)

    @property
    def at_work(self) -> int:
        """Turns that do not wait for their user, and one that is being taken from the queue."""
        return self.turns.at_work + self._is_take_under_way

    def start(self) -> None:
        """Start to launch. Not called in safe mode."""
        self._changes = self.queue.storage.changes.subscribe()
        self._record_watch.start()
        self._task = asyncio.create_task(self._work(self._changes), name="dispatcher")

    def check_queue(self) -> None:
        """Check the queue at once, although nothing has changed."""
        if self._changes is not None:
            self._changes.wake()

    def pause(self) -> None:
        """Take no run from the queue any more; turns under way continue."""
        self._is_taking = False

    def hold(self, *, held: bool) -> None:
        """Take no run from the queue while it is held; turns under way continue."""
        self._is_held = held
        self.check_queue()

    # -- stopping ------------------------------------------------------------------------------

    async def detach(self) -> None:
        """Stop launching, and stop supervising.

        Processes keep running, and no row is changed. Only the turns that are already ending are
        recorded first, for at most `FINISH_S`.
        """
        self.pause()
        if ending := self.turns.ending_tasks:
            await asyncio.wait(ending, timeout=FINISH_S)
        await self._record_watch.stop()
        tasks = self.turns.tasks
        if self._task is not None:
            tasks.append(self._task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for supervisor in self.turns.supervisors:
            supervisor.launch.withdraw()
            supervisor.launch.leave_output()

    async def release(self) -> None:
        """Detach, and reap the shims of trees that a recovery has ended."""
        await self.detach()
        for supervisor in self.turns.supervisors:
            gone = supervisor.launch.is_shim_gone
            await asyncio.to_thread(supervisor.launch.release, gone=gone)
        self.turns.clear()

    async def stop(self) -> None:
        """Detach, and end every process tree that is still alive."""
        await self.detach()
        left = self.turns.supervisors
        if not left:
            return
        log.info("execution.ending_all", processes=len(left))
        while left:  # once, unless a launch key was given out twice
            by_key = {supervisor.turn.launch.key: supervisor for supervisor in left}
            endings = await asyncio.to_thread(
                self.launcher.end_trees,
                [supervisor.launch.markers for supervisor in by_key.values()],
                why="stop",
                deadline_s=self.launcher.cancel_grace_s * 2 + 5.0,
            )
            for key, supervisor in by_key.items():
                await asyncio.to_thread(supervisor.launch.release, gone=endings[key].gone)
                left.remove(supervisor)
        self.turns.clear()

    # -- launching -----------------------------------------------------------------------------

    async def _work(self, changes: Subscription) -> None:
        with changes:
            while True:
                try:
                    await self._launch_what_fits()
                    self._failing_since, self.failing_s = None, 0.0
                    self._failures.note_success()
                except Fenced as error:
                    self.stop_signal.fail(error)
                    return
                except (NotNow, Exhausted) as error:
                    self._is_take_in_doubt = True
                    self._note_failure()
                    self._failures.report(error)
                except Exception:  # the edge of this task: nothing would be launched any more
                    self._note_failure()
                    log.exception("execution.dispatch_failed")
                await changes.next(
                    SHARED_CHECK_INTERVAL_S if self.queue.storage.is_shared else CHECK_INTERVAL_S
                )

    def _note_failure(self) -> None:
        now = monotonic()
        if self._failing_since is None:
            self._failing_since = now
        self.failing_s = now - self._failing_since

    async def _launch_what_fits(self) -> None:
        if self._is_take_in_doubt:
            await self._give_back()
        while self._may_take and self.slots_in_use < self.capacity:
            self._is_take_under_way = True
            try:
                turn = await self.queue.take_next(
                    self._busy_engines(), ending_runs=self.turns.ending_runs
                )
            finally:
                self._is_take_under_way = False
            if turn is None:
                return
            self._demand_new(turn)
            supervisor = self.supervisors.supervise(turn)
            self.turns.add(supervisor, asyncio.create_task(self._follow(supervisor)))

    @property
    def _may_take(self) -> bool:
        return self._is_taking and not self._is_held

    def _demand_new(self, turn: Turn) -> None:
        """Launch nothing for a key that a living process has: its files have that key too.

        Raises:
            RunGone: a run with a living process is not in the store, or not with its launch.
        """
        for supervisor in self.turns.supervisors:
            living = supervisor.turn
            if turn.run.key == living.run.key or turn.launch.key == living.launch.key:
                raise RunGone(f"run {living.run.run_id!r}, whose process lives,")

    async def _give_back(self) -> None:
        """Requeue runs whose taking was committed although it was reported to have failed."""
        count = await self.queue.give_back(self.turns.cookies)
        self._is_take_in_doubt = False
        if count:
            log.warning("execution.given_back", runs=count)

    def _busy_engines(self) -> tuple[str, ...]:
        limits = self.supervisors.catalog.limits
        return tuple(
            name
            for name, count in self.turns.engines_in_use.items()
            if count >= limits.get(name, self.capacity)
        )

    async def _follow(self, supervisor: TurnSupervisor) -> None:
        try:
            await supervisor.follow()
        except asyncio.CancelledError:
            supervisor.records.log.left()
            raise
        except Fenced as error:
            supervisor.records.log.left()
            self.stop_signal.fail(error)
            return  # its process is left to `stop`, which comes next
        except Exception:  # the edge of this task: no caller would get the error
            log.exception("execution.session_failed", run_id=supervisor.turn.run.run_id)
            await self._end_after_defect(supervisor)
        # Not in a `finally`: a cancelled supervisor still has a process, which `stop` ends.
        self.turns.remove(supervisor)
        self.check_queue()

    async def _end_after_defect(self, supervisor: TurnSupervisor) -> None:
        """End the processes that a supervisor leaves when it meets a defect."""
        try:
            await supervisor.end_after_defect()
        except Fenced as error:
            self.stop_signal.fail(error)
        except Exception:  # the edge of this task; without heartbeats the shim ends the tree
            log.exception("execution.session_failed", run_id=supervisor.turn.run.run_id)
