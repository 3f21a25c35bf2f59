"""The one loop for tasks that repeat, and the one backoff between failed tries.

No library is used: the import of tenacity costs a start 10 ms of CPU time, that of stamina 18 ms.
Both only retry a call that raises. The loop, which stops between two rounds and logs an error once,
would still be code of this service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import field

import structlog

from runrecovery_service.clock import wait_within
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.stop_signal import StopSignal

log = structlog.get_logger()


@dataclass(slots=True)
class Backoff:
    """The pauses between tries: each twice as long as the one before, up to a limit."""

    first_s: float
    most_s: float
    _next_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._next_s = self.first_s

    def next_s(self) -> float:
        """Return the seconds to wait before the next try."""
        pause_s, self._next_s = self._next_s, min(self._next_s * 2, self.most_s)
        return pause_s


@dataclass(slots=True, kw_only=True)
class FailureLog:
    """Logs the failures of a repeated step. The same kind of error is logged once until a success.

    Attributes:
        failure_event: the log event of a failure.
    """

    failure_event: str
    _reported: str = field(default="", init=False)

    def report(self, error: Exception) -> None:
        """Log the error unless its kind was just logged. Log a defect with its traceback."""
        kind = type(error).__name__
        if kind != self._reported:
            self._reported = kind
            log.warning(self.failure_event, **error_facts(error), exc_info=not is_outage(error))

    def note_success(self) -> None:
        """Record a success: the next failure is logged, whatever its kind."""
        self._reported = ""


@dataclass(slots=True, kw_only=True, eq=False)
class PeriodicTask:
    """Calls a step again and again, until it is stopped.

    A step that fails is logged, and the next step tries again. The same kind of error is logged
    once, until a step succeeds.

    Attributes:
        name: the name of the asyncio task.
        step: one round. It returns the seconds until the next one; None: `interval_s`.
        interval_s: seconds from the end of one step to the start of the next.
        failure_event: the log event of a step that failed.
        stop_signal: the signal that stops the service.
        first_wait_s: seconds before the first step; None: `interval_s`.
        fatal: errors of a step that stop the service and end the loop.
        retried: errors of a step that are logged and retried. Other errors end the task.
    """

    name: str
    step: Callable[[], Awaitable[float | None]]
    interval_s: float
    failure_event: str
    stop_signal: StopSignal
    first_wait_s: float | None = None
    fatal: tuple[type[Exception], ...] = (Fenced,)
    retried: tuple[type[Exception], ...] = (Exception,)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _failures: FailureLog = field(init=False)

    def __post_init__(self) -> None:
        self._failures = FailureLog(failure_event=self.failure_event)

    @property
    def is_stopping(self) -> bool:
        """Whether `finish` was called. A long step should then end early."""
        return self._stopping.is_set()

    def start(self) -> asyncio.Task[None]:
        """Start the loop, and return its task."""
        self._task = asyncio.create_task(self.run(), name=self.name)
        return self._task

    async def finish(self) -> None:
        """Stop the loop after the present step, if one is running."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def cancel(self) -> None:
        """Stop the loop at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self) -> None:
        """Run the loop in the caller's task."""
        wait_s = self.interval_s if self.first_wait_s is None else self.first_wait_s
        if wait_s and await wait_within(self._stopping, wait_s):
            return
        pause_s: float | None = None
        while True:
            try:
                pause_s = await self.step()
                self._failures.note_success()
            except self.fatal as error:
                self.stop_signal.fail(error)
                return
            except self.retried as error:
                pause_s = None
                self._failures.report(error)
            if await wait_within(self._stopping, self.interval_s if pause_s is None else pause_s):
                return
