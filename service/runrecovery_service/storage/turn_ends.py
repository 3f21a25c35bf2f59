"""Records the end of a turn, and the resulting change of its run."""

from __future__ import annotations

from datetime import datetime

from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.recovery_matrix import RESUMED_RULE, Fact, Rule, decide
from runrecovery_service.domain.run import ErrorCode, Run, RunError, RunEventKind, RunStatus
from runrecovery_service.domain.session_check import SessionFingerprint
from runrecovery_service.domain.steady_time import Due, DueIn
from runrecovery_service.domain.turn import Asked, Interrupted, SessionGone, Succeeded, TurnEnd
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.storage import (
    events,
    interruptions,
    launch_records,
    runs,
    turns,
    usage,
    use_case,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.recovery_sql import facts_of_run
from runrecovery_service.storage.rows import to_json, to_us
from runrecovery_service.storage.turns import Turn


@use_case.retried
def record_end(
    db: Database,
    turn: Turn,
    *,
    owner: Owner,
    end: TurnEnd,
    ended: LaunchEnd,
    due: Due | None,
    due_in: DueIn,
    mark: SessionFingerprint | None = None,
    used: TurnUsage | None = None,
    now: datetime,
) -> Run:
    """Record the end of a turn and of its launch in one transaction.

    An accepted cancel overrides the end. The call is repeated if the answer to the commit was lost.
    A repetition changes nothing, even if the run is in a later turn, or a peer has taken it.

    Args:
        due: the deadline of the wait that begins with a question; None: no deadline.
        due_in: returns the deadline in a number of seconds; ends the pause before a resume.
        mark: the session fingerprint after the process has ended; None: not taken.
        used: the last reported usage of the turn; None: none was reported.
    """
    if launch_records.is_over(db, turn.launch):
        return turns.current_run(db, turn, owner=owner)
    run = turns.own(db, turn, owner)
    launch_records.close(db, turn.launch, ended, now=now)
    if used is not None:
        usage.record(db, run, turn.launch, used, owner=owner)
    if run.cancel_requested:
        runs.change(db, run, owner=owner, now=now, status=RunStatus.CANCELED)
    elif isinstance(end, Asked):
        turns.ask(db, run, end.question, owner=owner, now=now, due=due, mark=mark)
    elif isinstance(end, Succeeded):
        runs.change(
            db,
            run,
            owner=owner,
            now=now,
            status=RunStatus.SUCCEEDED,
            output=to_json(end.output),
        )
    elif isinstance(end, Interrupted):
        _interrupt(db, run, end, owner=owner, due_in=due_in, now=now)
    elif isinstance(end, SessionGone):
        _start_over(db, run, end, owner=owner, now=now)
    else:
        turns.fail(db, run, end.error, owner=owner, now=now)
    if used is not None and not used.is_of_session:
        events.add_to_event(db, run, usage=used.turn)
    return runs.get_by_key(db, run.key)


def _interrupt(
    db: Database, run: Run, end: Interrupted, *, owner: Owner, due_in: DueIn, now: datetime
) -> None:
    """Apply the decision that a restart would make now. A run that fails cannot be reopened."""
    facts = facts_of_run(db, run.key)
    if end.cause is InterruptionCause.SHIM_LOST and Fact.REPLY in facts:
        # The matrix delivers an unread reply again without a limit. If the shim of every process
        # died, this would never end.
        turns.fail(
            db,
            run,
            RunError(code=ErrorCode.SUPERVISION_LOST, message=end.because),
            owner=owner,
            now=now,
        )
        return
    rule = _rule(run, facts)
    if rule.error is not None:
        because = f"{end.because} {rule.because}" if rule.needs & Fact.RESUME else end.because
        turns.fail(db, run, RunError(code=rule.error, message=because), owner=owner, now=now)
        return
    columns: dict[str, object] = {}
    if rule.name == RESUMED_RULE:
        columns |= interruptions.columns(run, end.cause, due_in=due_in, now=now)
    _apply_rule(db, run, rule, owner=owner, now=now, **columns)


def _start_over(db: Database, run: Run, end: SessionGone, *, owner: Owner, now: datetime) -> None:
    """Apply the recovery matrix to a run whose session cannot be resumed."""
    rule = _rule(run, facts_of_run(db, run.key) & ~Fact.HANDLE)
    if rule.error is None:
        _apply_rule(db, run, rule, owner=owner, now=now)
    else:
        error = RunError(code=end.error.code, message=f"{end.error.message} {rule.because}")
        turns.fail(db, run, error, owner=owner, now=now)


def _rule(run: Run, facts: Fact) -> Rule:
    assert run.status is not None  # noqa: S101 - `_own` has refused such a run
    return decide(run.status, run.profile, facts)


def _apply_rule(
    db: Database, run: Run, rule: Rule, *, owner: Owner, now: datetime, **columns: object
) -> None:
    """Change the run as a rule says. The rule must not be one that fails the run."""
    if not rule.keeps:
        columns |= {"session_type": None, "session_value": None}
    if rule.becomes is RunStatus.QUEUED:
        columns["queued_at"] = to_us(now)
    event = RunEventKind(rule.becomes)
    runs.change(db, run, owner=owner, now=now, status=rule.becomes, event=event, about=0, **columns)
    if not rule.keeps:
        runs.close_questions(db, run)
