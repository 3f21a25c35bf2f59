"""Carries out the deadlines of runs: of waits, of whole runs, of what is kept to set one back.

They are rows, so that a restart forgets none; those that passed while the service was down are
carried out right after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.execution.workshop import Workshop
from runrecovery_service.storage import deadlines, runs
from runrecovery_service.storage.deadlines import Passed

log = structlog.get_logger()

LOOK_S: Final = 0.25
"""Between two looks: how late, on top of the work itself, a deadline may be carried out."""
PER_LOOK: Final = 500


@dataclass(slots=True, kw_only=True, eq=False)
class Deadlines:
    """Looks for deadlines that have passed until it is stopped.

    Attributes:
        changed: told of a run that goes on, or has ended, by a deadline.
        time_out: has the process of a run ended; may be told of the same one again.
        fenced: called once when a newer epoch owns this instance's runs.
    """

    shop: Workshop
    changed: Callable[[Run], None]
    time_out: Callable[[str, DueKind], None]
    fenced: Callable[[Fenced], None]
    _task: asyncio.Task[None] | None = None
    _failed: set[Passed] = field(default_factory=set)
    _unsure: set[int] = field(default_factory=set)

    def start(self) -> None:
        """Begin to look. All deadlines are by the clock that runs now: the recovery saw to it."""
        self._task = asyncio.create_task(self._work(), name="deadlines")

    async def stop(self) -> None:
        """Look no more. What has been handed to the store may still be carried out there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        failed = ""
        while True:
            try:
                await self.look()
                failed = ""
            except Fenced as error:
                self.fenced(error)
                return
            except Exception as error:  # the edge of this task: the next look tries again
                if failed != (failed := type(error).__name__):  # once, not with every look
                    known = is_outage(error)
                    log.warning(
                        "execution.deadlines_failed", **error_facts(error), exc_info=not known
                    )
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Carry out, once, every deadline that has passed. At one time, so that they share commits;
        what is only to be forgotten comes last."""
        await self._tell_unsure()
        found = await self.shop.storage.point(
            deadlines.passed, self.shop.owner, steady=self.shop.clock.steady(), limit=PER_LOOK
        )
        lost = [one.run_key for one in found if one.kind is DueKind.REOPEN]
        async with asyncio.TaskGroup() as group:
            for one in found:
                if one.kind is not DueKind.REOPEN:
                    group.create_task(self._try_out(one))
        if lost:
            await self.shop.storage.write(
                deadlines.end_reopening,
                lost,
                owner=self.shop.owner,
                steady=self.shop.clock.steady(),
            )

    async def _try_out(self, one: Passed) -> None:
        """Carry one out; it stops none of the others."""
        try:
            await self._carry_out(one)
            self._failed.discard(one)
        except Fenced as error:
            self.fenced(error)
        except Exception as error:  # noqa: BLE001 - the next look tries again
            # Perhaps it was committed all the same; then nobody has been told.
            self._unsure.add(one.run_key)
            if one not in self._failed:
                self._failed.add(one)
                log.warning(
                    "execution.deadline_failed",
                    run_key=one.run_key,
                    kind=one.kind.value,
                    **error_facts(error),
                )

    async def _tell_unsure(self) -> None:
        """Pass on how those runs stand of which it is not known what was committed."""
        for run_key in tuple(self._unsure):
            try:
                run = await self.shop.storage.point(runs.get_by_key, run_key)
            except Exception:  # noqa: BLE001, S112 - told when it failed; nobody waits for it
                continue
            self.changed(run)
            self._unsure.discard(run_key)

    async def _carry_out(self, one: Passed) -> None:
        end = deadlines.end_wait if one.kind is DueKind.WAIT else deadlines.end_run
        run = await self.shop.storage.write(
            end,
            one.run_key,
            owner=self.shop.owner,
            now=self.shop.clock.now(),
            steady=self.shop.clock.steady(),
        )
        if run is None:
            return
        if run.holds_slot and (one.kind is DueKind.RUN or run.status is RunStatus.WAITING_USER):
            self.time_out(run.run_id, one.kind)
            return
        if one.kind is DueKind.WAIT:
            log.info("execution.auto_decided", run_id=run.run_id)
        else:
            log.info("execution.run_timed_out", run_id=run.run_id)
        self.changed(run)
