"""Reading and writing pipes on the event loop, by their descriptors.

Not as the loop's transports: uvloop closes the descriptor of a pipe transport twice, and the second
time it may be another thread's new one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

READ_BYTES: Final = 65536


async def read(descriptor: int) -> bytes:
    """Return what a pipe holds, as soon as it holds something; nothing at its end."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            await _until_ready(descriptor, loop.add_reader, loop.remove_reader)


async def write_all(descriptor: int, data: bytes) -> None:
    """Write to a pipe whose reader may be slow, or may never read."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            await _until_ready(descriptor, loop.add_writer, loop.remove_writer)


async def _until_ready(
    descriptor: int,
    watch: Callable[[int, Callable[[], None]], None],
    unwatch: Callable[[int], object],
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    watch(descriptor, note)
    try:
        await ready
    finally:
        unwatch(descriptor)
