"""Hints between the instances of one PostgreSQL database, by NOTIFY.

A hint says that a caller has changed a run through an instance that does not own the run. The owner
then reads the run at once instead of at its next poll. Nothing relies on hints: a hint may be lost
with its connection, and a pooler may drop it.

A background task sends the hints, not the transactions that change runs: PostgreSQL takes a lock of
the whole server for each commit that notifies.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Final

from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS
from runrecovery_service.storage.postgresql import PostgreSQL

if TYPE_CHECKING:
    from runrecovery_service.storage.async_storage import Storage

CHANNEL: Final = "runrecovery"
KEYS_PER_NOTICE: Final = 300
"""PostgreSQL refuses a payload of 8000 bytes. A key has at most 19 digits."""
_LOST: Final[tuple[type[Exception], ...]] = (*DRIVER_ERRORS, OSError)
_UNREADABLE: Final = (ValueError, TypeError, OverflowError, RecursionError)
"""No JSON, other JSON, a number that is infinite, and lists that are nested too deeply."""


class PeerNotices:
    """Sends hints to the owners of runs, and receives the hints for this instance."""

    def __init__(self, db: Database, storage: Storage, instance: str) -> None:
        self._db = db
        self._storage = storage
        self._instance = instance
        self._due: dict[str, set[int]] = {}
        self._woken = asyncio.Event()

    def announce(self, owner: str, run_key: int) -> None:
        """Queue a hint for the owner of a run that a caller has changed here."""
        self._due.setdefault(owner, set()).add(run_key)
        self._woken.set()

    async def send(self) -> None:
        """Wait for a hint, and send every queued one."""
        await self._woken.wait()
        self._woken.clear()
        due, self._due = self._due, {}
        payloads = [
            payload for owner, run_keys in due.items() for payload in _payloads(owner, run_keys)
        ]
        await self._storage.read(_notify, payloads)

    async def listen(self) -> None:
        """Announce the runs of every hint for this instance, until the connection is lost.

        Raises:
            StorageUnavailable: the connection was lost, or cannot be made.
        """
        peewee = (self._db.direct or self._db).peewee
        if not isinstance(peewee, PostgreSQL):
            raise TypeError("only PostgreSQL has NOTIFY")
        try:
            async with await peewee.connect_async() as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                self._storage.changes.announce_doubt()  # earlier hints were missed
                async for notice in connection.notifies():
                    self._hear(notice.payload)
        except _LOST as error:
            raise StorageUnavailable from error

    def _hear(self, payload: str) -> None:
        """Announce the runs of a hint, whose text is not trusted: any role can send a hint."""
        try:
            owner, run_keys = json.loads(payload)
            keys = frozenset(map(int, run_keys))
        except _UNREADABLE:
            return
        if owner == self._instance:
            self._storage.changes.announce(keys)


def _payloads(owner: str, run_keys: Collection[int]) -> Iterator[str]:
    keys = sorted(run_keys)
    for at in range(0, len(keys), KEYS_PER_NOTICE):
        yield json.dumps([owner, keys[at : at + KEYS_PER_NOTICE]])


def _notify(db: Database, payloads: Collection[str]) -> None:
    for payload in payloads:
        db.execute("SELECT pg_notify(?, ?)", (CHANNEL, payload))
