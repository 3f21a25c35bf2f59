"""A bounded buffer of output that was read from a pipe but is not parsed yet."""

from __future__ import annotations

import asyncio

from runrecovery_service.execution.pipes import read_by
from runrecovery_service.process.spool import Spool


class Backlog:
    """The part of a spool between the task that reads the pipe and the task that parses.

    While the backlog is full, the reader waits. The pipe then slows down an agent that prints
    faster than its output is parsed, and the memory of the service stays bounded.
    """

    def __init__(self, spool: Spool, *, max_bytes: int) -> None:
        self._spool = spool
        self._max_bytes = max_bytes
        self._taken_to = spool.end
        self._has_ended = False
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()

    def __len__(self) -> int:
        return self._spool.end - self._taken_to

    @property
    def taken_to(self) -> int:
        """The offset in the spool of the next byte that `take` will return."""
        return self._taken_to

    async def fill(self, pipe: int) -> bool:
        """Add the bytes in a pipe, and wait for room for more. Return False at the pipe's end."""
        is_open = bool(await read_by(pipe, self._spool.fill))
        self._has_ended = not is_open
        self._has_news.set()
        while len(self) >= self._max_bytes:
            self._has_room.clear()
            await self._has_room.wait()
        return is_open

    async def take(self, most: int) -> bytes:
        """Wait for bytes, and return up to `most` of them; at the end return none."""
        while not len(self) and not self._has_ended:
            self._has_news.clear()
            await self._has_news.wait()
        taken = self._spool.read(self._taken_to, most)
        self._taken_to += len(taken)
        self._has_room.set()
        return taken
