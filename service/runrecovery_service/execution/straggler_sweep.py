"""Looks again after the processes of launches that are over, while the service runs.

Those that could not be ended are tried until they are gone, which frees their runs. Those that
were closed a short time ago are looked for once more: no scan of a process table is proof.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from runrecovery_service.agents.launch_markers import launch_markers
from runrecovery_service.clock import wait_within
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.execution.workshop import Workshop
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.storage import processes
from runrecovery_service.storage.processes import Ended, Lease

log = structlog.get_logger()

PATROL_S: Final = 2.0
"""Between two rounds; one takes some 30 ms where there is something to look for, else nothing."""
LOOK_AGAIN_FOR_S: Final = 60.0
"""How long a closed launch is looked for."""
ROUND_DEADLINE_S: Final = 10.0
"""On top of the grace: for ending what a round finds."""


@dataclass(slots=True, kw_only=True, eq=False)
class StragglerSweep:
    """Goes its rounds until it is stopped.

    Attributes:
        followed: the leases whose processes a session looks after itself.
        look_at_shims: lets those sessions see whether their shims still guard.
        changed: called when a run may have become free to be launched again.
    """

    shop: Workshop
    followed: Callable[[], frozenset[str]]
    look_at_shims: Callable[[], None]
    changed: Callable[[], None]
    _told: set[str] = field(default_factory=set)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with the rounds."""
        self._task = asyncio.create_task(self._work(), name="patrol")

    async def stop(self) -> None:
        """End after the round that is under way."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        while not await wait_within(self._stopping, PATROL_S):
            try:
                self.look_at_shims()
                await self.round()
            except Fenced:
                return  # the service stops
            except Exception as error:
                known = is_outage(error)
                log.warning("execution.patrol_failed", **error_facts(error), exc_info=not known)

    async def round(self) -> None:
        """Look once after all that is over and not known to be gone for good."""
        found = await self.shop.storage.read(
            processes.to_patrol,
            self.shop.owner,
            now=self.shop.clock.now(),
            closed_within_s=LOOK_AGAIN_FOR_S,
        )
        leases = [lease for lease in found if lease.cookie not in self.followed()]
        if not leases:
            return
        endings = await asyncio.get_running_loop().run_in_executor(
            self.shop.threads, self._end, leases
        )
        late = [
            (lease, endings[lease.key])
            for lease in leases
            if lease.unended or endings[lease.key].found or not endings[lease.key].gone
        ]
        if late:
            await self._record(late)

    def _end(self, leases: Sequence[Lease]) -> dict[int, Ending]:
        grace_s = self.shop.cancel_grace_s
        return end_trees(
            [launch_markers(lease) for lease in leases],
            why="patrol",
            grace_s=grace_s,
            deadline_s=grace_s + ROUND_DEADLINE_S,
        )

    async def _record(self, late: Sequence[tuple[Lease, Ending]]) -> None:
        ended = [
            (
                lease,
                Ended(exit_code=None, processes_ended=ending.ended, gone=ending.gone),
            )
            for lease, ending in late
        ]
        await self.shop.storage.write(processes.close_late, ended, now=self.shop.clock.now())
        for lease, ending in late:
            self._tell(lease, ending)
        self.changed()

    def _tell(self, lease: Lease, ending: Ending) -> None:
        if ending.gone:
            self.shop.remove_cgroup(lease)
        facts = {"run_id": lease.run_id, "attempt": lease.attempt, "turn": lease.turn}
        if ending.ended or ending.gone:
            log.warning(
                "execution.straggler_ended", **facts, processes=ending.ended, gone=ending.gone
            )
        for refusal in ending.refused:
            if refusal not in self._told:  # once, not with every round
                self._told.add(refusal)
                log.warning("execution.tree_not_ended", **facts, reason=refusal)
