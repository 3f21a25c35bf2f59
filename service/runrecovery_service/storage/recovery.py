"""What restarts decided: history, recovered runs, reports."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import takewhile
from typing import Final

from runrecovery_service.domain.errors import ReconciliationNotFound
from runrecovery_service.domain.reconciliation import (
    BindingCounts,
    Cause,
    Containment,
    ContainmentLevel,
    DecisionCount,
    OrphanCounts,
    Phase,
    Reconciliation,
    ReconciliationState,
    RecoveredFilter,
)
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE
from runrecovery_service.domain.run import JsonValue, Page, RecoveryInfo, RecoveryState, Run
from runrecovery_service.storage import runs, tables
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import (
    RECOVERY_COLUMNS,
    from_us,
    from_us_or_none,
    recovery_from_row,
    to_json,
    to_us,
)

_C, _E, _R = tables.Reconciliation, tables.RecoveryEvent, tables.Run

INTERRUPTED: Final = "interrupted by a stop"
"""The error of a report whose service was told to stop: nothing was wrong with the recovery."""
HISTORY_LIMIT: Final = 1000
WARNINGS_LIMIT: Final = 100

RULE_STATES: Final = {rule.name: rule.state for rule in MATRIX} | {
    QUARANTINE_RULE: RecoveryState.QUARANTINED
}
"""Every recovery_reason and the state it leads to, in the order of the matrix."""


# -- decisions ---------------------------------------------------------------------------------


def history(db: Database, run_id: str) -> tuple[RecoveryInfo, ...]:
    """Return the decisions for one run, newest first, at most the latest 1000.

    Raises:
        RunNotFound: there is no such run.
    """
    run = runs.get(db, run_id)
    query = (
        _E.select(*RECOVERY_COLUMNS)
        .join(_C, on=(_C.id == _E.reconciliation))
        .where(_E.run == run.key)
        .order_by(_E.no.desc())
        .limit(HISTORY_LIMIT)
    )
    rows = (recovery_from_row(row) for row in db.peewee.execute(query).fetchall())
    return tuple(row for row in rows if row is not None)


def recovered_page(
    db: Database, wanted: RecoveredFilter, *, after: tuple[int, ...] | None, limit: int
) -> Page[Run]:
    """Return a page of recovered runs, newest decision first."""
    query = runs.select().where(_R.recovered_at.is_null(is_null=False))
    if wanted.states:
        query = query.where(_R.recovery_state.in_([state.value for state in wanted.states]))
    if wanted.reason is not None:
        query = query.where(_R.recovery_reason == wanted.reason)
    if wanted.engine is not None:
        query = query.where(_R.engine == wanted.engine)
    if wanted.after is not None:
        query = query.where(_R.recovered_at >= to_us(wanted.after))
    if wanted.before is not None:
        query = query.where(_R.recovered_at < to_us(wanted.before))
    if wanted.reconciliation_id is not None:
        reports = _C.select(_C.id).where(_C.reconciliation_id == wanted.reconciliation_id)
        query = query.where(_R.reconciliation.in_(reports))
    query = query.order_by(_R.recovered_at.desc(), _R.id.desc())
    if after is None:
        return runs.page_of(db, [query], limit, _recovered_key)
    at, key = after
    # A restart may have decided on all of them at one time. Two queries: an index seeks to the
    # place of each, while in one, an OR, it would pass by everything of that time.
    rest_of_that_time = query.where(_R.recovered_at == at, _R.id < key)
    return runs.page_of(
        db, [rest_of_that_time, query.where(_R.recovered_at < at)], limit, _recovered_key
    )


def _recovered_key(run: Run) -> tuple[int, ...]:
    if run.recovery is None:  # its report is gone; such a row still has a place in the order
        return (0, run.key)
    return (to_us(run.recovery.recovered_at), run.key)


# -- reports -----------------------------------------------------------------------------------


def begin(
    db: Database,
    owner: Owner,
    *,
    reconciliation_id: str,
    cause: Cause,
    safe_mode: bool,
    now: datetime,
) -> int:
    """Open the report of this start, or planned stop, and return its key.

    Reports that earlier epochs left RUNNING were cut off by the end of their service; they are
    closed as FAILED. What they had decided stands.
    """
    with db.transaction():
        db.execute(
            "UPDATE reconciliation SET state = 'FAILED', finished_at = ?,"
            " error = 'the service ended before it was complete'"
            " WHERE instance = ? AND state = 'RUNNING'",
            (to_us(now), owner.instance),
        )
        row = db.fetch_one(
            "INSERT INTO reconciliation (reconciliation_id, instance, epoch, cause, state,"
            " started_at, phases, decisions, orphans, bindings, warnings, quarantined,"
            " runs_scanned, runs_total, runs_unchanged, safe_mode)"
            " VALUES (?, ?, ?, ?, 'RUNNING', ?, '[]', '{}', '{}', '{}', '[]', 0, 0, 0, 0, ?)"
            " RETURNING id",
            (
                reconciliation_id,
                owner.instance,
                owner.epoch,
                cause.value,
                to_us(now),
                int(safe_mode),
            ),
        )
    assert row is not None  # noqa: S101 - RETURNING gives the row that was inserted
    key: int = row[0]
    return key


def unfinished_since(db: Database, instance: str, since: datetime) -> int:
    """Return how many starts of the instance in a row, up to now, did not finish recovering."""
    rows = db.fetch_all(
        "SELECT epoch, state FROM reconciliation WHERE instance = ? AND started_at >= ?"
        " AND cause = 'STARTUP' AND COALESCE(error, '') <> ? ORDER BY id DESC LIMIT 1000",
        (instance, to_us(since), INTERRUPTED),
    )
    unfinished = takewhile(lambda row: row[1] != ReconciliationState.COMPLETED, rows)
    return len({epoch for epoch, _ in unfinished})


def write_report(db: Database, key: int, report: Reconciliation) -> None:
    """Write the report as it is now, in the caller's transaction if there is one."""
    with db.transaction():
        db.execute(
            "UPDATE reconciliation SET state = ?, finished_at = ?, phases = ?, decisions = ?,"
            " orphans = ?, bindings = ?, warnings = ?, quarantined = ?, runs_scanned = ?,"
            " runs_total = ?, runs_unchanged = ?, containment = ?, error = ? WHERE id = ?",
            (
                report.state.value,
                None if report.finished_at is None else to_us(report.finished_at),
                to_json([[phase.name, phase.duration_s] for phase in report.phases]),
                to_json({count.rule: count.count for count in report.decisions}),
                to_json(_counts(report.orphans)),
                to_json(_counts(report.bindings)),
                to_json(list(report.warnings[:WARNINGS_LIMIT])),
                report.quarantined,
                report.runs_scanned,
                report.runs_total,
                report.runs_unchanged,
                _contained(report.containment),
                report.error,
                key,
            ),
        )


def _counts(counts: OrphanCounts | BindingCounts) -> dict[str, JsonValue]:
    return {name: getattr(counts, name) for name in counts.__dataclass_fields__}


def _contained(containment: Containment | None) -> str | None:
    return None if containment is None else to_json([containment.level, containment.detail])


_REPORT_COLUMNS: Final = (
    _C.id, _C.reconciliation_id, _C.instance, _C.epoch, _C.cause, _C.state, _C.started_at,
    _C.finished_at, _C.phases, _C.decisions, _C.orphans, _C.bindings, _C.warnings, _C.quarantined,
    _C.runs_scanned, _C.runs_total, _C.runs_unchanged, _C.safe_mode, _C.containment,
    _C.error,
)  # fmt: skip


def reconciliation(db: Database, reconciliation_id: str) -> Reconciliation:
    """Return one report.

    Raises:
        ReconciliationNotFound: there is none.
    """
    query = _C.select(*_REPORT_COLUMNS).where(_C.reconciliation_id == reconciliation_id)
    row = db.peewee.execute(query).fetchone()
    if row is None:
        raise ReconciliationNotFound(reconciliation_id)
    return _report_from_row(row)


def reconciliation_page(
    db: Database, *, after: tuple[int, ...] | None, limit: int
) -> Page[Reconciliation]:
    """Return a page of reports, newest first."""
    query = _C.select(*_REPORT_COLUMNS)
    if after is not None:
        query = query.where(_C.id < after[0])
    rows = db.peewee.execute(query.order_by(_C.id.desc()).limit(limit + 1)).fetchall()
    page = runs.cut(rows, limit, lambda row: (row[0],))
    return Page(rows=tuple(_report_from_row(row) for row in page.rows), after=page.after)


def _report_from_row(row: Row) -> Reconciliation:
    (
        _, reconciliation_id, instance, epoch, cause, state, started_at, finished_at,
        phases, decisions, orphans, bindings, warnings, quarantined,
        scanned, total, unchanged, safe_mode, containment, error,
    ) = row  # fmt: skip
    counted: dict[str, int] = json.loads(decisions)
    return Reconciliation(
        reconciliation_id=reconciliation_id,
        instance=instance,
        epoch=epoch,
        cause=Cause(cause),
        state=ReconciliationState(state),
        started_at=from_us(started_at),
        finished_at=from_us_or_none(finished_at),
        phases=tuple(Phase(name=name, duration_s=seconds) for name, seconds in json.loads(phases)),
        decisions=tuple(
            DecisionCount(rule=rule, recovery_state=state, count=counted[rule])
            for rule, state in RULE_STATES.items()
            if rule in counted
        ),
        orphans=OrphanCounts(**json.loads(orphans)),
        bindings=BindingCounts(**json.loads(bindings)),
        quarantined=quarantined,
        warnings=tuple(json.loads(warnings)),
        runs_scanned=scanned,
        runs_total=total,
        runs_unchanged=unchanged,
        safe_mode=bool(safe_mode),
        containment=None if containment is None else _containment(containment),
        error=error,
    )


def _containment(text: str) -> Containment:
    level, detail = json.loads(text)
    return Containment(level=ContainmentLevel(level), detail=detail)
