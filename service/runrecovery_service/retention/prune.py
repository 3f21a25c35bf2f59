"""Does a retention sweep at once for an operator, or previews it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import field
from typing import Final

from runrecovery_service import daemon_threads
from runrecovery_service.domain.retention import (
    FIRST,
    PruneResult,
    RetentionKind,
    RunPosition,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.retention.sweep import RetentionSweep
from runrecovery_service.storage import retention

PRUNE_S: Final = 5.0
"""Time limit of one call. The caller repeats the call until nothing is left to remove."""
PAGE: Final = 1000


@dataclass(slots=True, kw_only=True, eq=False)
class Pruner:
    """Removes, at the request of an operator, everything that the regular sweeps would remove."""

    sweep: RetentionSweep
    _asked: set[asyncio.Task[PruneResult]] = field(default_factory=set, init=False)

    async def prune(self, *, dry_run: bool) -> PruneResult:
        """Remove for up to `PRUNE_S` seconds, and return counts; with `dry_run` only count.

        If the caller stops waiting, the sweep continues.
        """
        if dry_run:
            return await self._preview()
        task = asyncio.create_task(self._remove(), name="prune")
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    async def _remove(self) -> PruneResult:
        totals = self.sweep.totals
        removed, freed = totals.removed.copy(), totals.bytes_freed.copy()
        done = await self.sweep.sweep(within_s=PRUNE_S)
        return PruneResult(
            counts={kind: totals.removed[kind] - removed[kind] for kind in self.sweep.policy.kinds},
            sizes=totals.bytes_freed - freed,
            oldest_kept=await self.sweep.storage.read(
                retention.oldest_kept, self.sweep.owner, upto=FIRST, now=self.sweep.clock.now()
            ),
            done=done,
        )

    async def _preview(self) -> PruneResult:
        sweep, sizes = self.sweep, Counter[RetentionKind]()
        counts = dict.fromkeys(sweep.policy.kinds, 0)
        upto = await sweep.newest_to_remove()
        for kind in sweep.policy.kinds:
            async for page in self._pages(kind, upto):
                counts[kind] += len(page)
                sizes[kind] += await daemon_threads.run(
                    lambda kind=kind, page=page: sum(  # type: ignore[misc]
                        sweep.files.size(kind, key) for key in page
                    )
                )
        counts |= await self._rows()
        return PruneResult(
            counts=counts,
            sizes=sizes,
            oldest_kept=await sweep.storage.read(
                retention.oldest_kept, sweep.owner, upto=upto, now=sweep.clock.now()
            ),
            done=True,
            unknown_folders=await sweep.unknown_folders(),
        )

    async def _pages(self, kind: RetentionKind, upto: RunPosition) -> AsyncIterator[list[int]]:
        """Yield pages of keys: of runs to remove or, for a part, of runs that would lose it."""
        policy, sweep = self.sweep.policy, self.sweep
        ages = {
            RetentionKind.OUTPUTS: policy.outputs,
            RetentionKind.WORKSPACES: policy.workspaces,
            RetentionKind.EVENTS: policy.events,
        }
        after = FIRST if kind is RetentionKind.RUNS else upto
        while True:
            if kind is RetentionKind.RUNS:
                page = await sweep.storage.read(
                    retention.removable_runs,
                    sweep.owner,
                    after=after,
                    upto=upto,
                    now=sweep.clock.now(),
                    limit=PAGE,
                )
            elif (age := ages.get(kind)) is not None:
                page = await sweep.storage.read(
                    retention.removable_parts,
                    sweep.owner,
                    kind,
                    after=after,
                    ended_before=sweep.before(age),
                    now=sweep.clock.now(),
                    limit=PAGE,
                )
            else:  # receipts and reports, which have no run
                return
            if page.last is None:
                return
            yield page.keys
            after = page.last

    async def _rows(self) -> dict[RetentionKind, int]:
        policy, sweep, found = self.sweep.policy, self.sweep, {}
        if policy.receipts is not None:
            found[RetentionKind.RECEIPTS] = await sweep.storage.read(
                retention.count_receipts,
                sweep.owner,
                created_before=sweep.before(policy.receipts),
            )
        if policy.reports is not None:
            found[RetentionKind.REPORTS] = await sweep.storage.read(
                retention.count_reports,
                sweep.owner,
                started_before=sweep.before(policy.reports),
            )
        return found
