"""Starts and stops everything that keeps this service the owner of its runs.

`lease_renewal.py` renews the lease, `storage_health.py` checks the storage, and `peer_changes.py`
exchanges changes with other instances.
"""

from __future__ import annotations

import asyncio
from dataclasses import field

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.lease_renewal import LeaseRenewal
from runrecovery_service.locks import ServiceLocks
from runrecovery_service.peer_changes import notice_loops, shared_poll
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage_health import StatementTrials, file_watch


@dataclass(slots=True, kw_only=True, eq=False)
class Ownership:
    """Everything that keeps this service the owner of its runs, until `stop_tasks`."""

    lease: LeaseRenewal
    trials: StatementTrials
    storage: Storage
    owner: Owner
    locks: ServiceLocks
    stop: StopSignal
    _tasks: list[asyncio.Task[None]] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Start all loops. A defect in any of them stops the service."""
        notices = self.storage.notices
        loops = [
            *self.lease.tasks(),
            self.trials.task(),
            file_watch(self._demand_in_place, self.stop, start=self.storage.threads.start),
            *([shared_poll(self.storage, self.stop)] if self.storage.is_shared else []),
            *([] if notices is None else notice_loops(notices, self.stop)),
        ]
        self._tasks = [loop.start() for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self.stop.task_ended)

    async def stop_tasks(self) -> None:
        """Stop all loops, so that the lease is no longer renewed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def resign(self) -> None:
        """Release the lease, so that the next start need not wait until it ends."""
        stopped_us = await self.storage.write(instances.resign, self.owner)
        if self.lease.note is not None and stopped_us is not None:
            await self.lease.note.keep_stop(stopped_us)

    def _demand_in_place(self) -> None:
        self.storage.demand_in_place()
        self.locks.demand_in_place()
