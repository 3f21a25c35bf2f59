"""Gives slots to queued runs, first come first served, and keeps count by what is alive."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.execution.session import RunSession, Workshop
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.storage import turns
from runrecovery_service.storage.processes import Place

log = structlog.get_logger()

LOOK_AGAIN_S = 5.0
"""The queue is looked at when something changes, and this often besides."""


@dataclass(slots=True, kw_only=True, eq=False)
class Dispatcher:
    """Launches queued runs while slots are free.

    Attributes:
        capacity: processes at one time. A slot is held by a session, and by nothing else: the
            count cannot leak.
        fenced: called once when a newer epoch owns this instance's runs.
    """

    shop: Workshop
    place: Place
    capacity: int
    fenced: Callable[[], None]
    _sessions: dict[RunSession, asyncio.Task[None]] = field(default_factory=dict)
    _taking: bool = True
    _unsure: bool = False
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
            if session.turn.run.key != run.key:
                continue
            if run.cancel_requested:
                session.cancel()
            elif run.status is RunStatus.RUNNING:
                session.deliver()
        self._changed.set()

    def pause(self) -> None:
        """Take no run from the queue any more; what is under way goes on."""
        self._taking = False

    async def stop(self) -> None:
        """Launch nothing any more and end every process tree; the runs stay as they are on
        record, for the next start to decide on."""
        self.pause()
        tasks = list(self._sessions.values())
        if self._loop is not None:
            tasks.append(self._loop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sessions = list(self._sessions)
        if not sessions:
            return
        grace_s = self.shop.cancel_grace_s
        log.info("execution.ending_all", processes=len(sessions))
        await asyncio.to_thread(
            end_trees,
            [session.evidence for session in sessions],
            grace_s=grace_s,
            deadline_s=grace_s * 2 + 5.0,
        )
        for session in sessions:
            await asyncio.to_thread(session.release)
        self._sessions.clear()

    async def _work(self) -> None:
        while True:
            try:
                await self._launch_what_fits()
            except Fenced:
                self.fenced()
                return
            except (NotNow, Exhausted) as error:
                self._unsure = True
                log.warning("execution.queue_unreadable", error=type(error).__name__)
            except Exception:  # the edge of this task: nothing would be launched any more
                log.exception("execution.dispatch_failed")
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        try:
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _launch_what_fits(self) -> None:
        if self._unsure:
            await self._give_back()
        while self._taking and self.slots_in_use < self.capacity:
            turn = await self.shop.storage.write(
                turns.take_next,
                owner=self.shop.owner,
                busy_engines=self._busy_engines(),
                place=self.place,
                now=self.shop.now(),
            )
            if turn is None:
                return
            session = RunSession(turn=turn, shop=self.shop)
            self._sessions[session] = asyncio.create_task(self._follow(session))

    async def _give_back(self) -> None:
        """Undo takes that were committed although we were told that they had failed."""
        count = await self.shop.storage.write(
            turns.give_back,
            owner=self.shop.owner,
            held=[session.turn.lease.key for session in self._sessions],
            now=self.shop.now(),
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

    async def _follow(self, session: RunSession) -> None:
        try:
            await session.follow()
        except Fenced:
            self.fenced()
        except Exception:  # the edge of this task: nobody above would hear of it
            log.exception("execution.session_failed", run_id=session.turn.run.run_id)
        # Not in a `finally`: a cancelled session still has a process, which `stop` ends.
        del self._sessions[session]
        self._changed.set()
