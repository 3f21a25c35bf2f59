"""The events of runs. An event is written in the transaction of the change that it reports.

The sequence number of an event is the run's new `event_count`, so that there is no gap. Event 1,
the creation, is derived from the run's row. The decisions of recoveries have a table of their own.
Only the latest `EVENTS_KEPT` events of a run are kept, so that an endless conversation does not
grow without bound. Retention can remove the events of an ended run.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from runrecovery_service.domain.errors import WatchHistoryPruned, WatchSequenceUnknown
from runrecovery_service.domain.recovery_matrix import REOPEN_RULE
from runrecovery_service.domain.run import Run, RunEvent, RunEventKind, RunStatus
from runrecovery_service.domain.usage import Usage
from runrecovery_service.storage import tables, webhook_outbox
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.rows import (
    RECOVERY_COLUMNS,
    enum_from_text,
    from_us,
    recovery_from_row,
    to_us,
    usage_from_json,
    usage_to_json,
)
from runrecovery_service.storage.statements import Statement, param

EVENTS_KEPT: Final = 1000

_V, _E, _C = tables.RunEvent, tables.RecoveryEvent, tables.Reconciliation

_ADD = Statement(
    lambda: _V.insert(
        {
            _V.run: param("run"),
            _V.no: param("no"),
            _V.kind: param("kind"),
            _V.status: param("status"),
            _V.attempt: param("attempt"),
            _V.interaction: param("interaction"),
            _V.error_code: param("error_code"),
            _V.happened_at: param("now"),
            _V.caller: param("caller"),
        }
    )
)
_OWN = Statement(
    lambda: (
        _V.select(
            _V.no,
            _V.kind,
            _V.happened_at,
            _V.status,
            _V.attempt,
            _V.interaction,
            _V.error_code,
            _V.usage,
            _V.message,
            _V.caller,
        )
        .where((_V.run == param("run")) & (_V.no > param("after")) & (_V.no <= param("last")))
        .order_by(_V.no)
    )
)
_DECISIONS = Statement(
    lambda: (
        _E.select(_E.sequence, _E.attempt, _E.caller, *RECOVERY_COLUMNS)
        .join(_C, on=(_C.id == _E.reconciliation))
        .where(
            (_E.run == param("run"))
            & (_E.sequence > param("after"))
            & (_E.sequence <= param("last"))
        )
        .order_by(_E.sequence)
    )
)


def record_event(
    db: Database,
    run: Run,
    *,
    kind: RunEventKind,
    status: RunStatus,
    attempt: object,
    interaction_id: int,
    error_code: object,
    caller: object,
    now: datetime,
) -> None:
    """Record the next event of a run, in the caller's transaction.

    Args:
        run: the run as it was before the change.
        attempt, error_code: the values of these columns after the change.
        caller: the name of the caller that caused the event; None: no named caller did.
    """
    number = run.event_count + 1
    _ADD.run(
        db,
        run=run.key,
        no=number,
        kind=kind.value,
        status=status.value,
        attempt=attempt,
        interaction=interaction_id,
        error_code=error_code,
        caller=caller,
        now=to_us(now),
    )
    webhook_outbox.record_event(db, run, kind=kind, status=status, error_code=error_code, now=now)
    if number > EVENTS_KEPT:
        db.execute(
            "DELETE FROM run_event WHERE run = ? AND no <= ?", (run.key, number - EVENTS_KEPT)
        )


def add_to_event(
    db: Database, run: Run, *, usage: Usage | None = None, message: str | None = None
) -> None:
    """Add details to the event that was just recorded, in the same transaction.

    Args:
        run: the run as it was before the event was recorded.
        usage: the usage of the turn that has ended.
        message: the text that the agent reported.
    """
    db.execute(
        "UPDATE run_event SET usage = ?, message = ? WHERE run = ? AND no = ?",
        (usage_to_json(usage), message, run.key, run.event_count + 1),
    )


def events_after(db: Database, run: Run, after: int) -> tuple[RunEvent, ...]:
    """Return the events of a run after sequence number `after`, up to the run's version.

    Raises:
        WatchHistoryPruned: some of these events were deleted.
        WatchSequenceUnknown: the run has no event `after` yet.
    """
    last = run.event_count
    oldest = max(1, last - EVENTS_KEPT + 1)
    if after < oldest - 1:
        raise WatchHistoryPruned(run.run_id, oldest)
    if after > last:
        raise WatchSequenceUnknown(run.run_id, last)
    if after == last:
        return ()
    span = {"run": run.key, "after": after, "last": last}
    found = [_event_from_row(row) for row in _OWN.run(db, **span).fetchall()]
    found += [_decision_from_row(row) for row in _DECISIONS.run(db, **span).fetchall()]
    if after < 1:
        found.append(_created(run))
    found.sort(key=lambda event: event.sequence)
    if [event.sequence for event in found] != list(range(after + 1, last + 1)):
        # Retention, or the limit on kept events, has deleted events. Every gap is reported.
        raise WatchHistoryPruned(run.run_id, _oldest_without_gap(found, last))
    return tuple(found)


def _oldest_without_gap(found: Sequence[RunEvent], last: int) -> int:
    """Return the first sequence number after which no event up to `last` is missing."""
    oldest = last + 1
    for event in reversed(found):
        if event.sequence != oldest - 1:
            break
        oldest -= 1
    return oldest


def _event_from_row(row: Row) -> RunEvent:
    (
        sequence, kind, happened_at, status, attempt, interaction_id, error_code, usage, message,
        caller,
    ) = row  # fmt: skip
    return RunEvent(
        sequence=sequence,
        kind=enum_from_text(RunEventKind, kind),
        happened_at=from_us(happened_at),
        status=enum_from_text(RunStatus, status),
        attempt=attempt,
        interaction_id=interaction_id,
        error_code=error_code,
        usage=usage_from_json(usage),
        message=message or "",
        caller=caller,
    )


def _decision_from_row(row: Row) -> RunEvent:
    sequence, attempt, caller, *columns = row
    decision = recovery_from_row(tuple(columns))
    assert decision is not None  # noqa: S101 - its columns are not NULL, and the join is inner
    reopened = decision.recovery_reason == REOPEN_RULE
    return RunEvent(
        sequence=sequence,
        kind=RunEventKind.REOPENED if reopened else RunEventKind.RECOVERED,
        happened_at=decision.recovered_at,
        status=decision.status_after,
        attempt=attempt or 0,
        interaction_id=0,
        error_code=decision.error_code,
        recovery=decision,
        caller=caller,
    )


def _created(run: Run) -> RunEvent:
    return RunEvent(
        sequence=1,
        kind=RunEventKind.CREATED,
        happened_at=run.created_at,
        status=RunStatus.QUEUED,
        attempt=0,
        interaction_id=0,
        error_code=None,
        caller=run.created_by,
    )
