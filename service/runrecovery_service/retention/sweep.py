"""Removes what has reached its age, in small batches, while the service works."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Final, TypeVar

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.clock import Clock
from runrecovery_service.domain.retention import (
    FIRST,
    RetentionKind,
    RetentionPolicy,
    RetentionTotals,
    RunPosition,
)
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.retention.files import RunFiles
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import retention
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.retention import StoredRun
from runrecovery_service.storage.rows import to_us

log = structlog.get_logger()

R = TypeVar("R")

SWEEP_INTERVAL_S: Final = 60.0
BATCH: Final = 100
"""Runs of one transaction. It takes some 10 ms on SQLite, and writes of callers wait for it."""
SHARE: Final = 4.0
"""The pause after a batch, as a multiple of the time that the batch took. A batch that waits for
writes of callers takes long, so a busy store gets long pauses."""
PAUSE_MOST_S: Final = 5.0
PAGES: Final = 256
"""Pages of a SQLite file that one transaction gives back. As many stay free, for new rows."""
UNKNOWN_SHOWN: Final = 10

PARTS: Final = (RetentionKind.OUTPUTS, RetentionKind.WORKSPACES, RetentionKind.EVENTS)


@dataclass(slots=True, kw_only=True, eq=False)
class RetentionSweep:
    """Sweeps until it is stopped. Each start also compares the folders with the store, once.

    Attributes:
        policy: what is removed; it may be replaced between two sweeps.
        pause: waits between two batches.
    """

    policy: RetentionPolicy
    storage: Storage
    owner: Owner
    clock: Clock
    files: RunFiles
    stop_signal: StopSignal
    totals: RetentionTotals = field(default_factory=RetentionTotals)
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep
    _loop: PeriodicTask = field(init=False)
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _ends_s: float = field(default=math.inf, init=False)
    _compared: bool = field(default=False, init=False)
    _reported: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._loop = PeriodicTask(
            name="retention",
            step=self._step,
            interval_s=SWEEP_INTERVAL_S,
            failure_event="retention.sweep_failed",
            stop_signal=self.stop_signal,
        )

    def start(self) -> None:
        """Start to sweep."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop after the batch that is under way."""
        await self._loop.finish()
        async with self._one_at_a_time:  # also a sweep that an operator asked for
            pass

    async def _step(self) -> None:
        await self.sweep()

    async def sweep(self, *, within_s: float = math.inf) -> bool:
        """Remove once what has reached its age; return False if that was cut short.

        Args:
            within_s: begin no further batch after this time, and do not compare the folders with
                the store, which takes long.
        """
        async with self._one_at_a_time:
            self._ends_s = monotonic() + within_s
            if not self._compared and within_s == math.inf:
                await self._compare_folders()
                self._compared = not self._must_end
            await self._sweep()
            return not self._must_end

    @property
    def _must_end(self) -> bool:
        return self._loop.is_stopping or monotonic() > self._ends_s

    async def _sweep(self) -> None:
        begun, before = monotonic(), self.totals.removed.copy()
        await self._remove_runs()
        for kind, age in (
            (RetentionKind.OUTPUTS, self.policy.outputs),
            (RetentionKind.WORKSPACES, self.policy.workspaces),
            (RetentionKind.EVENTS, self.policy.events),
        ):
            if age is not None:
                await self._remove_part(kind, age)
        await self._remove_receipts_and_reports()
        await self._empty(RetentionKind.RUNS)
        await self._give_back_pages()
        self.totals.swept_at, self.totals.sweep_s = self.clock.now(), monotonic() - begun
        if removed := self.totals.removed - before:
            counts = {kind.value: count for kind, count in removed.items()}
            log.info("retention.swept", seconds=round(self.totals.sweep_s, 3), **counts)

    # -- rows and files ------------------------------------------------------------------------

    async def _remove_runs(self) -> None:
        upto = await self.newest_to_remove()
        after = FIRST
        while after < upto and not self._must_end:
            begun = monotonic()
            found = await self.storage.read(
                retention.removable_runs,
                self.owner,
                after=after,
                upto=upto,
                now=self.clock.now(),
                limit=BATCH,
            )
            if not found:
                return
            after = found[-1].position  # a run whose files stay must not stop the others
            keys = [run.key for run in found]
            # Files first: a crash in between leaves rows without files.
            moved = await self._move(RetentionKind.RUNS, keys)
            if moved:
                removed = await self.storage.write_own(
                    retention.remove_runs, moved, owner=self.owner, now=self.clock.now()
                )
                self.totals.removed[RetentionKind.RUNS] += removed
            await self._empty(RetentionKind.RUNS)
            await self._rest(begun)

    async def newest_to_remove(self) -> RunPosition:
        """Return the position of the newest run that is too old, or one too many."""
        upto = FIRST
        if self.policy.ended_runs is not None:
            # Before the first key: what ended at that very moment is not older.
            upto = RunPosition(to_us(self.before(self.policy.ended_runs)), 0)
        if self.policy.max_ended_runs is not None:
            surplus = await self.storage.read(
                retention.position_of_surplus,
                self.owner,
                kept=self.policy.max_ended_runs,
                now=self.clock.now(),
            )
            upto = max(upto, surplus or FIRST)
        return upto

    async def _remove_part(self, kind: RetentionKind, age: float) -> None:
        while not self._must_end:
            begun = monotonic()
            keys = await self.storage.write_own(
                retention.mark_removed,
                kind,
                owner=self.owner,
                ended_before=self.before(age),
                now=self.clock.now(),
                limit=BATCH,
            )
            self.totals.removed[kind] += len(keys)
            if keys and kind is not RetentionKind.EVENTS:
                await self._move(kind, keys)
                await self._empty(kind)
            if len(keys) < BATCH:
                return
            await self._rest(begun)

    async def _remove_receipts_and_reports(self) -> None:
        receipts, reports = self.policy.receipts, self.policy.reports
        if receipts is not None:
            await self._remove_rows(
                RetentionKind.RECEIPTS,
                lambda: self.storage.write_own(
                    retention.remove_receipts,
                    owner=self.owner,
                    created_before=self.before(receipts),
                    limit=BATCH,
                ),
            )
        if reports is not None:
            await self._remove_rows(
                RetentionKind.REPORTS,
                lambda: self.storage.write_own(
                    retention.remove_reports,
                    owner=self.owner,
                    started_before=self.before(reports),
                    limit=BATCH,
                ),
            )

    async def _remove_rows(self, kind: RetentionKind, remove: Callable[[], Awaitable[int]]) -> None:
        while not self._must_end:
            begun = monotonic()
            removed = await remove()
            self.totals.removed[kind] += removed
            if removed < BATCH:
                return
            await self._rest(begun)

    async def _give_back_pages(self) -> None:
        free = await self.storage.read(retention.free_pages)
        while free > PAGES and not self._must_end:
            begun = monotonic()
            left = await self.storage.write_own(
                retention.give_back_pages, owner=self.owner, pages=PAGES
            )
            if left >= free:
                return
            self.totals.pages_freed += free - left
            free = left
            await self._rest(begun)

    def before(self, age: float) -> datetime:
        """Return the time before which something has reached an age."""
        return self.clock.now() - timedelta(seconds=age)

    async def _rest(self, begun: float) -> None:
        await self.pause(min(PAUSE_MOST_S, (monotonic() - begun) * SHARE))

    # -- files ---------------------------------------------------------------------------------

    async def _move(self, kind: RetentionKind, keys: list[int]) -> list[int]:
        """Take files out of their folders; return the runs for which that succeeded."""

        def move() -> tuple[list[int], dict[str, str]]:
            moved, problems = [], {}
            for key in keys:
                try:
                    self.files.remove(kind, key)
                    moved.append(key)
                except OSError as error:
                    problems[str(key)] = error.strerror or type(error).__name__
            return moved, problems

        moved, problems = await daemon_threads.run(move)
        self._report(problems)
        return moved

    async def _empty(self, kind: RetentionKind) -> None:
        emptied = await daemon_threads.run(
            lambda: self.files.empty(should_stop=lambda: self._must_end)
        )
        if emptied.size:
            self.totals.bytes_freed[kind] += emptied.size
        self._report({f".removed/{name}": why for name, why in emptied.problems.items()})

    def _report(self, problems: dict[str, str]) -> None:
        for place, reason in problems.items():
            if place not in self._reported:  # once, not with every sweep
                self._reported.add(place)
                self.totals.not_removed += 1
                log.warning("retention.not_removed", place=f"runs/{place}", reason=reason)

    async def _compare_folders(self) -> None:
        """Remove parts that are marked as gone, and report folders of unknown runs.

        Nothing of a run of another instance is touched.
        """
        unknown: list[int] = []
        async for keys, stored in self._folders():
            if self._must_end:
                return
            begun = monotonic()
            for kind in (RetentionKind.OUTPUTS, RetentionKind.WORKSPACES):
                marked = [key for key, run in stored.items() if run.own and kind in run.removed]
                if marked:  # the service died between the mark and the removal
                    await self._move(kind, marked)
            unknown += [key for key in keys if key not in stored]
            await self._rest(begun)
        if unknown:
            examples = [f"runs/{key}" for key in unknown[:UNKNOWN_SHOWN]]
            log.warning("retention.unknown_folders", folders=len(unknown), examples=examples)

    async def unknown_folders(self) -> int:
        """Return how many folders belong to runs that the store does not know.

        The service never leaves one. It comes from a restored backup or by mistake, and the run
        may be alive elsewhere, so that only an operator can decide to remove the folder.
        """
        return sum([len(keys) - len(stored) async for keys, stored in self._folders()])

    async def _folders(self) -> AsyncIterator[tuple[list[int], dict[int, StoredRun]]]:
        """Yield keys of folders, with what the store says about them."""
        keys = await daemon_threads.run(self.files.run_keys)
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            yield some, await self.storage.read(retention.stored_runs, self.owner, some)
