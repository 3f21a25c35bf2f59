"""The runs that the next restart would decide on, and the facts of each decision. Read-only."""

from __future__ import annotations

from dataclasses import dataclass

from runrecovery_service.domain.plan import Situation
from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_scope import RecoveryScope
from runrecovery_service.storage.recovery_sql import WITH_LATEST_QUESTION, damage_sql, facts_sql
from runrecovery_service.storage.rows import enum_from_text
from runrecovery_service.storage.session_checks import IN_TURN, StoredSession, stored_session
from runrecovery_service.storage.sql_dialects import SqlDialect
from runrecovery_service.storage.tables import live


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedRun:
    """A run that a restart would decide on. `session` is None without a usable handle."""

    run_key: int
    run_id: str
    engine: str
    session: StoredSession | None
    situation: Situation


def _situation_sql(dialect: SqlDialect) -> str:
    """Return the columns of a `Situation` of the runs `r`."""
    return (
        f"r.status, r.profile, {facts_sql(dialect)} AS facts,"
        f" CASE WHEN {damage_sql(dialect)} IS NULL THEN 0 ELSE 1 END AS damaged,"
        " CASE WHEN r.recovered_version = r.version THEN r.recovery_reason END AS standing"
    )


_RUNS_IN_SCOPE = f" {WITH_LATEST_QUESTION} WHERE {live('r.')} AND r.owner = ? AND r.owner_epoch < ?"


def preview_page(
    db: Database, scope: RecoveryScope, *, after: int, limit: int
) -> list[PreviewedRun]:
    """Return the runs in scope whose key is above `after`, in the order of a restart."""
    return _preview(db, scope, "r.id > ? ORDER BY r.id LIMIT ?", (after, limit))


def preview_engine(
    db: Database, scope: RecoveryScope, engine: str, *, after: int, limit: int
) -> list[PreviewedRun]:
    """Return the runs in scope that have a handle of this engine and a key above `after`."""
    which = "r.id > ? AND r.engine = ? AND r.session_value <> '' ORDER BY r.id LIMIT ?"
    return _preview(db, scope, which, (after, engine, limit))


def _preview(
    db: Database, scope: RecoveryScope, which: str, params: tuple[object, ...]
) -> list[PreviewedRun]:
    rows = db.fetch_all(
        "SELECT r.id, r.run_id, r.engine, r.session_type, r.attempt, r.session_value,"
        f" r.session_mark, r.session_verdict, r.session_reason, {IN_TURN} AS in_turn,"
        f" {_situation_sql(db.dialect)}{_RUNS_IN_SCOPE} AND {which}",
        (*scope.params, *params),
    )
    return [
        PreviewedRun(
            run_key=key,
            run_id=run_id,
            engine=engine,
            session=stored_session(key, *session) if kind and session[1] else None,
            situation=_situation(status, profile, facts, damaged, standing),
        )
        for key, run_id, engine, kind, *session, status, profile, facts, damaged, standing in rows
    ]


def count_situations(db: Database, scope: RecoveryScope) -> list[tuple[Situation, int]]:
    """Return each situation of the runs in scope, with the number of its runs."""
    rows = db.fetch_all(
        "SELECT status, profile, facts, damaged, standing, count(*) FROM"
        f" (SELECT {_situation_sql(db.dialect)}{_RUNS_IN_SCOPE}) AS s"
        " GROUP BY status, profile, facts, damaged, standing",
        scope.params,
    )
    return [(_situation(*columns), count) for *columns, count in rows]


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
