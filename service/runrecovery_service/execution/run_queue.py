"""Takes runs from the queue of this instance.

On a shared store, an instance that finds no run in its own queue takes one from a peer. The order
of the queue is in `storage/queue_order.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service.clock import Clock, loop_time_s
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import turn_starts, work_stealing
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()

PEERS_INTERVAL_S: Final = 0.5
"""The pause after a search that has found no run of a peer."""


@dataclass(slots=True, kw_only=True, eq=False)
class RunQueue:
    """The queue of one instance. If none of its runs can start, a run of a peer is taken.

    Attributes:
        site: the instance and host on which processes are launched.
        catalog: the configured engines. A peer's run is taken only if its engine is among them.
        shares_workspaces: whether this instance can resume the sessions of its peers.
    """

    storage: Storage
    owner: Owner
    clock: Clock
    site: LaunchSite
    catalog: Catalog
    shares_workspaces: bool = False
    _search_due_s: float = field(default=0.0, init=False)

    async def take_next(
        self, busy_engines: Sequence[str], *, ending_runs: Collection[int]
    ) -> Turn | None:
        """Take the longest-queued run whose engine is not busy; return None if there is none.

        Args:
            ending_runs: the keys of runs that are not taken, because the supervisor of their latest
                turn does not know yet whether the turn's end is recorded.
        """
        turn = await self._take_own(busy_engines, ending_runs)
        if turn is None and await self._moved_from_peer(busy_engines):
            turn = await self._take_own(busy_engines, ending_runs)
        return turn

    async def _moved_from_peer(self, busy_engines: Sequence[str]) -> bool:
        """Move a run of a peer into this queue; return False if no run was moved."""
        if not self.storage.is_shared or loop_time_s() < self._search_due_s:
            return False
        engines = set(self.catalog.names) - set(busy_engines)
        if not engines:
            return False
        taker = work_stealing.Taker(
            owner=self.owner, engines=engines, shares_workspaces=self.shares_workspaces
        )
        peer = await self.storage.read(work_stealing.find_peer, taker, now=self.clock.now())
        if peer is None:
            self._search_due_s = loop_time_s() + PEERS_INTERVAL_S
            return False
        run_id = await self.storage.write_own(
            work_stealing.take_from, taker, peer, now=self.clock.now(), steady=self.clock.steady()
        )
        if run_id is not None:
            log.info("execution.taken_from_peer", run_id=run_id, peer=peer)
        return run_id is not None

    async def _take_own(
        self, busy_engines: Sequence[str], ending_runs: Collection[int]
    ) -> Turn | None:
        return await self.storage.write_own(
            turn_starts.take_next,
            owner=self.owner,
            busy_engines=busy_engines,
            site=self.site,
            due_in=self.clock.due_in,
            steady=self.clock.steady(),
            now=self.clock.now(),
            without=ending_runs,
        )

    async def give_back(self, supervised: Collection[str]) -> int:
        """Requeue runs that were taken by a commit whose answer was lost. Return their number.

        Args:
            supervised: cookies of the launches that have a supervisor.
        """
        return await self.storage.write_own(
            turn_starts.requeue_unlaunched, owner=self.owner, held=supervised, now=self.clock.now()
        )
