"""The log of one turn, and a retry loop that logs its failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import field
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import structlog

from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Meters
from runrecovery_service.periodic import Backoff
from runrecovery_service.storage.driver_errors import is_unstorable

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.execution.turn_spans import TurnSpans

log = structlog.get_logger()

R = TypeVar("R")

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class TurnLog:
    """Logs and counts for one turn. Each line has the run, the attempt and the turn.

    Attributes:
        spans: the spans of the turn; None: traces are off.
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
        """Log the end of the turn. Call this once the end is recorded."""
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

    def left_to_recovery(self) -> None:
        """End the spans because the service stops, and leave the turn to the recovery."""
        if self.spans is not None:
            self.spans.left_to_recovery()

    @property
    def traceparent(self) -> str | None:
        """The W3C `traceparent` that the agent gets; None: traces are off."""
        return self.run.traceparent if self.spans is None else self.spans.traceparent

    @property
    def _turn(self) -> dict[str, object]:
        return {"run_id": self.run.run_id, "attempt": self.run.attempt, "turn": self.run.turn}


async def retry_until_done(do: Callable[[], Awaitable[R]], turn_log: TurnLog) -> R:
    """Call `do` with pauses until it succeeds, and return its result.

    So no failure of the store, and no defect, loses the results of a process. Meanwhile the run
    keeps its slot, and the failures are logged.

    Raises:
        Fenced: a newer epoch owns the run.
        Exception: the value can never be stored (`is_unstorable`), so every further try would fail.
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
