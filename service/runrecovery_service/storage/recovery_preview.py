"""Reads the runs that the next restart would decide on, with the facts of each decision."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from runrecovery_service.domain.plan import Situation, Work
from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.recovery_scope import RecoveryScope
from runrecovery_service.storage.recovery_sql import WITH_LATEST_QUESTION, damage_sql, facts_sql
from runrecovery_service.storage.rows import enum_from_text, to_us
from runrecovery_service.storage.session_checks import IN_TURN, StoredSession, stored_session
from runrecovery_service.storage.sql_dialects import SqlDialect
from runrecovery_service.storage.tables import live


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedRun:
    """A run that a restart would decide on, and its work.

    Attributes:
        session: the stored session; None: the run has no usable handle.
        situation: everything that the decision depends on.
        work: the tokens and running time that the run has used so far.
    """

    run_key: int
    run_id: str
    engine: str
    session: StoredSession | None
    situation: Situation
    work: Work


def _situation_sql(dialect: SqlDialect) -> str:
    """Return SQL columns with the values of a `Situation` for runs `r`."""
    return (
        f"r.status, r.profile, {facts_sql(dialect)} AS facts,"
        f" CASE WHEN {damage_sql(dialect)} IS NULL THEN 0 ELSE 1 END AS damaged,"
        " CASE WHEN r.recovered_version = r.version THEN r.recovery_reason END AS standing"
    )


_WORK: Final = (
    "r.input_tokens + r.output_tokens AS tokens, COALESCE(? - l.created_at, 0) AS running_us"
)
_RUNS_IN_SCOPE: Final = (
    f" {WITH_LATEST_QUESTION}"
    " LEFT JOIN process_lease l ON l.run = r.id AND l.attempt = r.attempt AND l.turn = r.turn"
    " AND l.state IN ('INTENT', 'GATED', 'RUNNING')"
    f" WHERE {live('r.')} AND r.owner = ? AND r.owner_epoch < ?"
)


def preview_page(
    db: Database, scope: RecoveryScope, *, after: int, limit: int, now: datetime
) -> list[PreviewedRun]:
    """Return at most `limit` runs in scope with a key above `after`, in the order of keys."""
    return _preview(db, scope, "r.id > ? ORDER BY r.id LIMIT ?", (after, limit), now=now)


def preview_engine(
    db: Database, scope: RecoveryScope, engine: str, *, after: int, limit: int, now: datetime
) -> list[PreviewedRun]:
    """Return at most `limit` runs in scope with a handle of this engine and a key above `after`."""
    which = "r.id > ? AND r.engine = ? AND r.session_value <> '' ORDER BY r.id LIMIT ?"
    return _preview(db, scope, which, (after, engine, limit), now=now)


def preview_running(db: Database, scope: RecoveryScope, *, now: datetime) -> list[PreviewedRun]:
    """Return the runs in scope that are RUNNING."""
    return _preview(db, scope, "r.status = ?", (RunStatus.RUNNING.value,), now=now)


def _preview(
    db: Database, scope: RecoveryScope, which: str, params: tuple[object, ...], *, now: datetime
) -> list[PreviewedRun]:
    rows = db.fetch_all(
        "SELECT r.id, r.run_id, r.engine, r.session_type, r.attempt, r.session_value,"
        f" r.session_mark, r.session_verdict, r.session_reason, {IN_TURN} AS in_turn,"
        f" {_situation_sql(db.dialect)}, {_WORK}{_RUNS_IN_SCOPE} AND {which}",
        (to_us(now), *scope.params, *params),
    )
    return [_previewed(row) for row in rows]


def _previewed(row: Row) -> PreviewedRun:
    key, run_id, engine, session_type, *session = row[:-7]
    *situation, tokens, running_us = row[-7:]
    return PreviewedRun(
        run_key=key,
        run_id=run_id,
        engine=engine,
        session=stored_session(key, *session) if session_type and session[1] else None,
        situation=_situation(*situation),
        work=_work(1, tokens, running_us),
    )


def sum_situations(
    db: Database, scope: RecoveryScope, *, now: datetime
) -> list[tuple[Situation, Work]]:
    """Return each situation of the runs in scope, with the number and the work of its runs."""
    # Otherwise SQLite sorts the columns that the facts are made of, with input and output.
    rows = db.fetch_all(
        f"WITH s AS MATERIALIZED (SELECT {_situation_sql(db.dialect)}, {_WORK}{_RUNS_IN_SCOPE})"
        " SELECT status, profile, facts, damaged, standing, count(*), sum(tokens), sum(running_us)"
        " FROM s GROUP BY status, profile, facts, damaged, standing",
        (to_us(now), *scope.params),
    )
    return [(_situation(*columns[:5]), _work(*columns[5:])) for columns in rows]


def _work(runs: int, tokens: int, running_us: int) -> Work:
    # PostgreSQL returns a sum as Decimal. The time is negative if the wall clock was set back since
    # the launch.
    return Work(runs=runs, tokens=int(tokens), running_us=max(0, int(running_us)))


def _situation(
    status: str, profile: str | None, facts: int, damaged: int, last_rule: str | None
) -> Situation:
    return Situation(
        status=enum_from_text(RunStatus, status),
        profile=enum_from_text(Profile, profile),
        facts=Fact(facts),
        damaged=bool(damaged),
        last_rule=last_rule,
    )
