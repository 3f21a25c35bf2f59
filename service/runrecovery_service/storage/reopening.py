"""ReopenRun: reopens a run that a recovery has failed because its session was lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from datetime import datetime
from typing import Final

from runrecovery_service.domain.errors import (
    RunNotReopenable,
    RunOfAnotherInstance,
    RunQuarantined,
    SessionNotResumable,
)
from runrecovery_service.domain.recovery_matrix import REOPEN_RULE, REOPENABLE
from runrecovery_service.domain.run import (
    Interaction,
    InteractionState,
    RecoveryState,
    Run,
    RunEventKind,
    RunStatus,
)
from runrecovery_service.domain.session_check import SessionFingerprint
from runrecovery_service.domain.steady_time import Due, DueIn, SteadyTime
from runrecovery_service.domain.transitions import REOPENED
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import (
    instances,
    interactions,
    passed_deadlines,
    requests,
    runs,
    use_case,
    webhook_outbox,
)
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.requests import Receipt
from runrecovery_service.storage.rows import to_us

NO_SESSION_LOST: Final = "no recovery failed it because its session was lost"
WINDOW_OVER: Final = "the time in which it could be reopened is over"
QUESTION_LOST: Final = "its question is no longer readable"
NO_HANDLE: Final = "no session handle was kept; supply one"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReopenCandidate:
    """A run that a caller asks to reopen.

    Attributes:
        handle: the kept session handle, a secret; None: none was kept.
        mark: the fingerprint of the session file at the time of the question; None: not recorded.
    """

    run: Run
    handle: str | None
    mark: SessionFingerprint | None

    def __repr__(self) -> str:
        return f"ReopenCandidate(run={self.run.run_id!r}, handle=<secret>)"


@dataclass(frozen=True, slots=True)
class _Kept:
    """The values of a failed run that the store keeps for ReopenRun.

    Attributes:
        decisions: the number of decisions in its history.
        report: the key of the report with the latest decision.
    """

    session_type: str | None
    handle: str | None = field(repr=False)
    decisions: int
    report: int


def find_candidate(db: Database, run_id: str) -> ReopenCandidate:
    """Return the run, and the handle with which it would be resumed.

    The handle is the one kept at the failure or, if the run was already reopened, its present one.

    Raises:
        RunNotFound: there is no such run.
    """
    run = runs.get(db, run_id)
    row = db.fetch_one(
        "SELECT retired_value, session_value, session_mark FROM run WHERE id = ?", (run.key,)
    )
    retired, own, mark = row or (None, None, None)
    return ReopenCandidate(
        run=run, handle=retired or own or None, mark=SessionFingerprint.read(mark)
    )


@use_case.retried
def reopen(
    db: Database,
    run_id: str,
    *,
    handle: str | None,
    session_type_of: Callable[[str], str],
    wait_s_of: Callable[[Run], float],
    owner: Owner,
    etag: str | None,
    receipt: Receipt | None,
    due_in: DueIn,
    steady: SteadyTime,
    now: datetime,
    caller: str | None = None,
) -> Run:
    """Reopen a failed run, with new deadlines.

    The run becomes WAITING_USER with its question open, or QUEUED if its reply had been accepted. A
    run that the same request has already reopened is returned unchanged. On PostgreSQL the run can
    belong to another instance, which converts the new deadlines to its own clock.

    Args:
        handle: the session handle to resume with; None: the kept one.
        session_type_of: returns the type of an engine's handles, for a run without a recorded type.
        wait_s_of: returns how many seconds a question of the run waits at most.

    Raises:
        RunNotFound, RunOfAnotherInstance, RunQuarantined, RunNotReopenable, SessionNotResumable,
        EtagMismatch, RequestIdReused.
    """
    earlier = requests.find_effect(db, receipt)
    if earlier is not None:
        return runs.get_by_key(db, earlier)
    run = runs.get(db, run_id)
    if not _is_already_reopened(db, run, handle):
        instances.demand_current(db, owner)
        _demand_reopenable(run)
        runs.demand_etag(run, etag)
        _reopen_failed(
            db,
            run,
            handle,
            session_type_of,
            wait_s_of,
            owner=owner,
            due_in=due_in,
            steady=steady,
            now=now,
            caller=caller,
        )
    requests.record_effect(db, receipt, run_key=run.key, now=now)
    return runs.get_by_key(db, run.key)


def _is_already_reopened(db: Database, run: Run, handle: str | None) -> bool:
    """Return whether this request was already carried out and the run has not changed since."""
    decided = run.recovery
    if decided is None or decided.recovery_reason != REOPEN_RULE or run.session is None:
        return False
    row = db.fetch_one("SELECT recovered_version = version FROM run WHERE id = ?", (run.key,))
    return bool(row and row[0]) and handle in {None, run.session.handle}


def _demand_reopenable(run: Run) -> None:
    if run.status is None:
        raise RunQuarantined(run.run_id)
    rule = None if run.recovery is None else run.recovery.recovery_reason
    if run.status is not RunStatus.FAILED or rule not in REOPENABLE:
        raise RunNotReopenable(run.run_id, NO_SESSION_LOST)


def _reopen_failed(
    db: Database,
    run: Run,
    handle: str | None,
    session_type_of: Callable[[str], str],
    wait_s_of: Callable[[Run], float],
    *,
    owner: Owner,
    due_in: DueIn,
    steady: SteadyTime,
    now: datetime,
    caller: str | None,
) -> None:
    is_of_peer = runs.is_of_peer(db, run, owner)
    kept = _kept(db, run, None if is_of_peer else steady, now)
    if not is_of_peer:
        # Checked after the window: an ended run keeps the name of its last instance.
        runs.demand_own(run, owner)
    if not (handle or kept.handle):
        raise SessionNotResumable(run.run_id, NO_HANDLE)
    question = interactions.find(db, run.key, run.interaction_count)
    if question is None or question.kind is None:
        raise RunNotReopenable(run.run_id, QUESTION_LOST)
    becomes = RunStatus.WAITING_USER if question.replied_at is None else RunStatus.QUEUED
    if becomes not in REOPENED[RunStatus.FAILED]:
        raise ValueError(f"a FAILED run may not be reopened as {becomes}")
    waits_for_ever = becomes is not RunStatus.WAITING_USER or run.require_user_reply
    wait = None if waits_for_ever else due_in(wait_s_of(run))
    columns = _reopened(run, kept, becomes, handle, wait=wait, due_in=due_in, now=now) | {
        "session_type": kept.session_type or session_type_of(run.engine),
        "owner_epoch": _current_epoch(db, run) if is_of_peer else owner.epoch,
    }
    if is_of_peer:
        columns |= passed_deadlines.without_clock(columns)
    changed = db.execute(
        f"UPDATE run SET {', '.join(f'{name} = ?' for name in columns)}"
        " WHERE id = ? AND owner = ? AND owner_epoch = ? AND status = 'FAILED' AND version = ?",
        (*columns.values(), run.key, run.owner, run.owner_epoch, run.version),
    ).rowcount
    if changed != 1:
        raise Stale
    db.mark_changed(run.key)
    _put_question_back(db, run, question, becomes, wait)
    _add_to_history(db, run, kept, becomes, now=now, caller=caller)


def _reopened(
    run: Run,
    kept: _Kept,
    becomes: RunStatus,
    handle: str | None,
    *,
    wait: Due | None,
    due_in: DueIn,
    now: datetime,
) -> dict[str, object]:
    """Return the changes of the run's row, except session type and epoch."""
    whole = None if run.max_run_s is None else due_in(run.max_run_s)
    return {
        "status": becomes.value,
        "session_value": handle or kept.handle,
        "session_verdict": None,
        "session_reason": None,
        **({} if handle in {None, kept.handle} else {"session_mark": None}),
        "retired_type": None,
        "retired_value": None,
        "reopenable_until": None,
        "reopen_due_us": None,
        "wait_due_us": None if wait is None else wait.us,
        "run_due_us": None if whole is None else whole.us,
        "run_deadline_at": None if whole is None else to_us(whole.at),
        "error_code": None,
        "error_message": None,
        "ended_at": None,
        "queued_at": to_us(now),
        "updated_at": to_us(now),
        "version": run.version + 1,
        "event_count": run.event_count + 1,
        "recovery_state": RecoveryState.REOPENED.value,
        "recovered_at": to_us(now),
        "recovery_reason": REOPEN_RULE,
        "recovered_version": run.version + 1,
        "recovery_count": kept.decisions + 1,
    }


def _current_epoch(db: Database, run: Run) -> int:
    """Return the current epoch of the run's owner, locked until the transaction ends.

    Raises:
        RunOfAnotherInstance: no instance with the owner's name is recorded.
    """
    row = db.fetch_one("SELECT epoch FROM instance_epoch WHERE name = ? FOR SHARE", (run.owner,))
    if row is None:
        raise RunOfAnotherInstance(run.run_id, run.owner)
    return int(row[0])


def _kept(db: Database, run: Run, steady: SteadyTime | None, now: datetime) -> _Kept:
    """Return the values of a failed run that were kept for ReopenRun.

    Args:
        steady: the time of the steady clock of the run's deadlines; None: that clock is on another
            host, so the wall clock decides.

    Raises:
        RunNotReopenable: the window has passed.
    """
    row = db.fetch_one(
        "SELECT reopen_due_us, due_clock, retired_type, retired_value, recovery_count,"
        " reconciliation FROM run WHERE id = ? AND version = ?",
        (run.key, run.version),
    )
    if row is None:
        raise Stale
    due_us, clock, *kept = row
    if steady is None:
        until = run.reopenable_until
        is_over = until is None or until <= now
    else:
        is_over = clock != steady.clock or due_us is None or due_us <= steady.us
    if due_us is None or is_over:
        raise RunNotReopenable(run.run_id, WINDOW_OVER)
    return _Kept(*kept)


def _add_to_history(
    db: Database, run: Run, kept: _Kept, becomes: RunStatus, *, now: datetime, caller: str | None
) -> None:
    """Add the reopening to the history, under the report of the decision that it undoes."""
    db.execute(
        "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
        " status_after, recovery_state, recovered_at, processes_ended, sequence, profile, attempt,"
        " interaction, caller) VALUES (?, ?, ?, ?, 0, 'FAILED', ?, ?, ?, 0, ?, ?, ?, ?, ?)",
        (
            run.key,
            kept.decisions + 1,
            kept.report,
            REOPEN_RULE,
            becomes.value,
            RecoveryState.REOPENED.value,
            to_us(now),
            run.event_count + 1,
            None if run.profile is None else run.profile.value,
            run.attempt,
            run.interaction_count,
            caller,
        ),
    )
    webhook_outbox.record_event(
        db, run, kind=RunEventKind.REOPENED, status=becomes, error_code=None, now=now
    )


def _put_question_back(
    db: Database, run: Run, question: Interaction, becomes: RunStatus, wait: Due | None
) -> None:
    waiting = becomes is RunStatus.WAITING_USER
    db.execute(
        "UPDATE interaction SET state = ?, wait_deadline_at = ? WHERE run = ? AND no = ?",
        (
            (InteractionState.OPEN if waiting else InteractionState.ANSWERED).value,
            None if wait is None else to_us(wait.at),
            run.key,
            question.interaction_id,
        ),
    )
