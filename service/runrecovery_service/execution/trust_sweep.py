"""Looks, while the service runs, for trust entries that nobody needs any more.

A run that ends with its process takes its entry out by itself. What is left is of runs that end
otherwise, of earlier attempts, of services that are gone, and what could not be taken out before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import structlog

from runrecovery_service.agents.trust_keeper import LEFT
from runrecovery_service.clock import wait_within
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.execution.workshop import Workshop

log = structlog.get_logger()

LOOK_S: Final = 2.0
"""Between two looks; one takes less than a millisecond where there is nothing to take out."""
LOCK_WAIT_S: Final = 1.0
"""For the lock of one file; the next look comes soon."""
PAUSE_FIRST_S, PAUSE_MOST_S = 4.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """A file that could not be edited: it is left alone until then."""

    until: float
    pause_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class TrustSweep:
    """Looks until it is stopped. It launches nothing, so that it may in safe mode as well."""

    shop: Workshop
    time: Callable[[], float] = monotonic
    _troubles: dict[str, _Trouble] = field(default_factory=dict)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._work(), name="trust-sweep")

    async def stop(self) -> None:
        """End after the edit that is under way."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        failed = ""
        while not await wait_within(self._stopping, LOOK_S):
            try:
                await self.look()
                failed = ""
            except Fenced:
                return  # the service stops
            except Exception as error:  # the edge of this task: the next look tries again
                if failed != (failed := type(error).__name__):  # once, not with every look
                    known = is_outage(error)
                    log.warning("trust.sweep_failed", **error_facts(error), exc_info=not known)

    async def look(self) -> None:
        """Take out, once, what nobody needs any more."""
        found = await self.shop.in_thread(self.shop.trust.stale_files)
        now = self.time()
        self._troubles = {file: t for file, t in self._troubles.items() if file in found}
        for file in found:
            trouble = self._troubles.get(file)
            if self._stopping.is_set():
                return
            if trouble is None or trouble.until <= now:
                await self._clear(file)

    async def _clear(self, file: str) -> None:
        keeper = self.shop.trust
        done = await self.shop.in_thread(
            lambda: keeper.clear_file(file, lock_wait_s=LOCK_WAIT_S, enough=self._stopping.is_set)
        )
        for reason in done.kept:
            if reason != LEFT:
                log.warning("trust.entry_kept", file=file, reason=reason)
        before = self._troubles.pop(file, None)
        if not done.failures:
            return
        if before is None:  # once, not with every look
            for reason in done.failures:
                log.warning("trust.entry_kept", file=file, reason=reason)
        pause_s = PAUSE_FIRST_S if before is None else min(before.pause_s * 2, PAUSE_MOST_S)
        self._troubles[file] = _Trouble(until=self.time() + pause_s, pause_s=pause_s)
