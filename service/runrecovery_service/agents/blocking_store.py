"""The store for code in a thread. Its calls block until the database answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database

R = TypeVar("R")


class BlockingStore(Protocol):
    """Reads and transactions that block."""

    def read(self, use: Callable[[Database], R]) -> R:
        """Run a read, and return its result."""
        ...

    def write(self, use: Callable[[Database], R]) -> R:
        """Run a transaction, and return its result once it is durable."""
        ...


@dataclass(frozen=True, slots=True)
class ConnectionStore:
    """The store for a thread that has its own connection, for example the thread of a recovery."""

    db: Database

    def read(self, use: Callable[[Database], R]) -> R:
        """See `BlockingStore`."""
        return use(self.db)

    def write(self, use: Callable[[Database], R]) -> R:
        """See `BlockingStore`."""
        with self.db.transaction():
            return use(self.db)


@dataclass(frozen=True, slots=True)
class LoopStore:
    """The store for threads without a connection. It passes their calls to the event loop.

    SQLite has only one writer, and the storage on the event loop owns this writer.
    """

    storage: Storage
    loop: asyncio.AbstractEventLoop

    def read(self, use: Callable[[Database], R]) -> R:
        """See `BlockingStore`."""
        return asyncio.run_coroutine_threadsafe(self.storage.read(use), self.loop).result()

    def write(self, use: Callable[[Database], R]) -> R:
        """See `BlockingStore`."""
        return asyncio.run_coroutine_threadsafe(self.storage.write_own(use), self.loop).result()
