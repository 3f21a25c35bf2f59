"""Gives slots to queued runs, first come first served, and keeps count by what is alive."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import structlog

from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow, RunGone, error_facts
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.execution.workshop import Workshop
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.storage import turns
from runrecovery_service.storage.processes import Place
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()

FINISH_S: Final = 5.0
"""At a stop, for turns that have ended and are only to be recorded."""
LOOK_AGAIN_S = 5.0
"""The queue is looked at when something changes, and this often besides."""
LOOK_SOON_S = 0.5
"""After a look at the records that failed, until the next one."""


@dataclass(slots=True, kw_only=True, eq=False)
class Dispatcher:
    """Launches queued runs while slots are free.

    Attributes:
        capacity: processes at one time. A slot is held by a session, and by nothing else: the
            count cannot leak.
        failing_s: the time from the first to the last of the looks at the queue that failed in a
            row. Not their number: looks that follow upon changes may fail within a moment.
        fenced: called once when a newer epoch owns this instance's runs.
    """

    shop: Workshop
    place: Place
    capacity: int
    fenced: Callable[[Fenced], None]
    failing_s: float = 0.0
    _failing_since: float | None = None
    _sessions: dict[TurnSupervisor, asyncio.Task[None]] = field(default_factory=dict)
    _taking: bool = True
    _unsure: bool = False
    _look_due: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.Task[None] | None = None

    @property
    def slots_in_use(self) -> int:
        """Processes alive or being launched."""
        return len(self._sessions)

    def start(self) -> None:
        """Begin to launch. Not called in safe mode."""
        self._loop = asyncio.create_task(self._work(), name="dispatcher")
        self._changed.set()

    def changed(self, run: Run) -> None:
        """Tell that a create, a reply or a cancel has been committed for this run."""
        for session in self._sessions:
            if session.turn.run.run_id == run.run_id:
                _tell(session, run)
        self._changed.set()

    def look_at_records(self) -> None:
        """Have every session told how its run stands on record: what was accepted may have been
        committed although its caller was told that it failed."""
        self._look_due = True
        self._changed.set()

    def time_out(self, run_id: str, kind: DueKind) -> None:
        """Have the process of a run ended: a deadline has passed. A run that is only being taken
        from the queue is told at the next look at the deadlines."""
        for session in self._sessions:
            if session.turn.run.run_id == run_id:
                session.time_out(kind)

    def look_again(self) -> None:
        """Tell that a run may have become free to be launched."""
        self._changed.set()

    def heartbeat(self, deadline_ns: int) -> None:
        """Tell every shim until when (CLOCK_BOOTTIME) its tree may live: the lease was renewed."""
        self.shop.tree_deadline.beat(deadline_ns)
        for session in self._sessions:
            session.launch.heartbeat()

    def look_at_shims(self) -> None:
        """Let every session see whether its shim still guards."""
        for session in self._sessions:
            session.look_at_shim()

    @property
    def leases_followed(self) -> frozenset[str]:
        """Cookies of the leases that a session follows."""
        return frozenset(session.turn.lease.cookie for session in self._sessions)

    def pause(self) -> None:
        """Take no run from the queue any more; what is under way goes on."""
        self._taking = False

    async def detach(self) -> None:
        """Launch nothing any more and follow nothing any more; what lives, lives on for now. The
        runs stay as they are on record; a turn that has ended is recorded first."""
        self.pause()
        ending = [task for session, task in self._sessions.items() if session.is_ending]
        if ending:
            await asyncio.wait(ending, timeout=FINISH_S)
        tasks = list(self._sessions.values())
        if self._loop is not None:
            tasks.append(self._loop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self._sessions:
            session.launch.withdraw()

    async def release(self) -> None:
        """Detach; reap the shims of trees that somebody else has ended."""
        await self.detach()
        for session in list(self._sessions):
            gone = session.launch.shim_is_gone
            await asyncio.to_thread(session.launch.release, gone=gone)
        self._sessions.clear()

    async def stop(self) -> None:
        """Detach, and end every process tree that is still alive."""
        await self.detach()
        sessions = list(self._sessions)
        if not sessions:
            return
        grace_s = self.shop.cancel_grace_s
        log.info("execution.ending_all", processes=len(sessions))
        while sessions:  # once, but where a key was handed out again
            some = {session.turn.lease.key: session for session in sessions}
            endings = await asyncio.to_thread(
                end_trees,
                [session.launch.evidence for session in some.values()],
                why="stop",
                grace_s=grace_s,
                deadline_s=grace_s * 2 + 5.0,
            )
            for key, session in some.items():
                await asyncio.to_thread(session.launch.release, gone=endings[key].gone)
                sessions.remove(session)
        self._sessions.clear()

    async def _work(self) -> None:
        told = True
        while True:
            try:
                if self._look_due or (not told and self.shop.storage.is_shared):
                    await self._look_at_records()
                await self._launch_what_fits()
                self._failing_since, self.failing_s = None, 0.0
            except Fenced as error:
                self.fenced(error)
                return
            except (NotNow, Exhausted) as error:
                self._unsure = True
                self._note_failure()
                log.warning("execution.queue_unreadable", **error_facts(error))
            except Exception:  # the edge of this task: nothing would be launched any more
                self._note_failure()
                log.exception("execution.dispatch_failed")
            told = await self._told_of_a_change()

    def _note_failure(self) -> None:
        now = monotonic()
        if self._failing_since is None:
            self._failing_since = now
        self.failing_s = now - self._failing_since

    async def _look_at_records(self) -> None:
        """Tell every session how its run stands on record. Where a commit may stand although its
        answer was lost, nobody else may have told it of a reply or a cancel."""
        was_due, self._look_due = self._look_due, False
        try:
            for session in list(self._sessions):
                if session in self._sessions:  # else it has ended since
                    _tell(session, await self._run_of(session))
        except BaseException:
            self._look_due = self._look_due or was_due
            raise

    async def _run_of(self, session: TurnSupervisor) -> Run:
        return await self.shop.storage.point(turns.look, session.turn, owner=self.shop.owner)

    async def _told_of_a_change(self) -> bool:
        """Return at a change, or, with False, when it is time for a look without one."""
        told = True
        try:
            async with asyncio.timeout(LOOK_SOON_S if self._look_due else LOOK_AGAIN_S):
                await self._changed.wait()
        except TimeoutError:
            told = False
        self._changed.clear()
        return told

    async def _launch_what_fits(self) -> None:
        if self._unsure:
            await self._give_back()
        while self._taking and self.slots_in_use < self.capacity:
            turn = await self.shop.storage.write(
                turns.take_next,
                owner=self.shop.owner,
                busy_engines=self._busy_engines(),
                place=self.place,
                due_in=self.shop.clock.due_in,
                steady=self.shop.clock.steady(),
                now=self.shop.clock.now(),
            )
            if turn is None:
                return
            self._demand_new(turn)
            session = TurnSupervisor(turn=turn, shop=self.shop)
            self._sessions[session] = asyncio.create_task(self._follow(session))

    def _demand_new(self, turn: Turn) -> None:
        """Launch nothing for a key that a living process goes by: its files have that key too.

        Raises:
            RunGone: a run that is followed is not in the store, or not with its launch.
        """
        for session in self._sessions:
            followed = session.turn
            if turn.run.key == followed.run.key or turn.lease.key == followed.lease.key:
                raise RunGone(f"run {followed.run.run_id!r}, whose process lives,")

    async def _give_back(self) -> None:
        """Undo takes that were committed although we were told that they had failed."""
        count = await self.shop.storage.write(
            turns.give_back,
            owner=self.shop.owner,
            held=self.leases_followed,
            now=self.shop.clock.now(),
        )
        self._unsure = False
        if count:
            log.warning("execution.given_back", runs=count)

    def _busy_engines(self) -> tuple[str, ...]:
        in_use = Counter(session.turn.run.engine for session in self._sessions)
        limits = self.shop.catalog.limits
        return tuple(
            name for name, count in in_use.items() if count >= limits.get(name, self.capacity)
        )

    async def _follow(self, session: TurnSupervisor) -> None:
        try:
            await session.follow()
        except Fenced as error:
            self.fenced(error)
            return  # its process is left to `stop`, which comes next
        except Exception:  # the edge of this task: nobody above would hear of it
            log.exception("execution.session_failed", run_id=session.turn.run.run_id)
            await self._give_up(session)
        # Not in a `finally`: a cancelled session still has a process, which `stop` ends.
        del self._sessions[session]
        self._changed.set()

    async def _give_up(self, session: TurnSupervisor) -> None:
        """End what a session that met a defect leaves behind."""
        try:
            await session.give_up()
        except Fenced as error:
            self.fenced(error)
        except Exception:  # the edge of this task, again; its shim ends the tree without heartbeats
            log.exception("execution.session_failed", run_id=session.turn.run.run_id)


def _tell(session: TurnSupervisor, run: Run) -> None:
    """Tell a session of what was accepted for its run; it may have been told before."""
    if run.cancel_requested:
        session.cancel()
    elif run.status is RunStatus.RUNNING:
        session.deliver()
