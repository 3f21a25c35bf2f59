"""A connection to PostgreSQL that is reserved for one purpose, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.postgresql import cut
from runrecovery_service.storage.use_case import run_use_case

R = TypeVar("R")


class ReservedConnection:
    """A thread whose connection stays open, so that no other client can take its place."""

    def __init__(self, db: Database, thread: SteadyThreadPool) -> None:
        """Use a pool of one thread, which belongs to this object from now on."""
        self._db = db
        self._thread = thread
        self._connection: object = None
        self._opening: Future[None] | None = None

    def open(self) -> None:
        """Begin to connect; see `is_connected`."""
        self._opening = self.submit(_connect)

    @property
    def is_connected(self) -> bool | None:
        """Whether `open` has succeeded; None while the attempt is under way."""
        if self._opening is None or not self._opening.done():
            return None
        return self._opening.exception() is None

    def submit(self, use: Callable[[Database], R]) -> Future[R]:
        """Queue a use case for the connection, and return the future of its result."""

        def on_connection(db: Database) -> R:
            self._connection = db.peewee.connection()
            return use(db)

        return self._thread.submit(lambda: run_use_case(self._db, on_connection))

    def abort(self) -> None:
        """Make the running use case fail, and end the thread."""
        self.close()
        self.cut()

    def cut(self) -> None:
        """Make the running use case fail."""
        cut(self._connection)

    def close(self) -> Future[None]:
        """End the thread after the queued use cases.

        The future resolves when the connection is closed.
        """
        closing = self._thread.submit(self._db.close)
        self._thread.shutdown(wait=False)
        return closing


def _connect(db: Database) -> None:
    """Do nothing: every use case opens the connection if it is not open."""
