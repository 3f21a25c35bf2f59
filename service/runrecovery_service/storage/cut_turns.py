"""Turns that ended because the service died, with the decisions of recovery on their runs."""

from __future__ import annotations

from dataclasses import field
from datetime import datetime
from typing import Final

from runrecovery_service.domain.recovery_matrix import QUESTION_RULE, RESULT_RULE
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_apply import Batch
from runrecovery_service.storage.rows import from_us

_CUT_TURNS: Final = (
    "SELECT r.run_id, r.engine, l.attempt, l.turn, r.traceparent, l.cookie, l.created_at, e.rule,"
    " e.status_after FROM recovery_event e JOIN run r ON r.id = e.run JOIN process_lease l"
    " ON l.run = r.id AND l.attempt = r.attempt AND l.turn = r.turn"
    " WHERE e.reconciliation = ? AND e.run BETWEEN ? AND ?"
    # All other runs had no process: the end of their latest turn is recorded.
    f" AND (e.status_before = '{RunStatus.RUNNING}' OR (e.status_before ="
    f" '{RunStatus.WAITING_USER}' AND e.profile = '{Profile.STICKY_PROCESS}'))"
    " ORDER BY e.run LIMIT ?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTurn:
    """A turn that ended because the service died.

    Attributes:
        cookie: the secret marker of its launch.
        traceparent: the W3C `traceparent` of the run; None: the run has no trace.
        rule: the rule that decided on the run.
        status: the status of the run after the decision.
    """

    run_id: str
    engine: str
    attempt: int
    turn: int
    traceparent: str | None
    cookie: str = field(repr=False)
    launched_at: datetime
    rule: str
    status: str

    @property
    def has_failed(self) -> bool:
        """Whether the turn failed: its agent had not finished, and no cancel was accepted."""
        return self.rule not in {RESULT_RULE, QUESTION_RULE} and self.status != RunStatus.CANCELED


def cut_turns(db: Database, reconciliation_key: int, batch: Batch, *, limit: int) -> list[CutTurn]:
    """Return at most `limit` cut turns of runs in a batch that a recovery has decided."""
    rows = db.fetch_all(_CUT_TURNS, (reconciliation_key, batch.first, batch.last, limit))
    return [
        CutTurn(
            run_id=run_id,
            engine=engine,
            attempt=attempt,
            turn=turn,
            traceparent=traceparent,
            cookie=cookie,
            launched_at=from_us(created_at),
            rule=rule,
            status=status,
        )
        for (
            run_id, engine, attempt, turn, traceparent, cookie, created_at, rule, status
        ) in rows
    ]  # fmt: skip
