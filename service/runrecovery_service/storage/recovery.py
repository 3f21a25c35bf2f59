"""What restarts decided: history, recovered runs, reports."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import takewhile
from typing import Final

from runrecovery_service.domain.errors import ReconciliationNotFound, StorageBusy
from runrecovery_service.domain.explanation import LaunchOrphans, RecordedDecision
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
    TrustRemoval,
)
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE, Fact
from runrecovery_service.domain.run import (
    JsonValue,
    Page,
    Profile,
    RecoveryInfo,
    RecoveryState,
    Run,
    View,
)
from runrecovery_service.storage import runs, tables, use_case
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.processes import orphans_from_json
from runrecovery_service.storage.rows import (
    RECOVERY_COLUMNS,
    finding_from,
    from_us,
    from_us_or_none,
    recovery_from_row,
    run_from_row,
    to_json,
    to_us,
    word,
)
from runrecovery_service.storage.sql_dialects import DatabaseKind, SqlDialect

_C, _E, _R = tables.Reconciliation, tables.RecoveryEvent, tables.Run

INTERRUPTED: Final = "interrupted by a stop"
"""The error of a report whose service was told to stop: nothing was wrong with the recovery."""
ABANDONED: Final = "the service ended before it was complete"
"""The error of a report that its service did not live to complete."""
BEGIN_LOCK: Final = 0x5252_4356_0001
HISTORY_LIMIT: Final = 1000
WARNINGS_LIMIT: Final = 100
TRUST_REMOVALS_LIMIT: Final = 100

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


def explained(db: Database, run_id: str, *, limit: int) -> tuple[RecordedDecision, ...]:
    """Return the decisions for one run with what they saw, newest first.

    Raises:
        RunNotFound: there is no such run.
    """
    run = runs.get(db, run_id)
    query = (
        _E.select(
            *RECOVERY_COLUMNS, _E.facts, _E.profile, _E.attempt, _E.interaction,
            _E.session_turn, _E.session_verdict, _E.session_reason, _E.reconciliation,
        )
        .join(_C, on=(_C.id == _E.reconciliation))
        .where(_E.run == run.key)
        .order_by(_E.no.desc())
        .limit(limit + 1)
    )  # fmt: skip
    rows = db.peewee.execute(query).fetchall()
    canceled = db.fetch_one("SELECT cancel_requested_at FROM run WHERE id = ?", (run.key,))
    launches = _launch_orphans(db, run)
    told = []
    for row, earlier in zip(rows, [*rows[1:], None], strict=False):  # of no rows: none
        *columns, facts, profile, attempt, question, turn, verdict, reason, report = row
        info = recovery_from_row(tuple(columns))
        if info is None:
            continue
        since = earlier[-1] if earlier is not None else 0
        told.append(
            RecordedDecision(
                info=info,
                facts=Fact(facts),
                profile=word(Profile, profile),
                attempt=attempt or 0,
                interaction_id=question,
                session_turn=turn,
                session_finding=finding_from(verdict, reason),
                restart_policy=run.restart_policy,
                max_attempts=run.max_attempts,
                canceled_at=from_us_or_none(canceled[0]) if canceled else None,
                # Also what a recovery before it ended that was cut off before it could decide.
                launches=tuple(found for by, found in launches if since < by <= report),
            )
        )
    return tuple(told[:limit])


def _launch_orphans(db: Database, run: Run) -> list[tuple[int, LaunchOrphans]]:
    rows = db.fetch_all(
        "SELECT ended_by, attempt, turn, orphans FROM process_lease"
        " WHERE run = ? AND ended_by IS NOT NULL AND orphans IS NOT NULL ORDER BY id",
        (run.key,),
    )
    return [
        (
            ended_by,
            LaunchOrphans(attempt=attempt, turn=turn, orphans=orphans_from_json(orphans)),
        )
        for ended_by, attempt, turn, orphans in rows
    ]


def recovered_page(
    db: Database,
    wanted: RecoveredFilter,
    *,
    after: tuple[int, ...] | None,
    limit: int,
    view: View = View.FULL,
) -> Page[Run]:
    """Return a page of recovered runs, newest decision first."""
    query, _ = runs.labelled(db, runs.select(view), wanted.labels, by_run=False)
    query = query.where(_R.recovered_at.is_null(is_null=False))
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


def _recovered_key(row: Row) -> tuple[int, ...]:
    run = run_from_row(row)
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
        if db.dialect.kind is DatabaseKind.POSTGRESQL:
            # One after the other, so that reports become visible in the order of their keys: who
            # follows the decisions by it would otherwise pass one by that is not there yet.
            db.execute("SELECT pg_advisory_xact_lock(?)", (BEGIN_LOCK,))
        close_abandoned(db)
        db.execute(
            f"UPDATE reconciliation SET state = 'FAILED', finished_at = ?, error = '{ABANDONED}'"
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


def close_abandoned(db: Database) -> int:
    """Close the reports that instances which are not alive have left RUNNING; return how many.

    From here on such an instance, should it wake up, commits no decision of it any more.
    """
    # A SQLite store is one service's at a time: whoever else has left one is gone.
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
    """Return the condition, with the instance as its parameter, for reports of this service. All
    of a SQLite store are, though the service may have had another name then."""
    return "? IS NOT NULL" if dialect.kind is DatabaseKind.SQLITE else "instance = ?"


def unfinished_since(db: Database, instance: str, since: datetime) -> int:
    """Return how many starts of the instance in a row, up to now, did not finish recovering."""
    rows = db.fetch_all(
        f"SELECT epoch, state FROM reconciliation WHERE {own_reports(db.dialect)}"
        " AND started_at >= ?"
        " AND cause = 'STARTUP' AND COALESCE(error, '') <> ? ORDER BY id DESC LIMIT 1000",
        (instance, to_us(since), INTERRUPTED),
    )
    unfinished = takewhile(lambda row: row[1] != ReconciliationState.COMPLETED, rows)
    return len({epoch for epoch, _ in unfinished})


def write_report(db: Database, key: int, report: Reconciliation) -> None:
    """Write the report as it is now, in the caller's transaction if there is one.

    Raises:
        StorageBusy: somebody has closed it, since this instance was not alive for a while; nothing
            may be decided under it any more.
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
                _contained(report.containment),
                report.error,
                _removed(report.trust_removals[:TRUST_REMOVALS_LIMIT]),
                key,
            ),
        ).rowcount
        if written != 1:
            raise StorageBusy


def _counts(counts: OrphanCounts | BindingCounts) -> dict[str, JsonValue]:
    return {name: getattr(counts, name) for name in counts.__dataclass_fields__}


def _contained(containment: Containment | None) -> str | None:
    return None if containment is None else to_json([containment.level, containment.detail])


def _removed(removals: tuple[TrustRemoval, ...]) -> str:
    return to_json([[one.run_id, one.file, one.folder, one.outcome] for one in removals])


def _removals(text: str) -> tuple[TrustRemoval, ...]:
    return tuple(
        TrustRemoval(run_id=run_id, file=file, folder=folder, outcome=outcome)
        for run_id, file, folder, outcome in json.loads(text)
    )


_REPORT_COLUMNS: Final = (
    _C.id, _C.reconciliation_id, _C.instance, _C.epoch, _C.cause, _C.state, _C.started_at,
    _C.finished_at, _C.phases, _C.decisions, _C.orphans, _C.bindings, _C.warnings, _C.quarantined,
    _C.runs_scanned, _C.runs_total, _C.runs_unchanged, _C.safe_mode, _C.containment,
    _C.error, _C.trust_removals,
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
    """Return a page of reports, newest first: `limit`, fewer when they are large."""
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
        scanned, total, unchanged, safe_mode, containment, error, removals,
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
        trust_removals=() if removals is None else _removals(removals),
    )


def _containment(text: str) -> Containment:
    level, detail = json.loads(text)
    return Containment(level=ContainmentLevel(level), detail=detail)
