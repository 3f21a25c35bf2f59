"""The one signal that stops the service, made before anything that may give it."""

from __future__ import annotations

import asyncio

import structlog

from runrecovery_service.clock import wait_within

log = structlog.get_logger()


class StopSignal:
    """Whether the service is to stop, and by which error. Make it on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def is_set(self) -> bool:
        """True once a stop was requested. May be read on any thread."""
        return self._event.is_set()

    @property
    def failure(self) -> Exception | None:
        """The first error that the service stops by; None: a signal stops it, or nothing yet."""
        return self._failure

    def request(self) -> None:
        """Stop the service in order."""
        self._event.set()

    def fail(self, error: Exception) -> None:
        """Stop the service because of an error. The first error is kept."""
        self._failure = self._failure or error
        self._event.set()

    def fail_from_thread(self, error: Exception) -> None:
        """Call `fail` from any thread."""
        self._loop.call_soon_threadsafe(self.fail, error)

    def task_ended(self, task: asyncio.Task[None]) -> None:
        """Stop the service if a task that must not end has ended by an error (a done callback)."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            log.error("service.defect", exc_info=error)
            self.fail(error)

    async def wait(self) -> None:
        """Return once a stop was requested."""
        await self._event.wait()

    async def wait_within(self, seconds: float) -> bool:
        """Wait for at most `seconds`, and return whether a stop was requested."""
        return await wait_within(self._event, seconds)
