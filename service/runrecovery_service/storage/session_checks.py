"""The stored sessions that a recovery checks, and the results of the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Final

from runrecovery_service.domain.run import InteractionState, RestartPolicy, RunStatus
from runrecovery_service.domain.session_check import SessionFinding, SessionFingerprint
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_scope import ApplyScope, RecoveryScope
from runrecovery_service.storage.rows import finding_from
from runrecovery_service.storage.tables import live


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """The session with which a run would be resumed. `handle` is a secret.

    Attributes:
        fingerprint: size and time of the session file at the latest question; None: not recorded.
        finding: the result of the latest check; None: not checked.
        in_turn: whether the run will resume an interrupted turn, not continue after a question.
    """

    run_key: int
    attempt: int
    handle: str = field(repr=False)
    fingerprint: SessionFingerprint | None
    finding: SessionFinding | None
    in_turn: bool = False


IN_TURN: Final = (
    f"CASE WHEN r.restart_policy = '{RestartPolicy.RESUME}'"
    f" AND r.status <> '{RunStatus.WAITING_USER}' AND NOT EXISTS (SELECT 1 FROM interaction a"
    f" WHERE a.run = r.id AND a.no = r.interaction_count"
    f" AND a.state = '{InteractionState.ANSWERED}') THEN 1 ELSE 0 END"
)
"""SQL for `StoredSession.in_turn` of a run `r`, as 0 or 1."""


def sessions_to_check(
    db: Database, scope: RecoveryScope, *, engine: str, after: int, limit: int
) -> list[StoredSession]:
    """Return sessions of an engine's runs in scope with a key above `after`, ordered by key."""
    rows = db.fetch_all(
        "SELECT r.id, r.attempt, r.session_value, r.session_mark, r.session_verdict,"
        f" r.session_reason, {IN_TURN} FROM run r"
        f" WHERE {live('r.')} AND r.owner = ? AND r.owner_epoch < ? AND r.id > ? AND r.engine = ?"
        " AND r.session_value <> '' ORDER BY r.id LIMIT ?",
        (*scope.params, after, engine, limit),
    )
    return [stored_session(*row) for row in rows]


def stored_session(
    run_key: int,
    attempt: int,
    handle: str,
    mark: str | None,
    verdict: str | None,
    reason: str | None,
    in_turn: int,
) -> StoredSession:
    """Return the session from the columns of a run."""
    return StoredSession(
        run_key=run_key,
        attempt=attempt,
        handle=handle,
        fingerprint=SessionFingerprint.read(mark),
        finding=finding_from(verdict, reason),
        in_turn=bool(in_turn),
    )


def record_findings(db: Database, scope: ApplyScope, found: Mapping[int, SessionFinding]) -> None:
    """Record the results of session checks.

    Args:
        found: the result for each run, by run key.
    """
    with db.transaction():
        for run_key, finding in found.items():
            db.execute(
                "UPDATE run SET session_verdict = ?, session_reason = ?"
                " WHERE id = ? AND owner = ? AND owner_epoch < ?",
                (finding.verdict.value, finding.reason, run_key, *scope.params),
            )
