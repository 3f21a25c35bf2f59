"""Interruptions of turns. The row of a run has its interruption until the next turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from runrecovery_service.domain.interruption import (
    Interruption,
    InterruptionCause,
)
from runrecovery_service.domain.recovery_matrix import QUEUED_FOR_HOST_RULE, RESUMED_RULE, Fact
from runrecovery_service.domain.resume_backoff import LONGEST_DELAY_S, resume_delay_s
from runrecovery_service.domain.run import Interaction, InteractionState, Run, RunStatus
from runrecovery_service.domain.steady_time import Due
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_scope import ApplyScope
from runrecovery_service.storage.rows import enum_from_text, from_us, to_us

NONE: Final[Mapping[str, object]] = {
    "interrupted_at": None, "interrupted_by": None, "resume_count": 0
}  # fmt: skip
"""The column values of a run without an interruption."""


def columns(
    run: Run, cause: InterruptionCause, *, due_in: Callable[[float], Due], now: datetime
) -> dict[str, object]:
    """Return the changed columns of a run whose turn was just interrupted and will be resumed."""
    changes: dict[str, object] = {"interrupted_at": to_us(now), "interrupted_by": cause.value}
    if delay_s := resume_delay_s(run.resume_count):
        due = due_in(delay_s)
        changes |= {
            "resume_at": to_us(due.at), "resume_due_us": due.us, "due_clock": due.clock
        }  # fmt: skip
    return changes


def record_batch(db: Database, scope: ApplyScope, *, first: int, last: int) -> None:
    """Record interruptions for the runs of a batch that a recovery has just decided to resume.

    A run that was already QUEUED keeps its earlier interruption. If the run's deadlines are of
    another clock, its `due_clock` is cleared: the recovery then converts all of its deadlines
    together.
    """
    delay_us = _resume_delay_us_sql()
    db.execute(
        f"UPDATE run SET interrupted_at = ?, interrupted_by = '{InterruptionCause.RESTART}',"
        f" resume_at = CASE WHEN {delay_us} > 0 THEN {delay_us} + ? END,"
        f" resume_due_us = CASE WHEN {delay_us} > 0 THEN {delay_us} + ? END,"
        # An empty `due_clock` makes the recovery convert the deadlines by the wall clock.
        " due_clock = CASE WHEN COALESCE(due_clock, ?) = ? THEN ? ELSE '' END"
        " WHERE id IN (SELECT e.run FROM recovery_event e WHERE e.reconciliation = ?"
        f" AND e.run BETWEEN ? AND ? AND e.rule IN ('{RESUMED_RULE}', '{QUEUED_FOR_HOST_RULE}')"
        # With a reply, the next turn answers a question instead of resuming the interrupted turn.
        f" AND (e.facts & {Fact.REPLY.value}) = 0"
        f" AND e.status_before = '{RunStatus.RUNNING}')",
        (
            to_us(scope.now),
            to_us(scope.now),
            scope.steady.us,
            *(scope.steady.clock,) * 3,
            scope.reconciliation_key,
            first,
            last,
        ),
    )


def _resume_delay_us_sql() -> str:
    """Return an SQL expression for `resume_delay_s(resume_count)`, in microseconds."""
    delays, longest = [], 0
    while resume_delay_s(longest) < LONGEST_DELAY_S:
        delays.append(f"WHEN {longest} THEN {round(resume_delay_s(longest) * 1e6)}")
        longest += 1
    longest_us = round(LONGEST_DELAY_S * 1e6)
    # For PostgreSQL: the sum with a time since the boot does not fit into 32 bits.
    return f"CAST(CASE resume_count {' '.join(delays)} ELSE {longest_us} END AS BIGINT)"


def pending(db: Database, run: Run, last: Interaction | None) -> Interruption | None:
    """Return the interruption from which the queued run will resume; None: there is none.

    Args:
        last: the run's latest question.
    """
    if run.session is None:
        return None
    row = db.fetch_one(
        "SELECT interrupted_at, interrupted_by, questions_before FROM run WHERE id = ?", (run.key,)
    )
    at, cause, questions_before = row or (None, None, 0)
    if at is None:
        return None
    received = (
        last is not None
        and last.state is InteractionState.DELIVERED
        and last.interaction_id > questions_before  # else it is of an earlier attempt
    )
    return Interruption(
        at=from_us(at),
        cause=enum_from_text(InterruptionCause, cause) or InterruptionCause.RESTART,
        times=run.resume_count + 1,
        reply=last if received else None,
    )


def count_resume(db: Database, run_key: int) -> None:
    """Increment the run's count of resumes, in the transaction that records the agent's start."""
    db.execute(
        "UPDATE run SET resume_count = resume_count + 1"
        " WHERE id = ? AND interrupted_at IS NOT NULL",
        (run_key,),
    )
