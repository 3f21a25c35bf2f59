"""Gives free slots to queued runs, in the order of the queue, and starts their turns."""

from __future__ import annotations

import asyncio
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service.clock import loop_time_s
from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow, RunGone
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.record_watch import RecordWatch
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.execution.supervisor_factory import SupervisorFactory
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import FailureLog
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.changes import Subscription
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()

FINISH_S: Final = 5.0
"""How long a stop waits for turns that have ended but are not recorded yet."""
CHECK_INTERVAL_S = 5.0
"""The longest time between two checks of the queue. A change causes a check at once."""
SHARED_CHECK_INTERVAL_S: Final = 1.0
"""The longest time between two checks on a shared store: changes by peers cause no check."""


@dataclass(slots=True, kw_only=True, eq=False)
class Dispatcher:
    """Launches queued runs while slots are free.

    Attributes:
        capacity: the number of slots. The slots in use are counted as running turns, so no slot can
            leak.
        failing_s: how long checks of the queue have been failing, in seconds. The number of failed
            checks would say little, because many changes cause many checks within a moment.
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
        """The number of turns whose process is alive or being launched."""
        return len(self.turns)

    @property
    def at_work(self) -> int:
        """The number of turns that do not wait for a user, including one that is being taken."""
        return self.turns.at_work + self._is_take_under_way

    def start(self) -> None:
        """Start to launch queued runs. Not called in safe mode."""
        self._changes = self.queue.storage.changes.subscribe()
        self._record_watch.start()
        self._task = asyncio.create_task(self._work(self._changes), name="dispatcher")

    def check_queue(self) -> None:
        """Check the queue at once, even if no change of a run was announced."""
        if self._changes is not None:
            self._changes.wake()

    def pause(self) -> None:
        """Take no more runs from the queue. Turns under way continue."""
        self._is_taking = False

    def hold(self, *, held: bool) -> None:
        """While `held`, take no runs from the queue. Turns under way continue."""
        self._is_held = held
        self.check_queue()

    # -- stopping ------------------------------------------------------------------------------

    async def detach(self) -> None:
        """Stop launching, and stop supervising.

        Before that, wait at most `FINISH_S` for turns that are already ending to be recorded. All
        other processes keep running, and their rows do not change.
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
        """Call `detach`, and reap the shims of process trees that a recovery has ended."""
        await self.detach()
        for supervisor in self.turns.supervisors:
            gone = supervisor.launch.is_shim_gone
            await asyncio.to_thread(supervisor.launch.release, gone=gone)
        self.turns.clear()

    async def stop(self) -> None:
        """Call `detach`, and end every process tree that is still alive."""
        await self.detach()
        left = self.turns.supervisors
        if not left:
            return
        log.info("execution.ending_all", processes=len(left))
        while left:  # repeats only if two launches have the same key
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
                except Exception:  # if this task ended, nothing would be launched any more
                    self._note_failure()
                    log.exception("execution.dispatch_failed")
                await changes.next(
                    SHARED_CHECK_INTERVAL_S if self.queue.storage.is_shared else CHECK_INTERVAL_S
                )

    def _note_failure(self) -> None:
        now = loop_time_s()
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
        """Check that no living process belongs to another run with the key of this turn's run.

        The key also names the files of a run.

        Raises:
            RunGone: a run with a living process, or its launch, is missing in the store.
        """
        for supervisor in self.turns.supervisors:
            living = supervisor.turn
            if turn.run.key == living.run.key or turn.launch.key == living.launch.key:
                raise RunGone(f"run {living.run.run_id!r}, whose process lives,")

    async def _give_back(self) -> None:
        """Requeue runs that were taken from the queue by a commit whose answer was lost."""
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
            supervisor.records.log.left_to_recovery()
            raise
        except Fenced as error:
            supervisor.records.log.left_to_recovery()
            self.stop_signal.fail(error)
            return  # `stop` comes next, and ends the process
        except Exception:  # no caller awaits this task
            log.exception("execution.session_failed", run_id=supervisor.turn.run.run_id)
            await self._end_after_defect(supervisor)
        # Not in a `finally`: the process of a cancelled supervisor is left to `stop`.
        self.turns.remove(supervisor)
        self.check_queue()

    async def _end_after_defect(self, supervisor: TurnSupervisor) -> None:
        """End the processes of a supervisor that has failed because of a defect."""
        try:
            await supervisor.end_after_defect()
        except Fenced as error:
            self.stop_signal.fail(error)
        except Exception:  # without heartbeats the shim ends the tree
            log.exception("execution.session_failed", run_id=supervisor.turn.run.run_id)
