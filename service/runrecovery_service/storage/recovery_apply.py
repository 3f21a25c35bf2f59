"""Applies the decisions of a recovery to runs in batches. Each batch is one transaction.

A batch is a range of keys. Its transaction appends the decisions to the history, changes the runs
as decided, closes their questions, and updates the report. Every statement selects only runs of the
owner whose epoch is below that of the recovery. A decided run has the new epoch, so a repetition
decides nothing twice. If the database refuses a batch, the batch is split until the offending row
is alone. The run of this row is quarantined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Final

from runrecovery_service.domain.recovery_matrix import (
    MATRIX,
    QUARANTINE_RULE,
    QUEUED_FOR_HOST_RULE,
    REOPENABLE,
    RESUMED_RULE,
)
from runrecovery_service.domain.run import Profile, RecoveryState, RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import found_ends, interruptions, passed_deadlines, webhook_outbox
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS, to_domain_error
from runrecovery_service.storage.recovery_scope import ApplyScope, RecoveryScope
from runrecovery_service.storage.recovery_sql import IN_RANGE, damage_sql, decisions_sql, is_one_of
from runrecovery_service.storage.reports import own_reports
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind, SqlDialect
from runrecovery_service.storage.tables import LIVE, live, sql_words

DAMAGED_NAMED: Final = 100
"""The most quarantined runs that a report names. The table `quarantine` has all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The counts of one batch, or of all batches so far.

    Attributes:
        damaged: the run_id and the damage of at most `DAMAGED_NAMED` quarantined runs.
    """

    scanned: int = 0
    unchanged: int = 0
    quarantined: int = 0
    sessions: int = 0
    questions: int = 0
    slots: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    damaged: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Tally) -> Tally:
        names = self.decisions.keys() | other.decisions.keys()
        return Tally(
            scanned=self.scanned + other.scanned,
            unchanged=self.unchanged + other.unchanged,
            quarantined=self.quarantined + other.quarantined,
            sessions=self.sessions + other.sessions,
            questions=self.questions + other.questions,
            slots=self.slots + other.slots,
            decisions={
                name: self.decisions.get(name, 0) + other.decisions.get(name, 0) for name in names
            },
            damaged=(self.damaged + other.damaged)[:DAMAGED_NAMED],
        )


WriteProgress = Callable[[Database, Tally], None]
"""Writes the counts into the report, as part of the batch's transaction."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A range of run keys, both ends included, and the number of live runs in it."""

    first: int
    last: int
    rows: int


def count_runs(db: Database, scope: RecoveryScope) -> int:
    """Return the number of runs in scope."""
    row = db.fetch_one(
        f"SELECT count(*) FROM run WHERE {LIVE} AND owner = ? AND owner_epoch < ?", scope.params
    )
    return row[0] if row else 0


def next_batch(db: Database, scope: RecoveryScope, *, after: int, rows: int) -> Batch | None:
    """Return the range of the next `rows` runs whose key is above `after`; None: no more runs."""
    row = db.fetch_one(
        "SELECT min(id), max(id), count(*) FROM (SELECT id FROM run"
        f" WHERE {LIVE} AND owner = ? AND owner_epoch < ? AND id > ? ORDER BY id LIMIT ?) AS b",
        (*scope.params, after, rows),
    )
    return Batch(*row) if row and row[2] else None


_KEEPING: Final = frozenset((*(rule.name for rule in MATRIX if rule.keeps), QUARANTINE_RULE))
_ENDS: Final = is_one_of("e.status_after", tuple(s.value for s in RunStatus if s.is_terminal))
_KEEPS: Final = is_one_of("e.rule", _KEEPING)
_REOPENABLE: Final = is_one_of("e.rule", REOPENABLE)
_UNTOUCHED: Final = (RecoveryState.RECOVERED_WAITING.value, RecoveryState.QUARANTINED.value)

# A run that keeps waiting, or is quarantined, keeps its version, because its own state has not
# changed. The service must accept a reply with an etag from before the restart.
_KEPT: Final = f"{is_one_of('e.recovery_state', _UNTOUCHED)} AND e.status_before = e.status_after"
_APPLIED: Final = {
    "event_count": "e.sequence",
    "wait_due_us": f"CASE WHEN e.status_after = '{RunStatus.WAITING_USER}'"
    " THEN run.wait_due_us END",
    **{
        name: f"CASE WHEN {_ENDS} THEN NULL ELSE run.{name} END"
        for name in ("run_due_us", "resume_due_us", "resume_at")
    },
    "status": "e.status_after",
    "error_code": "COALESCE(e.error_code, run.error_code)",
    "session_type": f"CASE WHEN {_KEEPS} THEN run.session_type END",
    "session_value": f"CASE WHEN {_KEEPS} THEN run.session_value END",
    "ended_at": f"CASE WHEN {_ENDS} THEN e.recovered_at ELSE run.ended_at END",
    "updated_at": f"CASE WHEN {_KEPT} THEN run.updated_at ELSE e.recovered_at END",
    "version": f"run.version + CASE WHEN {_KEPT} THEN 0 ELSE 1 END",
    "recovered_version": f"run.version + CASE WHEN {_KEPT} THEN 0 ELSE 1 END",
    "recovery_state": "e.recovery_state",
    "recovered_at": "e.recovered_at",
    "recovery_reason": "e.rule",
    "recovery_count": "e.no",
    "reconciliation": "e.reconciliation",
}
# The session of a run that can be reopened, and until when. Parameters: `scope.reopen`.
_RETIRED: Final = {
    name: f"CASE WHEN {_REOPENABLE} THEN {value} ELSE run.{name} END"
    for name, value in {
        "retired_type": "run.session_type",
        "retired_value": "run.session_value",
        "reopenable_until": "?",
        "reopen_due_us": "?",
        "due_clock": "?",
    }.items()
}
_STAYING: Final = sql_words(tuple(rule.name for rule in MATRIX if rule.stays))
_EVENT: Final = (
    "FROM recovery_event e WHERE e.run = run.id AND e.no = run.recovery_count + 1"
    " AND e.reconciliation = ?"
)

# The new decisions `e` of a batch, read by the primary key: `+` keeps SQLite from the index of the
# feed, which lacks the columns. Parameters: `_new_params`.
_NEW: Final = "e.run BETWEEN ? AND ? AND +e.reconciliation = ?"


def _new_params(scope: ApplyScope, batch: Batch) -> tuple[int, int, int]:
    return batch.first, batch.last, scope.reconciliation_key


def _new_owner(scope: ApplyScope, rule: str) -> tuple[dict[str, str], tuple[object, ...]]:
    """Return SQL expressions for a decided run's owner and epoch, with their parameters.

    Args:
        rule: the column with the name of the decisive rule.
    """
    to, dead = scope.owner, scope.taken_from
    if dead is None:
        return {"owner_epoch": "?"}, (to.epoch,)
    which = f"CASE WHEN {rule} IN ({_STAYING}) THEN ? ELSE ? END"
    values = (dead.epoch, to.epoch, dead.instance, to.instance)
    return {"owner_epoch": which, "owner": which}, values


def _apply_sql(
    dialect: SqlDialect, batch: Batch, columns: dict[str, str], *, all_decided: bool
) -> str:
    """Return the UPDATE that changes a batch's runs as their newest decision says.

    Parameters: those of `columns`, then report, first and last key, instance, epoch. Without
    `all_decided`, the report follows once more. A run whose earlier decision still holds has no new
    decision. A subquery reads the decision of each row, because a join would first copy every new
    row.
    """
    # In SQLite a `+` makes the planner ignore the index of live runs. The index is faster only if
    # few runs of the range are live.
    dense = batch.rows * 4 >= batch.last - batch.first + 1
    column = "+run." if dense and dialect.kind is DatabaseKind.SQLITE else "run."
    return (
        f"UPDATE run SET ({', '.join(columns)}) = (SELECT {', '.join(columns.values())} {_EVENT})"
        f" WHERE run.id BETWEEN ? AND ? AND {live(column)} AND run.owner = ?"
        " AND run.owner_epoch < ?" + ("" if all_decided else f" AND EXISTS (SELECT 1 {_EVENT})")
    )


def apply_batch(
    db: Database,
    scope: ApplyScope,
    batch: Batch,
    *,
    report: WriteProgress,
    on_commit: Callable[[Tally], object] = lambda _: None,
) -> Tally:
    """Decide on every run of the batch, apply the decisions, and return the counts.

    A batch that is split has several transactions. If one fails, the earlier ones stay committed.

    Args:
        report: writes the counts of a transaction into the report, in the same transaction.
        on_commit: called with the counts of each transaction after its commit.

    Raises:
        Exception: the driver's error, if no single row is its cause. The failed transaction has
            changed nothing, and a retry is safe.
    """
    try:
        with db.transaction():
            tally = _apply_range(db, scope, batch)
            report(db, tally)
    except DRIVER_ERRORS as error:
        if to_domain_error(error) is not None:
            raise
        return _isolate(db, scope, batch, error, report=report, on_commit=on_commit)
    on_commit(tally)
    return tally


def _isolate(
    db: Database,
    scope: ApplyScope,
    batch: Batch,
    error: Exception,
    *,
    report: WriteProgress,
    on_commit: Callable[[Tally], object],
) -> Tally:
    """Split a batch that the database refuses; if it has only one row, quarantine the run."""
    if batch.rows <= 1:
        with db.transaction():
            tally = _quarantine(db, scope, batch, type(error).__name__)
            report(db, tally)
        on_commit(tally)
        return tally
    tally = Tally()
    half = (batch.rows + 1) // 2
    part = next_batch(db, scope, after=batch.first - 1, rows=half)
    while part is not None and part.first <= batch.last:
        part = _clip(db, scope, part, batch.last)
        tally += apply_batch(db, scope, part, report=report, on_commit=on_commit)
        part = next_batch(db, scope, after=part.last, rows=half)
    return tally


def _clip(db: Database, scope: ApplyScope, part: Batch, last: int) -> Batch:
    if part.last <= last:
        return part
    row = db.fetch_one(
        f"SELECT count(*) FROM run r WHERE {IN_RANGE}",
        (part.first, last, *scope.params),
    )
    return Batch(part.first, last, row[0] if row else 0)


def _apply_range(db: Database, scope: ApplyScope, batch: Batch) -> Tally:
    bounds = (batch.first, batch.last, *scope.params)
    _lock_rows(db, bounds)
    _record_decisions(db, scope, batch, bounds)
    decided = _count_decisions(db, scope, batch)
    quarantined = decided.decisions.get(QUARANTINE_RULE, 0)
    damaged = _record_damaged(db, scope, bounds) if quarantined else ()
    questions = _close_questions(db, scope, batch)
    if {RESUMED_RULE, QUEUED_FOR_HOST_RULE} & decided.decisions.keys():
        interruptions.record_batch(db, scope, first=batch.first, last=batch.last)
    if found_ends.RULES & decided.decisions.keys():
        found_ends.record_batch(db, scope, first=batch.first, last=batch.last)
    if any(batch.first <= key <= batch.last for key in scope.counted):
        found_ends.record_counted(db, scope, first=batch.first, last=batch.last)
    changed = sum(decided.decisions.values())
    all_decided = changed == batch.rows
    report = (scope.reconciliation_key,)
    columns, values = _new_owner(scope, "e.rule")
    if REOPENABLE & decided.decisions.keys():
        reopen = scope.reopen
        columns, values = columns | _RETIRED, (*values, to_us(reopen.at), reopen.us, reopen.clock)
    db.execute(
        _apply_sql(db.dialect, batch, _APPLIED | columns, all_decided=all_decided),
        (*values, *report, *bounds, *(() if all_decided else report)),
    )
    _record_killed_processes(db, scope, batch)
    unchanged = 0 if all_decided else _adopt_unchanged(db, scope, bounds)
    if scope.taken_from is not None:
        # In this transaction, because from its commit on this service applies the runs' deadlines.
        passed_deadlines.move_range(
            db,
            scope.owner,
            first=batch.first,
            last=batch.last,
            now=scope.now,
            steady=scope.steady,
        )
    return Tally(
        scanned=changed + unchanged,
        unchanged=unchanged,
        quarantined=quarantined,
        sessions=decided.sessions,
        slots=decided.slots,
        questions=questions,
        decisions=decided.decisions,
        damaged=damaged,
    )


def _record_decisions(
    db: Database, scope: ApplyScope, batch: Batch, bounds: tuple[int, int, str, int]
) -> None:
    """Decide on the runs of the batch, and record the decisions with their webhook deliveries."""
    found = {key: end for key, end in scope.found.items() if batch.first <= key <= batch.last}
    db.execute(
        "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
        " status_after, error_code, recovery_state, recovered_at, processes_ended, sequence,"
        " profile, attempt, interaction, session_turn, session_verdict, session_reason, resumes)"
        " SELECT d.id,"
        f" d.recovery_no, {scope.reconciliation_key}, d.rule, d.facts, d.status, d.becomes,"
        f" d.error_code, d.recovery_state, {to_us(scope.now)}, 0, d.sequence, d.profile, d.attempt,"
        " d.interaction, d.session_turn, d.session_verdict, d.session_reason, d.resumes"
        f" FROM ({decisions_sql(db.dialect, found, scope.elsewhere)}) AS d"
        " WHERE d.stands = 0",
        (batch.first, batch.last, *bounds),
    )
    webhook_outbox.record_decisions(
        db,
        scope.owner.instance,
        which=f"{IN_RANGE} AND e.reconciliation = ? AND e.no = r.recovery_count + 1",
        params=(*bounds, scope.reconciliation_key),
    )


def _lock_rows(db: Database, bounds: tuple[int, int, str, int]) -> None:
    """Lock the batch's rows, so that a living earlier epoch cannot change them before the commit.

    The lock is a separate statement, so that the next statement reads everything committed before
    it. SQLite needs no lock, because a transaction excludes every other writer.
    """
    if db.dialect.kind is DatabaseKind.POSTGRESQL:
        db.execute(
            "SELECT count(*) FROM"
            f" (SELECT r.id FROM run r WHERE {IN_RANGE} ORDER BY r.id FOR UPDATE) AS held",
            bounds,
        )


def _adopt_unchanged(db: Database, scope: ApplyScope, bounds: tuple[int, int, str, int]) -> int:
    """Move runs whose earlier decision still holds to the new owner, and return their number.

    The key of the report excludes runs that this recovery has just decided: at a planned stop,
    their epoch is also below the bound.
    """
    owned_by, values = _new_owner(scope, "recovery_reason")
    adopted: int = db.execute(
        f"UPDATE run SET {', '.join(f'{name} = {value}' for name, value in owned_by.items())}"
        f" WHERE id BETWEEN ? AND ? AND {LIVE}"
        " AND owner = ? AND owner_epoch < ? AND COALESCE(reconciliation, 0) <> ?",
        (*values, *bounds, scope.reconciliation_key),
    ).rowcount
    return adopted


def _record_damaged(
    db: Database, scope: ApplyScope, bounds: tuple[int, int, str, int]
) -> tuple[tuple[str, str], ...]:
    rows = db.fetch_all(
        f"SELECT r.id, r.run_id, {damage_sql(db.dialect)} FROM run r WHERE {IN_RANGE}"
        f" AND ({damage_sql(db.dialect)}) IS NOT NULL",
        bounds,
    )
    for key, _, damage in rows:
        _add_quarantine(db, scope, key, damage, "")
    return tuple((run_id, damage) for _, run_id, damage in rows)


def _add_quarantine(db: Database, scope: ApplyScope, key: int, reason: str, detail: str) -> None:
    db.execute(
        "INSERT INTO quarantine (run, reconciliation, reason, detail, quarantined_at)"
        " VALUES (?, ?, ?, ?, ?)",
        (key, scope.reconciliation_key, reason, detail, to_us(scope.now)),
    )


def _count_decisions(db: Database, scope: ApplyScope, batch: Batch) -> Tally:
    """Count the new decisions, while the runs still have their session."""
    rows = db.fetch_all(
        "SELECT e.rule, count(*), sum(CASE WHEN r.session_value <> '' THEN 1 ELSE 0 END),"
        f" sum(CASE WHEN e.status_before = '{RunStatus.RUNNING}' OR (e.status_before ="
        f" '{RunStatus.WAITING_USER}' AND e.profile = '{Profile.STICKY_PROCESS}')"
        " THEN 1 ELSE 0 END)"
        # CROSS: SQLite then reads both tables in the order of their keys.
        f" FROM recovery_event e CROSS JOIN run r WHERE r.id = e.run AND {_NEW} GROUP BY e.rule",
        _new_params(scope, batch),
    )
    return Tally(
        decisions={rule: count for rule, count, _, _ in rows},
        sessions=sum(int(sessions) for rule, _, sessions, _ in rows if rule not in _KEEPING),
        slots=sum(int(slots) for _, _, _, slots in rows),
    )


def _record_killed_processes(db: Database, scope: ApplyScope, batch: Batch) -> None:
    """Record how many processes of each run were killed since the last completed recovery.

    These include kills by earlier recoveries that did not complete.
    """
    rows = db.fetch_all(
        "SELECT run, sum(processes_ended) FROM process_lease"
        " WHERE run BETWEEN ? AND ? AND ended_by > (SELECT COALESCE(max(id), 0)"
        f" FROM reconciliation WHERE {own_reports(db.dialect)} AND state = 'COMPLETED')"
        " GROUP BY run",
        (batch.first, batch.last, scope.owner.instance),
    )
    for run_key, ended in rows:
        db.execute(
            "UPDATE recovery_event SET processes_ended = ? WHERE run = ? AND reconciliation = ?",
            (int(ended), run_key, scope.reconciliation_key),
        )


def _close_questions(db: Database, scope: ApplyScope, batch: Batch) -> int:
    """Close the questions of newly decided runs, unless the rule keeps the run's question."""
    closed: int = db.execute(
        "UPDATE interaction SET state = 'CLOSED'"
        " WHERE run BETWEEN ? AND ? AND state IN ('OPEN', 'ANSWERED')"
        # A list, not EXISTS: SQLite would search the whole batch for each question.
        f" AND run IN (SELECT e.run FROM recovery_event e WHERE {_NEW} AND NOT {_KEEPS})",
        (batch.first, batch.last, *_new_params(scope, batch)),
    ).rowcount
    return closed


def _quarantine(db: Database, scope: ApplyScope, batch: Batch, detail: str) -> Tally:
    """Quarantine the only run of a batch, which the database refuses to change."""
    _lock_rows(db, (batch.first, batch.last, *scope.params))
    row = db.fetch_one(
        "SELECT r.run_id, r.status, r.event_count + 1, (SELECT COALESCE(max(e.no), 0) + 1"
        f" FROM recovery_event e WHERE e.run = r.id) FROM run r WHERE {IN_RANGE}",
        (batch.first, batch.last, *scope.params),
    )
    if row is None:
        return Tally()
    run_id, status, sequence, number = row
    now = to_us(scope.now)
    _add_quarantine(db, scope, batch.first, "convergence_refused", detail[:500])
    db.execute(
        "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
        " status_after, recovery_state, recovered_at, sequence)"
        " VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?, ?)",
        (
            batch.first,
            number,
            scope.reconciliation_key,
            QUARANTINE_RULE,
            status,
            status,
            RecoveryState.QUARANTINED.value,
            now,
            sequence,
        ),
    )
    webhook_outbox.record_decisions(
        db,
        scope.owner.instance,
        which="e.run = ? AND e.no = ?",
        params=(batch.first, number),
    )
    db.execute(
        "UPDATE run SET event_count = ?, recovery_state = ?, recovered_at = ?,"
        " recovery_reason = ?, recovery_count = ?, recovered_version = version,"
        " reconciliation = ?, owner = ?, owner_epoch = ?"
        " WHERE id = ? AND owner = ? AND owner_epoch < ?",
        (
            sequence,
            RecoveryState.QUARANTINED.value,
            now,
            QUARANTINE_RULE,
            number,
            scope.reconciliation_key,
            scope.owner.instance,
            scope.owner.epoch,
            batch.first,
            *scope.params,
        ),
    )
    return Tally(
        scanned=1,
        quarantined=1,
        decisions={QUARANTINE_RULE: 1},
        damaged=((run_id, "convergence_refused"),),
    )
