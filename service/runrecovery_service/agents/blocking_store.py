"""The store for code in a thread, which may block until the database answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database

R = TypeVar("R")


class BlockingStore(Protocol):
    """Reads and transactions that block."""

    def read(self, use: Callable[[Database], R]) -> R:
        """Return the result of a read."""
        ...

    def write(self, use: Callable[[Database], R]) -> R:
        """Return the result of a transaction, once it is durable."""
        ...


@dataclass(frozen=True, slots=True)
class ConnectionStore:
    """The store of a thread that has a connection of its own, as a recovery has."""

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
    """The store of a thread beside the event loop, which asks the loop.

    SQLite has one writer, and the loop's storage has it.
    """

    storage: Storage
    loop: asyncio.AbstractEventLoop

    def read(self, use: Callable[[Database], R]) -> R:
        """See `BlockingStore`."""
        return asyncio.run_coroutine_threadsafe(self.storage.read(use), self.loop).result()

    def write(self, use: Callable[[Database], R]) -> R:
        """See `BlockingStore`."""
        return asyncio.run_coroutine_threadsafe(self.storage.write_own(use), self.loop).result()
