"""The reports of recoveries: one row per start, planned stop or takeover."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import takewhile
from typing import Final

from runrecovery_service.domain.errors import ReconciliationNotFound, StorageBusy
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
    TrustRemoval,
)
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE
from runrecovery_service.domain.run import (
    JsonValue,
    Page,
    RecoveryState,
)
from runrecovery_service.storage import tables, use_case
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import (
    from_us,
    from_us_or_none,
    to_json,
    to_us,
)
from runrecovery_service.storage.sql_dialects import DatabaseKind, SqlDialect

_C = tables.Reconciliation

INTERRUPTED: Final = "interrupted by a stop"
"""The error of a report whose recovery was interrupted by a stop of the service."""
ABANDONED: Final = "the service ended before it was complete"
"""The error of a report whose service ended before the recovery completed."""
OPEN_REPORT_LOCK: Final = 0x5252_4356_0001
"""The key of the advisory lock under which a report is opened."""
WARNINGS_LIMIT: Final = 100
TRUST_REMOVALS_LIMIT: Final = 100

RULE_STATES: Final = {rule.name: rule.state for rule in MATRIX} | {
    QUARANTINE_RULE: RecoveryState.QUARANTINED
}
"""Every recovery_reason and the state it leads to, in the order of the matrix."""


def open_report(
    db: Database,
    owner: Owner,
    *,
    reconciliation_id: str,
    cause: Cause,
    safe_mode: bool,
    now: datetime,
    recovered_instance: str | None = None,
) -> int:
    """Open the report of a recovery, and return its key.

    RUNNING reports of earlier epochs are closed as FAILED, because their service has ended. Their
    decisions remain.
    """
    with db.transaction():
        if db.dialect.kind is DatabaseKind.POSTGRESQL:
            # Reports must become visible in the order of their keys. Otherwise the decision feed
            # would skip a report that is committed late.
            db.execute("SELECT pg_advisory_xact_lock(?)", (OPEN_REPORT_LOCK,))
        close_abandoned(db)
        db.execute(
            f"UPDATE reconciliation SET state = 'FAILED', finished_at = ?, error = '{ABANDONED}'"
            " WHERE instance = ? AND state = 'RUNNING'",
            (to_us(now), owner.instance),
        )
        row = db.fetch_one(
            "INSERT INTO reconciliation (reconciliation_id, instance, epoch, cause, state,"
            " started_at, phases, decisions, orphans, bindings, warnings, quarantined,"
            " runs_scanned, runs_total, runs_unchanged, safe_mode, recovered_instance)"
            " VALUES (?, ?, ?, ?, 'RUNNING', ?, '[]', '{}', '{}', '{}', '[]', 0, 0, 0, 0, ?, ?)"
            " RETURNING id",
            (
                reconciliation_id,
                owner.instance,
                owner.epoch,
                cause.value,
                to_us(now),
                int(safe_mode),
                recovered_instance,
            ),
        )
    assert row is not None  # noqa: S101 - RETURNING gives the row that was inserted
    key: int = row[0]
    return key


def close_abandoned(db: Database) -> int:
    """Close the RUNNING reports of instances that are not alive, and return their number.

    If one of these instances was only frozen, it can commit no decision under its closed report.
    """
    # Only one service at a time uses a SQLite store, so every other instance is dead.
    alive = (
        "SELECT name FROM instance WHERE 1 = 0"
        if db.dialect.kind is DatabaseKind.SQLITE
        else f"SELECT name FROM instance WHERE lease_until > {db.dialect.now_us}"
    )
    with db.transaction():
        closed: int = db.execute(
            f"UPDATE reconciliation SET state = 'FAILED', finished_at = {db.dialect.now_us},"
            f" error = '{ABANDONED}' WHERE state = 'RUNNING' AND instance NOT IN ({alive})"
        ).rowcount
    return closed


def own_reports(dialect: SqlDialect) -> str:
    """Return an SQL condition for reports of this service. Parameter: the instance.

    In a SQLite store every report counts as the service's own, even under another instance name.
    """
    return "? IS NOT NULL" if dialect.kind is DatabaseKind.SQLITE else "instance = ?"


def count_unfinished_starts(db: Database, owner: Owner, since: datetime) -> int:
    """Return how many starts in a row just before this start did not complete a recovery."""
    rows = db.fetch_all(
        f"SELECT epoch, state FROM reconciliation WHERE {own_reports(db.dialect)}"
        " AND NOT (instance = ? AND epoch = ?) AND started_at >= ?"
        " AND cause = 'STARTUP' AND COALESCE(error, '') <> ? ORDER BY id DESC LIMIT 1000",
        (owner.instance, owner.instance, owner.epoch, to_us(since), INTERRUPTED),
    )
    unfinished = takewhile(lambda row: row[1] != ReconciliationState.COMPLETED, rows)
    return len({epoch for epoch, _ in unfinished})


def write_report(db: Database, key: int, report: Reconciliation) -> None:
    """Write the current state of a report. Runs in the caller's transaction if there is one.

    Raises:
        StorageBusy: another instance has closed the report, because this instance seemed dead.
            Record no further decisions under this report.
    """
    with db.transaction():
        written = db.execute(
            "UPDATE reconciliation SET state = ?, finished_at = ?, phases = ?, decisions = ?,"
            " orphans = ?, bindings = ?, warnings = ?, quarantined = ?, runs_scanned = ?,"
            " runs_total = ?, runs_unchanged = ?, containment = ?, error = ?, trust_removals = ?"
            " WHERE id = ? AND state = 'RUNNING'",
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
                _containment_to_json(report.containment),
                report.error,
                _removals_to_json(report.trust_removals[:TRUST_REMOVALS_LIMIT]),
                key,
            ),
        ).rowcount
        if written != 1:
            raise StorageBusy


def _counts(counts: OrphanCounts | BindingCounts) -> dict[str, JsonValue]:
    return {name: getattr(counts, name) for name in counts.__dataclass_fields__}


def _containment_to_json(containment: Containment | None) -> str | None:
    return None if containment is None else to_json([containment.level, containment.detail])


def _removals_to_json(removals: tuple[TrustRemoval, ...]) -> str:
    return to_json([[one.run_id, one.file, one.folder, one.outcome] for one in removals])


def _removals_from_json(text: str) -> tuple[TrustRemoval, ...]:
    return tuple(
        TrustRemoval(run_id=run_id, file=file, folder=folder, outcome=outcome)
        for run_id, file, folder, outcome in json.loads(text)
    )


_REPORT_COLUMNS: Final = (
    _C.id, _C.reconciliation_id, _C.instance, _C.epoch, _C.cause, _C.state, _C.started_at,
    _C.finished_at, _C.phases, _C.decisions, _C.orphans, _C.bindings, _C.warnings, _C.quarantined,
    _C.runs_scanned, _C.runs_total, _C.runs_unchanged, _C.safe_mode, _C.containment,
    _C.error, _C.trust_removals, _C.recovered_instance,
)  # fmt: skip


def get_report(db: Database, reconciliation_id: str) -> Reconciliation:
    """Return the report with this id.

    Raises:
        ReconciliationNotFound: there is no such report.
    """
    query = _C.select(*_REPORT_COLUMNS).where(_C.reconciliation_id == reconciliation_id)
    row = db.peewee.execute(query).fetchone()
    if row is None:
        raise ReconciliationNotFound(reconciliation_id)
    return _report_from_row(row)


def report_page(db: Database, *, after: tuple[int, ...] | None, limit: int) -> Page[Reconciliation]:
    """Return a page of reports, newest first."""
    query = _C.select(*_REPORT_COLUMNS)
    if after is not None:
        query = query.where(_C.id < after[0])
    return use_case.page_of(
        db.peewee.execute(query.order_by(_C.id.desc()).limit(limit + 1)),
        limit,
        decode=_report_from_row,
        key=lambda row: (row[0],),
    )


def _report_from_row(row: Row) -> Reconciliation:
    (
        _, reconciliation_id, instance, epoch, cause, state, started_at, finished_at,
        phases, decisions, orphans, bindings, warnings, quarantined,
        scanned, total, unchanged, safe_mode, containment, error, removals, recovered_instance,
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
        containment=None if containment is None else _containment_from_json(containment),
        error=error,
        trust_removals=() if removals is None else _removals_from_json(removals),
        recovered_instance=recovered_instance,
    )


def _containment_from_json(text: str) -> Containment:
    level, detail = json.loads(text)
    return Containment(level=ContainmentLevel(level), detail=detail)
