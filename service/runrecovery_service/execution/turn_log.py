"""The log of one turn, and the retries whose failures it reports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import structlog

from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.meters import Meters
from runrecovery_service.periodic import Backoff
from runrecovery_service.storage.driver_errors import is_unstorable

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.execution.turn_spans import TurnSpans

log = structlog.get_logger()

R = TypeVar("R")

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class TurnLog:
    """Logs for one turn, and counts: each line names the run, the attempt and the turn.

    Attributes:
        spans: end with what they stand for; None: nothing is traced.
        meters: the counters to update.
        begun_s: when the turn got its slot, by `monotonic`.
    """

    run: Run
    spans: TurnSpans | None = None
    meters: Meters = field(default_factory=Meters)
    begun_s: float = field(default_factory=monotonic)

    def info(self, event: str, **facts: object) -> None:
        """Log a line."""
        log.info(event, **self._turn, **facts)

    def warning(self, event: str, **facts: object) -> None:
        """Log a warning."""
        log.warning(event, **self._turn, **facts)

    def launched(self, *, pid: int | None, shim: int) -> None:
        """Log that the agent has started."""
        self.info("execution.launched", pid=pid, shim=shim)
        if self.spans is not None:
            self.spans.launched()
        self.meters.launch_seconds.observe(monotonic() - self.begun_s, self.run.engine)

    def output_lost(self, *, channel: str, error: str | None) -> None:
        """Log that a piece of output could not be kept."""
        self.warning("execution.output_lost", channel=channel, error=error)
        self.meters.output_lost.add(self.run.engine)

    def turn_ended(
        self, *, status: RunStatus | None, error_code: str | None, **facts: object
    ) -> None:
        """Log how the turn has ended, once that is on record."""
        self.info(
            "execution.turn_ended",
            status=status and status.value,
            error_code=error_code,
            **facts,
        )
        if self.spans is not None:
            self.spans.ended(status, error_code)
        took_s = monotonic() - self.begun_s
        self.meters.turn_seconds.observe(took_s, self.run.engine, status or "UNKNOWN")

    def left(self) -> None:
        """Leave the turn to the recovery: the service stops."""
        if self.spans is not None:
            self.spans.left()

    @property
    def traceparent(self) -> str | None:
        """The context that the agent gets."""
        return self.run.traceparent if self.spans is None else self.spans.traceparent

    @property
    def _turn(self) -> dict[str, object]:
        return {"run_id": self.run.run_id, "attempt": self.run.attempt, "turn": self.run.turn}


async def retry_until_done(do: Callable[[], Awaitable[R]], turn_log: TurnLog) -> R:
    """Return the result of `do`, which is repeated with pauses until it succeeds.

    A full disk, a lost database or a defect must not lose what a process did. The run keeps its
    slot meanwhile, and the log says why.

    Raises:
        Fenced: a newer epoch owns the run.
        Exception: an error of which `is_unstorable` is true. A repetition could never succeed.
    """
    backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S)
    while True:
        try:
            return await do()
        except Fenced:
            raise
        except Exception as error:
            if is_unstorable(error):
                raise
            known = is_outage(error)
            turn_log.warning("execution.write_retried", **error_facts(error), exc_info=not known)
        await asyncio.sleep(backoff.next_s())
