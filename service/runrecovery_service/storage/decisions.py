"""The decisions of recoveries: the history of a run, and the runs that were recovered."""

from __future__ import annotations

from typing import Final

from runrecovery_service.domain.explanation import LaunchOrphans, RecordedDecision
from runrecovery_service.domain.reconciliation import (
    RecoveredFilter,
)
from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.run import (
    Page,
    Profile,
    RecoveryInfo,
    Run,
    View,
)
from runrecovery_service.storage import runs, tables
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.label_filter import filter_by_labels
from runrecovery_service.storage.launch_records import orphans_from_json
from runrecovery_service.storage.recovery_apply import Batch
from runrecovery_service.storage.rows import (
    RECOVERY_COLUMNS,
    enum_from_text,
    finding_from,
    from_us_or_none,
    recovery_from_row,
    run_from_row,
    to_us,
)

_C, _E, _R = tables.Reconciliation, tables.RecoveryEvent, tables.Run

HISTORY_LIMIT: Final = 1000


def history(db: Database, run_id: str) -> tuple[RecoveryInfo, ...]:
    """Return the latest decisions for one run, at most `HISTORY_LIMIT`, newest first.

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


def explain(db: Database, run_id: str, *, limit: int) -> tuple[RecordedDecision, ...]:
    """Return the latest decisions for one run with the facts of each, newest first.

    Raises:
        RunNotFound: there is no such run.
    """
    run = runs.get(db, run_id)
    query = (
        _E.select(
            *RECOVERY_COLUMNS, _E.facts, _E.profile, _E.attempt, _E.interaction,
            _E.session_turn, _E.session_verdict, _E.session_reason, _E.resumes, _E.reconciliation,
        )
        .join(_C, on=(_C.id == _E.reconciliation))
        .where(_E.run == run.key)
        .order_by(_E.no.desc())
        .limit(limit + 1)
    )  # fmt: skip
    rows = db.peewee.execute(query).fetchall()
    canceled = db.fetch_one("SELECT cancel_requested_at FROM run WHERE id = ?", (run.key,))
    launches = _launch_orphans(db, run)
    found = []
    for row, earlier in zip(rows, [*rows[1:], None], strict=False):  # empty without rows
        *columns, facts, profile, attempt, question, turn, verdict, reason, resumes, report = row
        info = recovery_from_row(tuple(columns))
        if info is None:
            continue
        since = earlier[-1] if earlier is not None else 0
        found.append(
            RecordedDecision(
                info=info,
                facts=Fact(facts),
                profile=enum_from_text(Profile, profile),
                attempt=attempt or 0,
                interaction_id=question,
                session_turn=turn,
                session_finding=finding_from(verdict, reason),
                restart_policy=run.restart_policy,
                max_attempts=run.max_attempts,
                resumes=resumes or 0,
                max_resumes=run.max_resumes,
                canceled_at=from_us_or_none(canceled[0]) if canceled else None,
                # Includes kills by earlier recoveries that were interrupted before they decided.
                launches=tuple(launch for by, launch in launches if since < by <= report),
            )
        )
    return tuple(found[:limit])


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
    query, _ = filter_by_labels(db, runs.select(view), wanted.labels, by_run=False)
    query = query.where(_R.recovered_at.is_null(is_null=False))
    if wanted.states:
        query = query.where(_R.recovery_state.in_([state.value for state in wanted.states]))
    if wanted.reason is not None:
        query = query.where(_R.recovery_reason == wanted.reason)
    if wanted.engine is not None:
        query = query.where(_R.engine == wanted.engine)
    if wanted.engines is not None:
        query = query.where(_R.engine.in_(sorted(wanted.engines)))
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
    # One restart gives many runs the same time, so the position is the time and the run's key.
    # There are two queries, because each can start at its position in an index. One query with OR
    # would read every run of that time.
    rest_of_that_time = query.where(_R.recovered_at == at, _R.id < key)
    return runs.page_of(
        db, [rest_of_that_time, query.where(_R.recovered_at < at)], limit, _recovered_key
    )


def _recovered_key(row: Row) -> tuple[int, ...]:
    run = run_from_row(row)
    if run.recovery is None:  # its report was removed, but the row still needs a position
        return (0, run.key)
    return (to_us(run.recovery.recovered_at), run.key)


def decisions_of_batch(
    db: Database, reconciliation_key: int, batch: Batch, *, limit: int
) -> list[tuple[str, str, str, str]]:
    """Return (run_id, rule, status before, status after) of a batch's decisions, for the log."""
    if limit <= 0:
        return []
    return db.fetch_all(
        "SELECT r.run_id, e.rule, e.status_before, e.status_after"
        " FROM recovery_event e JOIN run r ON r.id = e.run AND r.recovery_count = e.no"
        " WHERE e.reconciliation = ? AND e.run BETWEEN ? AND ? ORDER BY e.run LIMIT ?",
        (reconciliation_key, batch.first, batch.last, limit),
    )
