"""The request to stop, made by a signal or by a part of the service that failed.

`signal_handlers.py` acts on signals of the system.
"""

from __future__ import annotations

import asyncio

import structlog

from runrecovery_service.clock import wait_within

log = structlog.get_logger()


class StopSignal:
    """Records that the service is to stop, and the error that stops it.

    Only `is_set` may be called outside the event loop's thread.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._failure: Exception | None = None

    def is_set(self) -> bool:
        """Return whether a stop was requested. Any thread may call this."""
        return self._event.is_set()

    @property
    def failure(self) -> Exception | None:
        """The error that stopped the service; None: no stop yet, or a stop without an error."""
        return self._failure

    def request(self) -> None:
        """Stop the service in order."""
        self._event.set()

    def fail(self, error: Exception) -> None:
        """Stop the service because of an error. If several errors come, the first is kept."""
        self._failure = self._failure or error
        self._event.set()

    def task_ended(self, task: asyncio.Task[None]) -> None:
        """Stop the service if the task has failed. To be added as a done callback of the task."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            log.error("service.defect", exc_info=error)
            self.fail(error)

    async def wait(self) -> None:
        """Wait until a stop is requested."""
        await self._event.wait()

    async def wait_within(self, seconds: float) -> bool:
        """Wait for at most `seconds`, and return whether a stop was requested."""
        return await wait_within(self._event, seconds)
