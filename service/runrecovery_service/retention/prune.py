"""Removes at once what retention would remove, or reports what it would remove."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from runrecovery_service import daemon_threads
from runrecovery_service.domain.retention import (
    FIRST,
    PruneResult,
    RetentionKind,
    RunPosition,
)
from runrecovery_service.retention.sweep import RetentionSweep
from runrecovery_service.storage import retention

PRUNE_S: Final = 5.0
"""How long one call removes; the caller repeats it until nothing is left."""
PAGE: Final = 1000


@dataclass(slots=True, kw_only=True, eq=False)
class Pruner:
    """Prunes for operators, beside the sweeps that come by themselves."""

    sweep: RetentionSweep
    _asked: set[asyncio.Task[PruneResult]] = field(default_factory=set, init=False)

    async def prune(self, *, dry_run: bool) -> PruneResult:
        """Return the counts of removals within `PRUNE_S`; with `dry_run`, of possible removals now.

        A sweep continues if its caller stops waiting.
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
        """Yield the runs that would be removed, or the others that would lose a part."""
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
            else:  # rows that belong to no run
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
