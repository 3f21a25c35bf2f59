"""Converges runs in sets: the matrix as SQL, in batches that are one transaction each.

A batch is a range of keys. Within its transaction the decisions are computed and appended to the
history, the runs are changed from that history, their questions are closed, and the report is
written. Every statement names the owner and an epoch below ours, so that repeating one, or dying
anywhere, changes nothing. A batch that fails is split until the row that spoils it is alone;
that one is quarantined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from runrecovery_service.domain.deadline import Due
from runrecovery_service.domain.plan import Situation
from runrecovery_service.domain.recovery_matrix import (
    MATRIX,
    QUARANTINE_RULE,
    REOPENABLE,
    Fact,
    Rule,
)
from runrecovery_service.domain.run import (
    InteractionKind,
    InteractionState,
    Profile,
    RecoveryState,
    RestartPolicy,
    RunStatus,
)
from runrecovery_service.domain.session_check import (
    LOST,
    SessionFinding,
    SessionFingerprint,
    SessionVerdict,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS, to_domain_error
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery import own_reports
from runrecovery_service.storage.rows import finding_from, to_us, word
from runrecovery_service.storage.sql_dialects import DatabaseKind, SqlDialect
from runrecovery_service.storage.tables import LIVE, live, sql_words


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Which runs a restart decides on: those of `owner`, of epochs below `before`: its own at a
    start; the next one at a planned stop, and in a plan, which decide what the next start would."""

    owner: Owner
    before: int

    @property
    def whose(self) -> tuple[str, int]:
        """The parameters of `owner = ? AND owner_epoch < ?`."""
        return self.owner.instance, self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope(Reach):
    """Which rows a reconciliation may touch, and what it writes into them. `reopen`: until when
    runs that fail for want of their session can be set back."""

    reconciliation_key: int
    reopen: Due
    now: datetime


DAMAGED_NAMED: Final = 100
"""Quarantined runs that a report names; the table `quarantine` has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a batch, or all of them so far, came to."""

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


Report = Callable[[Database, Tally], None]
"""Writes the progress of a recovery, in the transaction that made it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A range of keys, both ends included, and how many live rows lie in it."""

    first: int
    last: int
    rows: int


def total(db: Database, scope: Scope) -> int:
    """Return how many runs there are to examine."""
    row = db.fetch_one(
        f"SELECT count(*) FROM run WHERE {LIVE} AND owner = ? AND owner_epoch < ?", scope.whose
    )
    return row[0] if row else 0


def next_batch(db: Database, scope: Scope, *, after: int, rows: int) -> Batch | None:
    """Return the next range of at most `rows` live rows behind key `after`; None at the end."""
    row = db.fetch_one(
        "SELECT min(id), max(id), count(*) FROM (SELECT id FROM run"
        f" WHERE {LIVE} AND owner = ? AND owner_epoch < ? AND id > ? ORDER BY id LIMIT ?) AS b",
        (*scope.whose, after, rows),
    )
    return Batch(*row) if row and row[2] else None


# -- the matrix as SQL -------------------------------------------------------------------------


def fact_conditions(dialect: SqlDialect) -> dict[Fact, str]:
    """Return, per fact, the condition on a run `r` and its latest question `i`."""
    kinds = sql_words(tuple(kind.value for kind in InteractionKind))
    return {
        Fact.PENDING: f"i.state = '{InteractionState.OPEN}' AND i.kind IN ({kinds})"
        f" AND {dialect.is_json('i.options')}",
        Fact.HANDLE: "r.session_value <> '' AND r.session_type <> ''"
        f" AND COALESCE(r.session_verdict, '{SessionVerdict.VALID}')"
        f" NOT IN ({sql_words(tuple(verdict.value for verdict in LOST))})",
        Fact.CANCEL: "r.cancel_requested_at IS NOT NULL",
        Fact.REPLY: f"i.state = '{InteractionState.ANSWERED}' AND {dialect.is_json('i.response')}",
        Fact.REQUEUE: f"r.restart_policy = '{RestartPolicy.REQUEUE}'"
        " AND r.attempt < r.max_attempts",
    }


def facts_sql(dialect: SqlDialect) -> str:
    """Return an expression for the facts of a run as the bits of `Fact`."""
    return " + ".join(
        f"CASE WHEN {condition} THEN {fact.value} ELSE 0 END"
        for fact, condition in fact_conditions(dialect).items()
    )


def damage_sql(dialect: SqlDialect) -> str:
    """Return an expression that names what cannot be read in a run's record, NULL if nothing."""
    json_columns = ("labels", "input", "output")
    unreadable = "".join(
        f" WHEN r.{column} IS NOT NULL AND NOT {dialect.is_json('r.' + column)}"
        f" THEN '{column}_unreadable'"
        for column in json_columns
    )
    return (
        f"CASE WHEN r.status NOT IN ({sql_words(tuple(s.value for s in RunStatus))})"
        " THEN 'status_unknown'"
        f" WHEN r.restart_policy NOT IN ({sql_words(tuple(p.value for p in RestartPolicy))})"
        " THEN 'restart_policy_unknown'"
        f"{unreadable} END"
    )


def condition_sql(rule: Rule) -> str:
    """Return `Rule.matches` as a condition on columns status, profile and facts."""
    terms = [f"status IN ({sql_words(tuple(s.value for s in rule.statuses))})"]
    if rule.profiles:
        terms.append(_profile_sql(rule.profiles))
    if rule.needs:
        terms.append(f"(facts & {rule.needs.value}) = {rule.needs.value}")
    if rule.lacks:
        terms.append(f"(facts & {rule.lacks.value}) = 0")
    return " AND ".join(terms)


def _profile_sql(profiles: tuple[Profile | None, ...]) -> str:
    known = sql_words(tuple(profile.value for profile in Profile))
    terms = [f"profile = '{p.value}'" for p in profiles if p is not None]
    if None in profiles:
        terms.append(f"profile IS NULL OR profile NOT IN ({known})")
    return f"({' OR '.join(terms)})"


def rule_sql() -> str:
    """Return the matrix as one CASE that gives the number of the rule, 0 for a damaged row."""
    rules = " ".join(
        f"WHEN {condition_sql(rule)} THEN {number}" for number, rule in enumerate(MATRIX, 1)
    )
    return f"CASE WHEN damage IS NOT NULL THEN 0 {rules} END"


def _matrix_values() -> str:
    rows = [f"(0, '{QUARANTINE_RULE}', NULL, NULL, '{RecoveryState.QUARANTINED}', 1)"]
    for number, rule in enumerate(MATRIX, 1):
        error = f"'{rule.error}'" if rule.error else "NULL"
        rows.append(
            f"({number}, '{rule.name}', '{rule.becomes}', {error}, '{rule.state}',"
            f" {int(rule.keeps)})"
        )
    return ", ".join(rows)


_RANGE: Final = f"r.id BETWEEN ? AND ? AND {live('r.')} AND r.owner = ? AND r.owner_epoch < ?"


def decisions_sql(dialect: SqlDialect) -> str:
    """Return the query that decides every run of a range.

    Parameters: first, last key, instance, epoch. Columns: id, recovery_no, status, rule, facts,
    becomes, error_code, recovery_state, damage, stands (1 when the run already bears this very
    decision and has not changed since), sequence; and what explains the decision: profile, attempt,
    interaction, session_turn, session_verdict, session_reason.
    """
    return (
        "WITH matrix (number, name, becomes, error_code, recovery_state, keeps) AS"
        f" (VALUES {_matrix_values()}),"
        " seen AS MATERIALIZED (SELECT r.id, r.status, r.profile, r.recovery_reason,"
        " r.recovered_version, r.version, r.recovery_count, r.event_count, r.attempt,"
        " r.interaction_count, r.session_turn, r.session_verdict, r.session_reason,"
        f" {facts_sql(dialect)} AS facts, {damage_sql(dialect)} AS damage"
        " FROM run r LEFT JOIN interaction i ON i.run = r.id AND i.no = r.interaction_count"
        f" WHERE {_RANGE}),"
        f" judged AS MATERIALIZED (SELECT seen.*, {rule_sql()} AS number FROM seen)"
        " SELECT j.id, j.recovery_count + 1 AS recovery_no, j.status, m.name AS rule, j.facts,"
        " COALESCE(m.becomes, j.status) AS becomes, m.error_code, m.recovery_state, j.damage,"
        " CASE WHEN j.recovery_reason = m.name AND j.recovered_version = j.version"
        " THEN 1 ELSE 0 END AS stands, j.event_count + 1 AS sequence, j.profile, j.attempt,"
        " j.interaction_count AS interaction, j.session_turn, j.session_verdict, j.session_reason"
        " FROM judged j JOIN matrix m ON m.number = j.number"
    )


_TERMINAL: Final = sql_words(tuple(s.value for s in RunStatus if s.is_terminal))
_KEEPING: Final = sql_words((*(r.name for r in MATRIX if r.keeps), QUARANTINE_RULE))
_REOPENABLE: Final = sql_words(REOPENABLE)
_UNTOUCHED: Final = sql_words(
    (RecoveryState.RECOVERED_WAITING.value, RecoveryState.QUARANTINED.value)
)

# A run that is kept waiting, or set aside, keeps its version: its own state is what it was, and a
# reply prepared before the restart (with that etag) must be accepted after it.
_APPLIED: Final = {
    "event_count": "e.sequence",
    "wait_due_us": f"CASE WHEN e.status_after = '{RunStatus.WAITING_USER}'"
    " THEN run.wait_due_us END",
    "run_due_us": f"CASE WHEN e.status_after NOT IN ({_TERMINAL}) THEN run.run_due_us END",
    "status": "e.status_after",
    "error_code": "COALESCE(e.error_code, run.error_code)",
    "session_type": f"CASE WHEN e.rule IN ({_KEEPING}) THEN run.session_type END",
    "session_value": f"CASE WHEN e.rule IN ({_KEEPING}) THEN run.session_value END",
    "ended_at": f"CASE WHEN e.status_after IN ({_TERMINAL}) THEN e.recovered_at"
    " ELSE run.ended_at END",
    "updated_at": f"CASE WHEN e.recovery_state IN ({_UNTOUCHED}) THEN run.updated_at"
    " ELSE e.recovered_at END",
    "version": f"run.version + CASE WHEN e.recovery_state IN ({_UNTOUCHED}) THEN 0 ELSE 1 END",
    "recovered_version": "run.version +"
    f" CASE WHEN e.recovery_state IN ({_UNTOUCHED}) THEN 0 ELSE 1 END",
    "recovery_state": "e.recovery_state",
    "recovered_at": "e.recovered_at",
    "recovery_reason": "e.rule",
    "recovery_count": "e.no",
    "reconciliation": "e.reconciliation",
    "owner_epoch": "?",
}
_EVENT: Final = (
    "FROM recovery_event e WHERE e.run = run.id AND e.no = run.recovery_count + 1"
    " AND e.reconciliation = ?"
)


def _apply_sql(dialect: SqlDialect, batch: Batch, *, all_decided: bool) -> str:
    """Return the change of a batch's runs into what their newest history says.

    Parameters: our epoch, report, first and last key, instance, epoch; and the report once more
    unless all were decided: a run whose earlier decision stands has no new event.

    Each row looks its event up: a join would copy every new row aside first.
    """
    # SQLite: with a `+`, conditions do not lead to the index of live rows, which pays only where
    # few rows of the range are live.
    dense = batch.rows * 4 >= batch.last - batch.first + 1
    column = "+run." if dense and dialect.kind is DatabaseKind.SQLITE else "run."
    return (
        f"UPDATE run SET ({', '.join(_APPLIED)}) = (SELECT {', '.join(_APPLIED.values())} {_EVENT})"
        f" WHERE run.id BETWEEN ? AND ? AND {live(column)} AND run.owner = ?"
        " AND run.owner_epoch < ?" + ("" if all_decided else f" AND EXISTS (SELECT 1 {_EVENT})")
    )


# -- doing it ----------------------------------------------------------------------------------


def converge(
    db: Database,
    scope: Scope,
    batch: Batch,
    *,
    report: Report,
) -> Tally:
    """Decide and change every run of the batch, each in one atomic step.

    Args:
        report: writes the progress; called in the transaction that it tells of.

    Raises:
        StorageBusy, StorageUnavailable, StorageFull: nothing of the transaction under way was
            done; trying again is safe.
    """
    try:
        with db.transaction():
            tally = _converge_range(db, scope, batch)
            report(db, tally)
    except DRIVER_ERRORS as error:
        if to_domain_error(error) is not None:
            raise
        return _isolate(db, scope, batch, error, report=report)
    return tally


def _isolate(
    db: Database,
    scope: Scope,
    batch: Batch,
    error: Exception,
    *,
    report: Report,
) -> Tally:
    """Split a batch that the database refuses; quarantine the row when it is alone."""
    if batch.rows <= 1:
        with db.transaction():
            tally = _quarantine(db, scope, batch, type(error).__name__)
            report(db, tally)
        return tally
    tally = Tally()
    half = (batch.rows + 1) // 2
    part = next_batch(db, scope, after=batch.first - 1, rows=half)
    while part is not None and part.first <= batch.last:
        part = _clip(db, scope, part, batch.last)
        tally += converge(db, scope, part, report=_on_top_of(tally, report))
        part = next_batch(db, scope, after=part.last, rows=half)
    return tally


def _on_top_of(earlier: Tally, report: Report) -> Report:
    return lambda db, tally: report(db, earlier + tally)


def _clip(db: Database, scope: Scope, part: Batch, last: int) -> Batch:
    if part.last <= last:
        return part
    row = db.fetch_one(
        f"SELECT count(*) FROM run r WHERE {_RANGE}",
        (part.first, last, *scope.whose),
    )
    return Batch(part.first, last, row[0] if row else 0)


def _converge_range(db: Database, scope: Scope, batch: Batch) -> Tally:
    owner, now = scope.owner, to_us(scope.now)
    reach = (batch.first, batch.last, *scope.whose)
    _hold(db, reach)
    db.execute(
        "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
        " status_after, error_code, recovery_state, recovered_at, processes_ended, sequence,"
        " profile, attempt, interaction, session_turn, session_verdict, session_reason)"
        " SELECT d.id,"
        f" d.recovery_no, {scope.reconciliation_key}, d.rule, d.facts, d.status, d.becomes,"
        f" d.error_code, d.recovery_state, {now}, 0, d.sequence, d.profile, d.attempt,"
        " d.interaction, d.session_turn, d.session_verdict, d.session_reason"
        f" FROM ({decisions_sql(db.dialect)}) AS d"
        " WHERE d.stands = 0",
        reach,
    )
    decided = _count_decisions(db, scope, reach)
    quarantined = decided.decisions.get(QUARANTINE_RULE, 0)
    damaged = _record_damaged(db, scope, reach) if quarantined else ()
    questions = _close_questions(db, scope, batch)
    if REOPENABLE & decided.decisions.keys():
        _retire_sessions(db, scope, batch)
    changed = sum(decided.decisions.values())
    all_decided = changed == batch.rows
    report = (scope.reconciliation_key,)
    db.execute(
        _apply_sql(db.dialect, batch, all_decided=all_decided),
        (owner.epoch, *report, *reach, *(() if all_decided else report)),
    )
    _count_processes(db, scope, batch)
    unchanged = 0 if all_decided else _adopt_unchanged(db, scope, reach)
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


def _hold(db: Database, reach: tuple[int, int, str, int]) -> None:
    """Keep an earlier epoch that is somehow still writing out of these rows until the commit.

    In a statement of its own: the next one then decides on what was committed before it. SQLite
    needs no such thing, its transaction excludes every other writer.
    """
    if db.dialect.kind is DatabaseKind.POSTGRESQL:
        db.execute(
            "SELECT count(*) FROM"
            f" (SELECT r.id FROM run r WHERE {_RANGE} ORDER BY r.id FOR UPDATE) AS held",
            reach,
        )


def _adopt_unchanged(db: Database, scope: Scope, reach: tuple[int, int, str, int]) -> int:
    """Bring runs whose earlier decision stands into this epoch, so that we may write them; and
    count them. At a stop those that were just decided are of an epoch below the bound as well."""
    adopted: int = db.execute(
        f"UPDATE run SET owner_epoch = ? WHERE id BETWEEN ? AND ? AND {LIVE}"
        " AND owner = ? AND owner_epoch < ? AND COALESCE(reconciliation, 0) <> ?",
        (scope.owner.epoch, *reach, scope.reconciliation_key),
    ).rowcount
    return adopted


def _record_damaged(
    db: Database, scope: Scope, reach: tuple[int, int, str, int]
) -> tuple[tuple[str, str], ...]:
    rows = db.fetch_all(
        f"SELECT r.id, r.run_id, {damage_sql(db.dialect)} FROM run r WHERE {_RANGE}"
        f" AND ({damage_sql(db.dialect)}) IS NOT NULL",
        reach,
    )
    for key, _, damage in rows:
        _add_quarantine(db, scope, key, damage, "")
    return tuple((run_id, damage) for _, run_id, damage in rows)


def _add_quarantine(db: Database, scope: Scope, key: int, reason: str, detail: str) -> None:
    db.execute(
        "INSERT INTO quarantine (run, reconciliation, reason, detail, quarantined_at)"
        " VALUES (?, ?, ?, ?, ?)",
        (key, scope.reconciliation_key, reason, detail, to_us(scope.now)),
    )


def _count_decisions(db: Database, scope: Scope, reach: tuple[int, int, str, int]) -> Tally:
    """Count what was just decided, while the runs still hold what they held."""
    rows = db.fetch_all(
        "SELECT e.rule, count(*),"
        f" sum(CASE WHEN r.session_value <> '' AND e.rule NOT IN ({_KEEPING}) THEN 1 ELSE 0 END),"
        f" sum(CASE WHEN r.status = '{RunStatus.RUNNING}' OR (r.status ="
        f" '{RunStatus.WAITING_USER}' AND r.profile = '{Profile.STICKY_PROCESS}')"
        " THEN 1 ELSE 0 END)"
        " FROM run r JOIN recovery_event e ON e.run = r.id AND e.no = r.recovery_count + 1"
        f" WHERE {_RANGE} AND e.reconciliation = ? GROUP BY e.rule",
        (*reach, scope.reconciliation_key),
    )
    return Tally(
        decisions={rule: count for rule, count, _, _ in rows},
        sessions=sum(int(sessions) for _, _, sessions, _ in rows),
        slots=sum(int(slots) for _, _, _, slots in rows),
    )


def _count_processes(db: Database, scope: Scope, batch: Batch) -> None:
    """Tell the history how many processes of each run were ended since the last recovery that
    completed: by this one, or by one before it that was cut off."""
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


def _close_questions(db: Database, scope: Scope, batch: Batch) -> int:
    """Close the questions of the runs that were just decided and do not go on."""
    keys = (batch.first, batch.last)
    closed: int = db.execute(
        "UPDATE interaction SET state = 'CLOSED'"
        " WHERE run BETWEEN ? AND ? AND state IN ('OPEN', 'ANSWERED')"
        # A list, not a look for each question: SQLite would look through the whole batch for it.
        " AND run IN (SELECT e.run FROM recovery_event e WHERE e.reconciliation = ?"
        f" AND e.run BETWEEN ? AND ? AND e.rule NOT IN ({_KEEPING}))",
        (*keys, scope.reconciliation_key, *keys),
    ).rowcount
    return closed


def _retire_sessions(db: Database, scope: Scope, batch: Batch) -> None:
    """Keep the handles of runs that were just failed for want of their session, for a while."""
    db.execute(
        "UPDATE run SET retired_type = session_type, retired_value = session_value,"
        " reopenable_until = ?, reopen_due_us = ?, due_clock = ? WHERE id IN"
        " (SELECT e.run FROM recovery_event e WHERE e.reconciliation = ? AND e.run BETWEEN ? AND ?"
        f" AND e.rule IN ({_REOPENABLE}))",
        (
            to_us(scope.reopen.at),
            scope.reopen.us,
            scope.reopen.clock,
            scope.reconciliation_key,
            batch.first,
            batch.last,
        ),
    )


def _quarantine(db: Database, scope: Scope, batch: Batch, detail: str) -> Tally:
    """Set aside the one row of a batch that the database itself refuses to converge."""
    _hold(db, (batch.first, batch.last, *scope.whose))
    row = db.fetch_one(
        "SELECT r.run_id, r.status, r.event_count + 1, (SELECT COALESCE(max(e.no), 0) + 1"
        f" FROM recovery_event e WHERE e.run = r.id) FROM run r WHERE {_RANGE}",
        (batch.first, batch.last, *scope.whose),
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
    db.execute(
        "UPDATE run SET event_count = ?, recovery_state = ?, recovered_at = ?,"
        " recovery_reason = ?, recovery_count = ?, recovered_version = version,"
        " reconciliation = ?, owner_epoch = ?"
        " WHERE id = ? AND owner = ? AND owner_epoch < ?",
        (
            sequence,
            RecoveryState.QUARANTINED.value,
            now,
            QUARANTINE_RULE,
            number,
            scope.reconciliation_key,
            scope.owner.epoch,
            batch.first,
            *scope.whose,
        ),
    )
    return Tally(
        scanned=1,
        quarantined=1,
        decisions={QUARANTINE_RULE: 1},
        damaged=((run_id, "convergence_refused"),),
    )


def decided_in(
    db: Database, reconciliation_key: int, batch: Batch, *, limit: int
) -> list[tuple[str, str, str, str]]:
    """Return (run_id, rule, status before, status after) of decisions in a batch, for the log."""
    if limit <= 0:
        return []
    return db.fetch_all(
        "SELECT r.run_id, e.rule, e.status_before, e.status_after"
        " FROM run r JOIN recovery_event e ON e.run = r.id AND e.no = r.recovery_count"
        # By the index of recovered runs: the range of keys may hold many that ended long ago.
        " WHERE (r.id + 0) BETWEEN ? AND ? AND e.reconciliation = ? AND r.recovered_at >="
        " (SELECT c.started_at FROM reconciliation c WHERE c.id = ?)"
        " ORDER BY r.recovered_at, r.id LIMIT ?",
        (batch.first, batch.last, reconciliation_key, reconciliation_key, limit),
    )


def clear_stale_bindings(db: Database, owner: Owner) -> Tally:
    """Clear what runs that have ended still hold. Every end of a run does that by itself; this
    mends what was changed behind our back, and finds it by indexes that are otherwise empty."""
    ended = f"status IN ({_TERMINAL})"
    with db.transaction():
        sessions = db.execute(
            "UPDATE run SET session_type = NULL, session_value = NULL"
            f" WHERE owner = ? AND session_value IS NOT NULL AND {ended}",
            (owner.instance,),
        ).rowcount
        questions = db.execute(
            "UPDATE interaction SET state = 'CLOSED' WHERE state IN ('OPEN', 'ANSWERED')"
            f" AND EXISTS (SELECT 1 FROM run r WHERE r.id = interaction.run AND r.{ended}"
            " AND r.owner = ?)",
            (owner.instance,),
        ).rowcount
    return Tally(sessions=sessions, questions=questions)


# -- foreseeing --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """A run that a restart would decide on, and what it would see. `session`: None when there is
    none that could be used."""

    run_key: int
    run_id: str
    engine: str
    session: StoredSession | None
    situation: Situation


def _situation_sql(dialect: SqlDialect) -> str:
    """Return what a restart would see of the runs `r` as the columns of a query."""
    return (
        f"r.status, r.profile, {facts_sql(dialect)} AS facts,"
        f" CASE WHEN {damage_sql(dialect)} IS NULL THEN 0 ELSE 1 END AS damaged,"
        " CASE WHEN r.recovered_version = r.version THEN r.recovery_reason END AS standing"
    )


_FORESEEN: Final = (
    " FROM run r LEFT JOIN interaction i ON i.run = r.id AND i.no = r.interaction_count"
    f" WHERE {live('r.')} AND r.owner = ? AND r.owner_epoch < ?"
)


def foreseen_page(db: Database, reach: Reach, *, after: int, limit: int) -> list[Foreseen]:
    """Return the runs behind key `after` that a restart would decide on, in its order."""
    return _foreseen(db, reach, "r.id > ? ORDER BY r.id LIMIT ?", (after, limit))


def foreseen_of_engine(
    db: Database, reach: Reach, engine: str, *, after: int, limit: int
) -> list[Foreseen]:
    """Return the runs of an engine behind key `after` that a restart would decide on, and that have
    a handle."""
    which = "r.id > ? AND r.engine = ? AND r.session_value <> '' ORDER BY r.id LIMIT ?"
    return _foreseen(db, reach, which, (after, engine, limit))


def _foreseen(db: Database, reach: Reach, which: str, params: tuple[object, ...]) -> list[Foreseen]:
    rows = db.fetch_all(
        "SELECT r.id, r.run_id, r.engine, r.session_type, r.attempt, r.session_value,"
        " r.session_mark, r.session_verdict, r.session_reason,"
        f" {_situation_sql(db.dialect)}{_FORESEEN} AND {which}",
        (*reach.whose, *params),
    )
    return [
        Foreseen(
            run_key=key,
            run_id=run_id,
            engine=engine,
            session=_stored(key, *session) if kind and session[1] else None,
            situation=_situation(status, profile, facts, damaged, standing),
        )
        for key, run_id, engine, kind, *session, status, profile, facts, damaged, standing in rows
    ]


def situations(db: Database, reach: Reach) -> list[tuple[Situation, int]]:
    """Return what a restart would see of all its runs, and of how many each."""
    rows = db.fetch_all(
        "SELECT status, profile, facts, damaged, standing, count(*) FROM"
        f" (SELECT {_situation_sql(db.dialect)}{_FORESEEN}) AS s"
        " GROUP BY status, profile, facts, damaged, standing",
        reach.whose,
    )
    return [(_situation(*seen), count) for *seen, count in rows]


def _situation(
    status: str, profile: str | None, facts: int, damaged: int, standing: str | None
) -> Situation:
    return Situation(
        status=word(RunStatus, status),
        profile=word(Profile, profile),
        facts=Fact(facts),
        damaged=bool(damaged),
        last_rule=standing,
    )


# -- sessions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """A handle whose run would be resumed by it, and what is on record of it. `handle` is a secret.

    Attributes:
        mark: what its file was when the latest question was recorded; None: nobody looked.
        finding: of its latest check; None: it was not checked.
    """

    run_key: int
    attempt: int
    handle: str = field(repr=False)
    mark: SessionFingerprint | None
    finding: SessionFinding | None


def sessions_to_check(
    db: Database, scope: Reach, *, engine: str, after: int, limit: int
) -> list[StoredSession]:
    """Return handles of the runs to examine of one engine, in order of run keys."""
    rows = db.fetch_all(
        "SELECT id, attempt, session_value, session_mark, session_verdict, session_reason FROM run"
        f" WHERE {LIVE} AND owner = ? AND owner_epoch < ? AND id > ? AND engine = ?"
        " AND session_value <> '' ORDER BY id LIMIT ?",
        (*scope.whose, after, engine, limit),
    )
    return [_stored(*row) for row in rows]


def _stored(
    run_key: int,
    attempt: int,
    handle: str,
    mark: str | None,
    verdict: str | None,
    reason: str | None,
) -> StoredSession:
    return StoredSession(
        run_key=run_key,
        attempt=attempt,
        handle=handle,
        mark=SessionFingerprint.read(mark),
        finding=finding_from(verdict, reason),
    )


def record_findings(db: Database, scope: Scope, found: Mapping[int, SessionFinding]) -> None:
    """Record what the checks of sessions said, by run key."""
    with db.transaction():
        for run_key, finding in found.items():
            db.execute(
                "UPDATE run SET session_verdict = ?, session_reason = ?"
                " WHERE id = ? AND owner = ? AND owner_epoch < ?",
                (finding.verdict.value, finding.reason, run_key, *scope.whose),
            )
