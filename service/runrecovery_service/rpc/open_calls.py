"""The calls that are not over yet, whatever their service: a stop waits for them."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc

IDLE_LOOK_S: Final = 0.01
"""How often a server that ends looks whether calls are still under way."""


class OpenCalls:
    """Counts calls until gRPC has handed their answers to the system, not only until the handler
    has returned: a large answer waits for its reader after that."""

    def __init__(self) -> None:
        self._under_way = 0

    def begin(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Count a call until it is over."""
        self._under_way += 1
        context.add_done_callback(self._end)  # type: ignore[arg-type]  # the stub is no protocol

    def _end(self, _context: object) -> None:
        self._under_way -= 1

    async def until_none(self) -> None:
        """Return when no call is under way."""
        while self._under_way:  # noqa: ASYNC110 - once in a life; calls stay quick
            await asyncio.sleep(IDLE_LOOK_S)
