"""Output that was read from a pipe and is not parsed yet, up to a bound."""

from __future__ import annotations

import asyncio


class Backlog:
    """Bytes between the task that reads a pipe and the task that parses them.

    The reader waits only while the backlog is full. An agent that prints faster than its output is
    parsed is then slowed down by its pipe, and the memory of the service stays bounded.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = bytearray()  # not a list of pieces: a piece may be a single byte
        self._has_ended = False
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()

    def __len__(self) -> int:
        return len(self._bytes)

    async def put(self, data: bytes) -> None:
        """Add bytes; return once there is room for more."""
        self._bytes += data
        self._has_news.set()
        while len(self._bytes) >= self._max_bytes:
            self._has_room.clear()
            await self._has_room.wait()

    def end(self) -> None:
        """Record that no more bytes will come."""
        self._has_ended = True
        self._has_news.set()

    async def take(self, most: int) -> bytes:
        """Wait for bytes, and return up to `most` of them; empty at the end."""
        while not self._bytes and not self._has_ended:
            self._has_news.clear()
            await self._has_news.wait()
        taken = bytes(self._bytes[:most])
        del self._bytes[:most]
        self._has_room.set()
        return taken
