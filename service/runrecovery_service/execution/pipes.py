"""Reading and writing pipes on the event loop, by their descriptors.

Not as the loop's transports: uvloop closes the descriptor of a pipe transport twice, and the second
time it may be another thread's new one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import termios
from array import array
from collections.abc import Callable
from typing import Final

READ_BYTES: Final = 65536
LOOK_FIRST_S, LOOK_MOST_S = 0.002, 0.05


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


def fill(descriptor: int, data: bytes) -> int:
    """Write what a pipe takes at once, and return how many bytes that were."""
    os.set_blocking(descriptor, False)
    try:
        return os.write(descriptor, data) if data else 0
    except (BlockingIOError, BrokenPipeError):
        return 0


async def until_read(descriptor: int) -> bool:
    """Return True once a reader has taken all that was written to a pipe, and False once nobody can
    any more; never, if somebody could and does not."""
    pause_s = LOOK_FIRST_S
    while bytes_held(descriptor):
        if _has_no_reader(descriptor):
            return not bytes_held(descriptor)  # it may have read all since, and gone
        await asyncio.sleep(pause_s)  # nothing tells of it
        pause_s = min(pause_s * 2, LOOK_MOST_S)
    return True


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def bytes_held(descriptor: int) -> int:
    """Return how many bytes a pipe holds; either end tells."""
    held = array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, held)
    return held[0]


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
