"""The backlog between the task that reads a pipe and the task that parses what was read."""

from __future__ import annotations

import asyncio

import pytest
from runrecovery_service.execution.backlog import Backlog


async def is_waiting(task: asyncio.Task[object]) -> bool:
    """Return whether the task still waits after everything else had its turn."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_bytes_come_out_in_order_and_in_pieces_up_to_the_size_asked_for() -> None:
    backlog = Backlog(max_bytes=100)
    await backlog.put(b"one ")
    await backlog.put(b"two")
    backlog.end()

    taken = [await backlog.take(5) for _ in range(3)]

    assert taken == [b"one t", b"wo", b""]


async def test_a_reader_waits_only_while_the_backlog_is_full() -> None:
    backlog = Backlog(max_bytes=10)
    await backlog.put(b"x" * 9)
    putting = asyncio.create_task(backlog.put(b"yz"))

    assert await is_waiting(putting)
    assert len(backlog) == 11
    await backlog.take(1)
    assert await is_waiting(putting)  # 10 bytes are the bound
    await backlog.take(1)
    await asyncio.wait_for(putting, 10)
    assert await backlog.take(100) == b"x" * 7 + b"yz"


@pytest.mark.parametrize(("more", "taken"), [(b"late", b"late"), (None, b"")])
async def test_a_parser_waits_for_bytes_or_the_end(more: bytes | None, taken: bytes) -> None:
    backlog = Backlog(max_bytes=10)
    taking = asyncio.create_task(backlog.take(100))
    assert await is_waiting(taking)

    if more is None:
        backlog.end()
    else:
        await backlog.put(more)

    assert await asyncio.wait_for(taking, 10) == taken
