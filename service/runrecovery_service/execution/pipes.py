"""Reads and writes pipes on the event loop, by their descriptors.

The loop's pipe transports are not used: uvloop closes the descriptor of a transport twice, and at
the second time the number can belong to another thread's new file.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import termios
from array import array
from collections.abc import Callable
from typing import TypeVar

from runrecovery_service.process.spool import READ_BYTES

R = TypeVar("R")

POLL_FIRST_S, POLL_MOST_S = 0.002, 0.05


async def read(descriptor: int) -> bytes:
    """Wait until a pipe has data, and return the data; empty at the end of the pipe."""
    return await read_by(descriptor, lambda pipe: os.read(pipe, READ_BYTES))


async def read_by(descriptor: int, take: Callable[[int], R]) -> R:
    """Wait until a pipe has data or has ended, then return the result of `take`."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    while True:
        try:
            return take(descriptor)
        except BlockingIOError:
            await _wait_until_ready(descriptor, loop.add_reader, loop.remove_reader)


async def write_all(descriptor: int, data: bytes) -> None:
    """Write all data to a pipe. This waits for ever if the reader never reads."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            await _wait_until_ready(descriptor, loop.add_writer, loop.remove_writer)


def fill(descriptor: int, data: bytes) -> int:
    """Write as much as a pipe takes at once, and return how many bytes it took."""
    os.set_blocking(descriptor, False)
    try:
        return os.write(descriptor, data) if data else 0
    except (BlockingIOError, BrokenPipeError):
        return 0


async def wait_until_read(descriptor: int) -> bool:
    """Wait until everything is read from a pipe. Return False if it is closed with data unread.

    This waits for ever if a reader keeps the pipe open and does not read.
    """
    pause_s = POLL_FIRST_S
    while bytes_held(descriptor):
        if _has_no_reader(descriptor):
            return not bytes_held(descriptor)  # perhaps everything was read before the close
        await asyncio.sleep(pause_s)  # polls, because no system call reports that a pipe was read
        pause_s = min(pause_s * 2, POLL_MOST_S)
    return True


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def bytes_held(descriptor: int) -> int:
    """Return how many bytes are in a pipe, given a descriptor of either end."""
    held = array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, held)
    return held[0]


async def _wait_until_ready(
    descriptor: int,
    watch: Callable[[int, Callable[[], None]], None],
    unwatch: Callable[[int], object],
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    watch(descriptor, set_ready)
    try:
        await ready
    finally:
        unwatch(descriptor)
