"""Removes runs, parts, receipts and reports that have reached their age, in small batches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import field
from datetime import datetime, timedelta
from functools import partial
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
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.retention.files import RunFiles
from runrecovery_service.retention.time_check import TimeCheck
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import retention
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.retention import Progress, StoredRun
from runrecovery_service.storage.rows import to_us

log = structlog.get_logger()

R = TypeVar("R")

FIRST_SWEEP_S: Final = 10.0
"""Time from SERVING to the first sweep. The launches of a start come first, but a service that is
restarted every minute still sweeps."""
SWEEP_INTERVAL_S: Final = 60.0
BATCH: Final = 100
"""How many runs one query finds, and how many receipts or reports one transaction removes."""
WRITE_S: Final = 0.02
"""Time limit of a transaction that removes rows: on SQLite every other write waits for it."""
SHARE: Final = 4.0
"""The pause after a batch, as a multiple of the time that the batch took. A batch that waits for
writes of callers takes long, so a busy store gets long pauses."""
PAUSE_MOST_S: Final = 5.0
PAGES: Final = 256
"""How many free pages of a SQLite file are kept for new rows, and how many one transaction returns
to the file system."""
GIVE_BACK_S: Final = 15.0
"""How long a sweep returns pages, including its pauses, before it leaves the rest to the next
sweep."""
WHOLE_EVERY: Final = 60
"""The number of sweeps after which the search for parts begins at the oldest run again, because a
run that was kept can be removable by now. All other sweeps continue where the previous one ended.
"""
UNKNOWN_SHOWN: Final = 10

PARTS: Final = (RetentionKind.OUTPUTS, RetentionKind.WORKSPACES, RetentionKind.EVENTS)


@dataclass(slots=True, kw_only=True, eq=False)
class RetentionSweep:
    """Sweeps until it is stopped. The first sweep also compares the folders with the store.

    Attributes:
        policy: the configured ages and limits; a reload may replace it between two sweeps.
        pause: waits some seconds between two batches.
    """

    policy: RetentionPolicy
    storage: Storage
    owner: Owner
    clock: Clock
    files: RunFiles
    stop_signal: StopSignal
    totals: RetentionTotals = field(default_factory=RetentionTotals)
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep
    time: TimeCheck = field(init=False)
    _loop: PeriodicTask = field(init=False)
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _ends_s: float = field(default=math.inf, init=False)
    _compared: bool = field(default=False, init=False)
    _rested_at: float = field(default=0.0, init=False)
    _sweeps: int = field(default=0, init=False)
    _passed: dict[RetentionKind, RunPosition] = field(default_factory=dict, init=False)
    _left: dict[RetentionKind, set[int]] = field(default_factory=dict, init=False)
    _reported: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.time = TimeCheck(storage=self.storage, owner=self.owner, clock=self.clock)
        self._loop = PeriodicTask(
            name="retention",
            step=self._step,
            interval_s=SWEEP_INTERVAL_S,
            first_wait_s=FIRST_SWEEP_S,
            failure_event="retention.sweep_failed",
            stop_signal=self.stop_signal,
        )

    def start(self) -> None:
        """Start the sweeps."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the sweeps, after the batch that is under way."""
        await self._loop.finish()
        async with self._one_at_a_time:  # also waits for a sweep that an operator has requested
            pass

    async def _step(self) -> None:
        if await self.time.is_confirmed():
            await self.sweep()

    async def sweep(self, *, within_s: float = math.inf) -> bool:
        """Do one sweep; return False if it ended before everything was removed.

        Args:
            within_s: seconds after which no further batch is begun. With a limit, the folders are
                not compared with the store, which takes long.
        """
        async with self._one_at_a_time:
            self._rested_at = monotonic()
            self._ends_s = self._rested_at + within_s
            if not self._compared and within_s == math.inf:
                await self._compare_folders()
                self._compared = not self._must_end
            if within_s < math.inf or self._sweeps % WHOLE_EVERY == 0:
                self._passed.clear()
            self._sweeps += 1
            await self._sweep()
            return not self._must_end

    @property
    def _must_end(self) -> bool:
        return self._loop.is_stopping or monotonic() > self._ends_s

    async def _sweep(self) -> None:
        begun, before = monotonic(), self.totals.removed.copy()
        for kind, keys in self._left.items():
            if keys:
                await self._move(kind, sorted(keys))
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
            found = await self.storage.read(
                retention.removable_runs,
                self.owner,
                after=after,
                upto=upto,
                now=self.clock.now(),
                limit=BATCH,
            )
            if found.last is None:
                return
            after = found.last  # so that a run whose files stay does not stop the search
            marked = await self._mark((RetentionKind.OUTPUTS, RetentionKind.WORKSPACES), found.keys)
            # Files first, so that a crash leaves rows without files, never files without rows.
            moved = await self._move(RetentionKind.RUNS, marked)
            removed = await self._in_pieces(retention.remove_runs, moved)
            self.totals.removed[RetentionKind.RUNS] += len(removed)
            await self._empty(RetentionKind.RUNS)
            await self._rest()

    async def _mark(self, kinds: tuple[RetentionKind, ...], keys: list[int]) -> list[int]:
        """Record that parts of runs are removed; return the runs that still permit the removal."""
        return await self._in_pieces(partial(retention.mark_removed, kinds=kinds), keys)

    async def _in_pieces(self, write: Callable[..., Progress], keys: list[int]) -> list[int]:
        """Do a write in several short transactions, and return the keys of the changed runs."""
        changed: list[int] = []
        while keys and not self._must_end:
            progress = await self.storage.write_own(
                write, keys=keys, owner=self.owner, now=self.clock.now(), within_s=WRITE_S
            )
            changed += progress.changed
            keys = keys[progress.handled :]
            if keys:
                await self._rest()
        return changed

    async def newest_to_remove(self) -> RunPosition:
        """Return the position of the newest run to remove, by the limits on age and number."""
        upto = FIRST
        if self.policy.ended_runs is not None:
            # Key 0 precedes all keys, because a run that ended exactly at this time is not old
            # enough.
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
            found = await self.storage.read(
                retention.removable_parts,
                self.owner,
                kind,
                after=self._passed.get(kind, FIRST),
                ended_before=self.before(age),
                now=self.clock.now(),
                limit=BATCH,
            )
            if found.last is None:
                return
            marked = await self._mark((kind,), found.keys)
            self.totals.removed[kind] += len(marked)
            if marked and kind is not RetentionKind.EVENTS:
                await self._move(kind, marked)
                await self._empty(kind)
            if not self._must_end:
                self._passed[kind] = found.last
            await self._rest()

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
            removed = await remove()
            self.totals.removed[kind] += removed
            if removed < BATCH:
                return
            await self._rest()

    async def _give_back_pages(self) -> None:
        free, ends = await self.storage.read(retention.free_pages), monotonic() + GIVE_BACK_S
        while free > PAGES and not self._must_end:
            if monotonic() > ends:
                return
            left = await self.storage.write_own(
                retention.give_back_pages, owner=self.owner, pages=PAGES, within_s=WRITE_S
            )
            if left >= free:
                return
            self.totals.pages_freed += free - left
            free = left
            await self._rest()

    def before(self, age: float) -> datetime:
        """Return the time that was `age` seconds ago."""
        return self.clock.now() - timedelta(seconds=age)

    async def _rest(self) -> None:
        """Pause for a multiple of the time since the previous pause."""
        await self.pause(min(PAUSE_MOST_S, (monotonic() - self._rested_at) * SHARE))
        self._rested_at = monotonic()

    # -- files ---------------------------------------------------------------------------------

    async def _move(self, kind: RetentionKind, keys: list[int]) -> list[int]:
        """Move files of these runs into `.removed`; return the runs for which this succeeded."""

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
        if kind is not RetentionKind.RUNS:  # runs are found again, because their rows stay
            left = self._left.setdefault(kind, set())
            left.difference_update(moved)
            left.update(set(keys) - set(moved))  # the next sweep tries again
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
            if place not in self._reported:  # logged once, not in every sweep
                self._reported.add(place)
                self.totals.not_removed += 1
                log.warning("retention.not_removed", place=f"runs/{place}", reason=reason)

    async def _compare_folders(self) -> None:
        """Remove the files of parts that are recorded as removed, and log folders of unknown runs.

        Files of other instances' runs are left alone.
        """
        unknown: list[int] = []
        async for keys, stored in self._folders():
            if self._must_end:
                return
            for kind in (RetentionKind.OUTPUTS, RetentionKind.WORKSPACES):
                marked = [key for key, run in stored.items() if run.own and kind in run.removed]
                if marked:  # the service died between the record and the removal
                    await self._move(kind, marked)
            unknown += [key for key in keys if key not in stored]
            await self._rest()
        if unknown:
            examples = [f"runs/{key}" for key in unknown[:UNKNOWN_SHOWN]]
            log.warning("retention.unknown_folders", folders=len(unknown), examples=examples)

    async def unknown_folders(self) -> int:
        """Return how many folders belong to runs that are not in the store.

        The service itself never leaves such a folder. It comes from a restored backup or a mistake.
        Its run may be alive elsewhere, so only an operator can decide to remove it.
        """
        return sum([len(keys) - len(stored) async for keys, stored in self._folders()])

    async def _folders(self) -> AsyncIterator[tuple[list[int], dict[int, StoredRun]]]:
        """Yield keys of folders, with those of their runs that are in the store."""
        keys = await daemon_threads.run(self.files.run_keys)
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            yield some, await self.storage.read(retention.stored_runs, self.owner, some)
