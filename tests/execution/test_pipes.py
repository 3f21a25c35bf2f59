"""The service learns whether data in a pipe was read, or can never be read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from runrecovery_service.execution import pipes


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


async def test_a_write_counts_as_read_once_its_last_byte_was_read(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    await pipes.write_all(writes, b"hello")
    waiting = asyncio.create_task(pipes.wait_until_read(writes))

    os.read(reads, 4)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.2)
    os.read(reads, 1)

    assert await asyncio.wait_for(waiting, 30)


async def test_an_empty_pipe_counts_as_read(pipe: tuple[int, int]) -> None:
    assert await asyncio.wait_for(pipes.wait_until_read(pipe[1]), 30)


async def test_bytes_left_in_a_pipe_without_a_reader_count_as_unread() -> None:
    reads, writes = os.pipe()
    try:
        await pipes.write_all(writes, b"hello")
        waiting = asyncio.create_task(pipes.wait_until_read(writes))
        os.read(reads, 4)
        os.close(reads)

        assert not await asyncio.wait_for(waiting, 30)
    finally:
        os.close(writes)
