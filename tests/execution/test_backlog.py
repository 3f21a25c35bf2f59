"""The backlog between the task that reads a pipe and the task that parses the output."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from runrecovery_service.execution.backlog import Backlog
from runrecovery_service.process.spool import Spool


class Agent:
    """The writing end of a pipe, and a backlog at its other end."""

    def __init__(self, spool: Spool, *, max_bytes: int = 100) -> None:
        self.spool = spool
        self.backlog = Backlog(spool, max_bytes=max_bytes)
        self.pipe, self.writing_end = os.pipe()

    def print(self, data: bytes) -> None:
        os.write(self.writing_end, data)

    async def fill(self, data: bytes) -> bool:
        self.print(data)
        return await self.backlog.fill(self.pipe)

    def end(self) -> None:
        os.close(self.writing_end)
        self.writing_end = -1

    def close(self) -> None:
        os.close(self.pipe)
        with suppress(OSError):
            os.close(self.writing_end)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with closing(Spool()) as spool, closing(Agent(spool, max_bytes=10)) as agent:
        yield agent


async def is_waiting(task: asyncio.Task[bytes] | asyncio.Task[bool]) -> bool:
    """Return whether the task still waits after everything else had its turn."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_bytes_come_out_in_order_and_in_pieces_up_to_the_size_asked_for(agent: Agent) -> None:
    assert await agent.fill(b"one ")
    assert await agent.fill(b"two")
    agent.end()
    assert not await agent.backlog.fill(agent.pipe)

    taken = [await agent.backlog.take(5) for _ in range(3)]

    assert taken == [b"one t", b"wo", b""]


async def test_a_reader_waits_only_while_the_backlog_is_full(agent: Agent) -> None:
    await agent.fill(b"x" * 9)
    filling = asyncio.create_task(agent.fill(b"yz"))

    assert await is_waiting(filling)
    assert len(agent.backlog) == 11
    await agent.backlog.take(1)
    assert await is_waiting(filling)  # 10 bytes are the bound
    await agent.backlog.take(1)
    await asyncio.wait_for(filling, 10)
    assert await agent.backlog.take(100) == b"x" * 7 + b"yz"


@pytest.mark.parametrize(("more", "taken"), [(b"late", b"late"), (None, b"")])
async def test_a_parser_waits_for_bytes_or_the_end(
    agent: Agent, more: bytes | None, taken: bytes
) -> None:
    taking = asyncio.create_task(agent.backlog.take(100))
    assert await is_waiting(taking)

    if more is None:
        agent.end()
    else:
        agent.print(more)
    await agent.backlog.fill(agent.pipe)

    assert await asyncio.wait_for(taking, 10) == taken
