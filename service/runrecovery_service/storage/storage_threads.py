"""Makes the threads on which a `Storage` runs its use cases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from runrecovery_service import daemon_threads
from runrecovery_service.metric_counters import Histogram
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.group_commit import GroupCommitWriter
from runrecovery_service.storage.reserved_connection import ReservedConnection

R = TypeVar("R")


class StorageThreads:
    """Threads of the system. Another implementation can run everything on the event loop."""

    def pool(self, workers: int) -> SteadyThreadPool:
        """Return the pool for reads and, on PostgreSQL, for writes."""
        return SteadyThreadPool(workers, thread_name_prefix="storage")

    def writer(self, db: Database, commit_writes: Histogram | None) -> GroupCommitWriter:
        """Return the one writer of a SQLite store."""
        return GroupCommitWriter(db, commit_writes)

    def reserved(self, db: Database, name: str = "storage-lease") -> ReservedConnection:
        """Return a thread with a connection of its own."""
        return ReservedConnection(db, SteadyThreadPool(1, thread_name_prefix=name))

    def start(self, work: Callable[[], R]) -> Future[R]:
        """Start work that may hang in a new thread. See `daemon_threads.start`."""
        return daemon_threads.start(work)

    async def run_alone(self, work: Callable[[], R]) -> R:
        """Run long work on a thread of its own, and return its result."""
        return await daemon_threads.run(work)
