"""The spans of one turn: its wait for a slot, its launch, and the turn itself."""

from __future__ import annotations

from runrecovery_service.domain.run import RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.spans import NO_FACTS, TURN, Span, Tracer, turn_facts
from runrecovery_service.storage.turns import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSpans:
    """The spans of a turn that has got its slot. They belong to the trace stored with the run.

    Attributes:
        turn: the span of the turn.
        launch: the span of the launch, a child of `turn`.
    """

    turn: Span
    launch: Span

    @property
    def traceparent(self) -> str | None:
        """The W3C `traceparent` that the agent gets."""
        return self.turn.traceparent

    def launched(self) -> None:
        """End the span of the launch, because the agent has started."""
        self.launch.end()

    def ended(self, status: RunStatus | None, error: str | None) -> None:
        """End the span of the turn, with the new status and the error of the run."""
        facts = NO_FACTS if status is None else {"runrecovery.status": status.value}
        self.launch.end(error=error or "NOT_LAUNCHED")  # has no effect if the agent has started
        self.turn.end(facts, error=error)

    def left_to_recovery(self) -> None:
        """End the span of the launch, because the service stops. The recovery reports the turn."""
        self.launch.end(error="SERVICE_STOPPED")


def begin_spans(turn: Turn, tracer: Tracer) -> TurnSpans:
    """Begin the spans of a turn that has just got its slot."""
    run = turn.run
    facts = turn_facts(run_id=run.run_id, engine=run.engine, attempt=run.attempt, turn=run.turn)
    if turn.queued_at is not None:
        tracer.start("queue", run.traceparent, facts, started_at=turn.queued_at).end()
    span = tracer.start(TURN, run.traceparent, facts, key=turn.launch.cookie)
    return TurnSpans(turn=span, launch=tracer.start("launch", span.traceparent, facts))
