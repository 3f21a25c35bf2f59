"""Hints between the instances of one PostgreSQL database, by NOTIFY.

If a caller changes a run through an instance that does not own the run, the instance sends a hint
to the owner. The owner then reads the run at once, instead of at its next poll. Nothing relies on
hints: a lost connection loses its hints, and a pooler may drop them.

A background task sends the hints. The transactions that change runs do not, because PostgreSQL
takes a server-wide lock for each commit that notifies.
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
"""The most keys in one hint. A key has at most 19 digits, so the payload stays below the 8000 bytes
that PostgreSQL refuses."""
_LOST: Final[tuple[type[Exception], ...]] = (*DRIVER_ERRORS, OSError)
_UNREADABLE: Final = (ValueError, TypeError, OverflowError, RecursionError)
"""Errors of a payload that is not JSON, has another form, an infinite number, or too many
levels."""


class PeerNotices:
    """Sends hints to the owners of runs, and receives the hints for this instance."""

    def __init__(self, db: Database, storage: Storage, instance: str) -> None:
        self._db = db
        self._storage = storage
        self._instance = instance
        self._due: dict[str, set[int]] = {}
        self._woken = asyncio.Event()

    def announce(self, owner: str, run_key: int) -> None:
        """Queue a hint that a caller has changed a run of `owner` through this instance."""
        self._due.setdefault(owner, set()).add(run_key)
        self._woken.set()

    async def send(self) -> None:
        """Wait until a hint is queued, and send all queued hints."""
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
            StorageUnavailable: the connection was lost, or could not be opened.
        """
        peewee = (self._db.direct or self._db).peewee
        if not isinstance(peewee, PostgreSQL):
            raise TypeError("only PostgreSQL has NOTIFY")
        try:
            async with await peewee.connect_async() as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                self._storage.changes.announce_doubt()  # hints before LISTEN were missed
                async for notice in connection.notifies():
                    self._announce_received(notice.payload)
        except _LOST as error:
            raise StorageUnavailable from error

    def _announce_received(self, payload: str) -> None:
        """Announce the runs of a received hint. Its text is not trusted: any role can send one."""
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
