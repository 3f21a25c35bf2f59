"""The spans of one recovery: the recovery itself, and each of its phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from runrecovery_service.domain.reconciliation import Cause, Reconciliation
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.spans import TURN, Span, Tracer, turn_facts
from runrecovery_service.storage.cut_turns import CutTurn, cut_turns
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery_apply import Batch

CUT_TURNS_REPORTED: Final = 1000
"""The most turns of one batch that are reported. Only damaged rows can exceed the number of
slots."""


@dataclass(frozen=True, slots=True)
class RecoverySpans:
    """The spans of a recovery that has begun. They form a separate trace."""

    tracer: Tracer
    recovery: Span

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report one phase as a span."""
        span, error = self.tracer.start(name, self.recovery.traceparent), None
        try:
            yield
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            span.end(error=error)

    def report_cut_turns(self, db: Database, report_key: int, batch: Batch) -> None:
        """Report the turns in a batch that ended because the service died."""
        for turn in cut_turns(db, report_key, batch, limit=CUT_TURNS_REPORTED):
            self._report_cut_turn(turn)

    def _report_cut_turn(self, turn: CutTurn) -> None:
        """Report a turn as one span, with the id that the agent uses as parent of its spans."""
        facts = turn_facts(
            run_id=turn.run_id, engine=turn.engine, attempt=turn.attempt, turn=turn.turn
        )
        span = self.tracer.start(
            TURN, turn.traceparent, facts, started_at=turn.launched_at, key=turn.cookie
        )
        span.end(
            {"runrecovery.status": turn.status, "runrecovery.rule": turn.rule},
            error=turn.rule if turn.has_failed else None,
        )

    def completed(self, report: Reconciliation) -> None:
        """End the recovery's span, with the counts of its report."""
        self.recovery.end(
            {
                "runrecovery.runs_scanned": report.runs_scanned,
                "runrecovery.quarantined": report.quarantined,
                "runrecovery.orphans_ended": report.orphans.ended,
                "runrecovery.safe_mode": report.safe_mode,
            }
        )

    def failed(self, reason: str) -> None:
        """End the span of a failed recovery."""
        self.recovery.end(error=reason)


def begin_spans(
    tracer: Tracer, owner: Owner, *, cause: Cause, reconciliation_id: str
) -> RecoverySpans:
    """Begin the spans of a recovery."""
    facts: dict[str, str | int] = {
        "runrecovery.reconciliation_id": reconciliation_id,
        "runrecovery.cause": cause.value,
        "runrecovery.instance": owner.instance,
        "runrecovery.epoch": owner.epoch,
    }
    return RecoverySpans(tracer, tracer.start("recovery", None, facts))
