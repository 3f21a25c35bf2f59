"""Paces tasks that wake at the same time, so that other calls get their share of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque


class FairWakeup:
    """Lets one task pass per round of the event loop, first come, first served.

    A thousand watchers of one event wake in the same round. Each needs only 0.2 ms, but together
    they would delay every other call for longer than a health check may take. One task per round,
    not several: gRPC needs many rounds to receive and answer one call.
    """

    def __init__(self) -> None:
        self._is_busy = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait_turn(self) -> None:
        """Wait until it is the caller's turn: not at all, unless others wait."""
        loop = asyncio.get_running_loop()
        if not self._is_busy:
            self._is_busy = True
            loop.call_soon(self._next, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its task may have been cancelled
                turn.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._is_busy = False
