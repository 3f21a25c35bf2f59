"""The queue of runs, as this instance takes from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runrecovery_service.clock import Clock
from runrecovery_service.storage import turn_starts
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.turns import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQueue:
    """Takes queued runs of one owner.

    Attributes:
        site: where the processes of the runs are launched.
    """

    storage: Storage
    owner: Owner
    clock: Clock
    site: LaunchSite

    async def take_next(self, busy_engines: Sequence[str]) -> Turn | None:
        """Take the longest-waiting run whose engine is not busy; None if there is none."""
        return await self.storage.write_own(
            turn_starts.take_next,
            owner=self.owner,
            busy_engines=busy_engines,
            site=self.site,
            due_in=self.clock.due_in,
            steady=self.clock.steady(),
            now=self.clock.now(),
        )

    async def give_back(self, supervised: Collection[str]) -> int:
        """Requeue runs whose taking was committed without an answer; return how many.

        Args:
            supervised: cookies of the launches that have a supervisor.
        """
        return await self.storage.write_own(
            turn_starts.requeue_unlaunched, owner=self.owner, held=supervised, now=self.clock.now()
        )
