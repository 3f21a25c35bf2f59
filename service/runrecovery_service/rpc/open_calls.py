"""Calls of every service that have not ended yet. A stop waits for them."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc

POLL_S: Final = 0.01
"""How often a stopping server checks for open calls."""


class OpenCalls:
    """Counts calls until gRPC has handed their responses to the operating system.

    A call may still be open after its handler has returned: a large response waits for its reader.
    """

    def __init__(self) -> None:
        self._open = 0

    def track(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Count a call until it ends."""
        self._open += 1
        context.add_done_callback(self._end)  # type: ignore[arg-type]  # the stub is no protocol

    def _end(self, _context: object) -> None:
        self._open -= 1

    async def wait_until_none(self) -> None:
        """Wait until no call is open."""
        while self._open:  # noqa: ASYNC110 - used once, at a stop; calls stay fast
            await asyncio.sleep(POLL_S)
