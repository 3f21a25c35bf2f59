"""The turns of runs: taken from the queue, and recorded as they proceed and end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runrecovery_service.domain.deadline import Due, SteadyTime
from runrecovery_service.domain.errors import Fenced, RunGone, RunNotFound, RunQuarantined
from runrecovery_service.domain.interruption import Interruption, InterruptionCause
from runrecovery_service.domain.recovery_matrix import RESUMED_RULE, Fact, Rule, decide
from runrecovery_service.domain.run import (
    ErrorCode,
    Interaction,
    InteractionState,
    Question,
    Run,
    RunError,
    RunEventKind,
    RunStatus,
    Session,
)
from runrecovery_service.domain.session_check import SessionFingerprint
from runrecovery_service.domain.turn import Asked, Interrupted, SessionGone, Succeeded, TurnEnd
from runrecovery_service.domain.usage import SessionUsage, TurnUsage
from runrecovery_service.storage import (
    events,
    interactions,
    interruptions,
    launch_records,
    runs,
    usage,
    use_case,
)
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd, LaunchRecord, LaunchSite
from runrecovery_service.storage.recovery_sql import facts_of_run
from runrecovery_service.storage.rows import (
    options_to_json,
    to_json,
    to_us,
    tool_call_to_json,
)

DueIn = Callable[[float], Due]
"""Returns the deadline that is this many seconds away."""
_NO_FINDING: Final[Mapping[str, None]] = {"session_verdict": None, "session_reason": None}
_NO_FINGERPRINT: Final[Mapping[str, None]] = {**_NO_FINDING, "session_mark": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A run that was taken from the queue, and the record of its launch.

    With neither a reply nor an interruption the run starts from the beginning.

    Attributes:
        reply: the accepted reply with which the process resumes the session.
        interruption: the interruption after which the process resumes the session.
        session_usage: what earlier processes of the session have reported.
        queued_at: the last change of the run before it was taken.
    """

    run: Run
    launch: LaunchRecord
    reply: Interaction | None = None
    interruption: Interruption | None = None
    session_usage: SessionUsage | None = None
    queued_at: datetime | None = None


@use_case.retried
def take_next(
    db: Database,
    *,
    owner: Owner,
    busy_engines: Sequence[str],
    site: LaunchSite,
    due_in: DueIn,
    steady: SteadyTime,
    now: datetime,
) -> Turn | None:
    """Take the run that has been queued longest, of an engine that is not busy; None for none.

    The run becomes RUNNING and its launch is recorded before the process is spawned. The first
    launch starts the deadline of the whole run. A run whose deadline has passed is not taken, and
    one whose budget is used up is failed.
    """
    while (key := _next_in_queue(db, owner, busy_engines, steady)) is not None:
        run = runs.get_by_key(db, key)
        if run.status is not RunStatus.QUEUED:
            raise Stale
        used_up = run.budget.why_used_up(run.usage)
        if used_up is None:
            return _take(db, run, owner=owner, site=site, due_in=due_in, now=now)
        error = RunError(code=ErrorCode.BUDGET_EXCEEDED, message=used_up)
        _fail(db, run, error, owner=owner, now=now)
    return None


def _take(
    db: Database, run: Run, *, owner: Owner, site: LaunchSite, due_in: DueIn, now: datetime
) -> Turn:
    last = interactions.find(db, run.key, run.interaction_count)
    reply = last if last is not None and last.state is InteractionState.ANSWERED else None
    interruption = interruptions.pending(db, run, last) if reply is None else None
    columns: dict[str, object] = {"turn": run.turn + 1, "resume_at": None}
    queued_at = run.updated_at
    if interruption is None:
        columns |= {**interruptions.NONE, **(_first_turn(run, now) if reply is None else {})}
    if run.max_run_s is not None and run.run_deadline_at is None:
        due = due_in(run.max_run_s)
        columns |= {
            "run_deadline_at": to_us(due.at), "run_due_us": due.us, "due_clock": due.clock
        }  # fmt: skip
    runs.change(
        db,
        run,
        owner=owner,
        now=now,
        status=RunStatus.RUNNING,
        event=RunEventKind.STARTED,
        about=0,
        **columns,
    )
    run = runs.get_by_key(db, run.key)
    launch = launch_records.record_launch(db, run, owner=owner, site=site, now=now)
    return Turn(
        run=run,
        launch=launch,
        reply=reply,
        interruption=interruption,
        session_usage=usage.of_session(db, run.key) if reply or interruption else None,
        queued_at=queued_at,
    )


def _next_in_queue(
    db: Database, owner: Owner, busy_engines: Sequence[str], steady: SteadyTime
) -> int | None:
    marks = ", ".join("?" for _ in busy_engines)
    row = db.fetch_one(
        "SELECT id FROM run WHERE owner = ? AND status = 'QUEUED' AND owner_epoch = ?"
        " AND recovery_state <> 'QUARANTINED'"
        " AND (run_due_us IS NULL OR run_due_us > ?)"
        " AND resume_due_us IS NULL"
        # A new process must not run beside an earlier one that could not be killed.
        " AND NOT EXISTS (SELECT 1 FROM process_lease l"
        " WHERE l.run = run.id AND l.state = 'KILL_PENDING')"
        + (f" AND engine NOT IN ({marks})" if marks else "")
        + " ORDER BY queued_at, id LIMIT 1",
        (owner.instance, owner.epoch, steady.us, *busy_engines),
    )
    return None if row is None else int(row[0])


def _first_turn(run: Run, now: datetime) -> dict[str, object]:
    """Return the changes of a run that starts a new attempt."""
    return {
        "attempt": run.attempt + 1,
        "turn": 1,
        "questions_before": run.interaction_count,
        "started_at": to_us(now),
        "session_type": None,
        "session_value": None,
        "session_usage": None,
        **_NO_FINGERPRINT,
    }


@use_case.retried
def requeue_unlaunched(db: Database, *, owner: Owner, held: Collection[str], now: datetime) -> int:
    """Return runs to the queue that were taken by a commit whose answer was lost.

    Args:
        held: the cookies of the launches that have a supervisor. Every other launch in the state
            INTENT is deleted, and its run is queued again; a run with an accepted cancel becomes
            CANCELED.

    Returns:
        The number of these runs.
    """
    rows = db.fetch_all(
        "SELECT id, run, cookie FROM process_lease"
        " WHERE instance = ? AND epoch = ? AND state = 'INTENT'",
        (owner.instance, owner.epoch),
    )
    lost = [(launch_key, run_key) for launch_key, run_key, cookie in rows if cookie not in held]
    for launch_key, run_key in lost:
        run = runs.get_by_key(db, run_key)
        if run.status is None:
            raise RunQuarantined(run.run_id)
        _demand_owned(run, owner)
        status = RunStatus.CANCELED if run.cancel_requested else RunStatus.QUEUED
        before = {"turn": run.turn - 1} if run.turn > 1 else {"attempt": run.attempt - 1, "turn": 0}
        runs.change(
            db,
            run,
            owner=owner,
            now=now,
            status=status,
            event=RunEventKind(status),
            about=0,
            **before,
        )
        db.execute("DELETE FROM process_lease WHERE id = ?", (launch_key,))
    return len(lost)


@use_case.retried
def record_session(
    db: Database, turn: Turn, *, owner: Owner, session: Session, now: datetime
) -> None:
    """Record the session that the run can be resumed with."""
    run = _own(db, turn, owner)
    is_another = run.session is None or run.session.handle != session.handle
    runs.change(
        db,
        run,
        owner=owner,
        now=now,
        session_type=session.type,
        session_value=session.handle,
        session_turn=session.turn,
        about=0,
        **(_NO_FINGERPRINT if is_another else _NO_FINDING),
    )


def recorded_fingerprint(db: Database, turn: Turn) -> SessionFingerprint | None:
    """Return the session fingerprint of the latest question; None: not recorded."""
    row = db.fetch_one(
        "SELECT session_mark FROM run WHERE id = ? AND run_id = ?", (turn.run.key, turn.run.run_id)
    )
    return SessionFingerprint.read(row[0]) if row else None


@use_case.retried
def record_delivered(db: Database, turn: Turn, *, owner: Owner, number: int) -> None:
    """Record that a process has received the accepted reply to the question `number`."""
    run = _own(db, turn, owner)
    db.execute(
        "UPDATE interaction SET state = 'DELIVERED'"
        " WHERE run = ? AND no = ? AND state = 'ANSWERED'",
        (run.key, number),
    )


@use_case.retried
def record_undelivered(db: Database, turn: Turn, *, owner: Owner, number: int) -> None:
    """Record that a process ended without reading the reply that it was sent."""
    run = _own(db, turn, owner)
    db.execute(
        "UPDATE interaction SET state = 'ANSWERED'"
        " WHERE run = ? AND no = ? AND state = 'DELIVERED'",
        (run.key, number),
    )


@use_case.retried
def record_sticky_question(
    db: Database,
    turn: Turn,
    *,
    owner: Owner,
    number: int,
    question: Question,
    due: Due,
    now: datetime,
) -> Run:
    """Record the question of a sticky process, which keeps running; the run becomes WAITING_USER.

    Args:
        number: the question's interaction_id. A question that is recorded is not recorded again.
        due: the deadline of the wait.
    """
    run = _own(db, turn, owner)
    if run.interaction_count >= number:
        return run
    _ask(db, run, question, owner=owner, now=now, due=due)
    return runs.get_by_key(db, run.key)


@use_case.retried
def record_usage(db: Database, turn: Turn, *, owner: Owner, used: TurnUsage) -> None:
    """Record what a turn under way has used so far. After its end this changes nothing."""
    run = _own(db, turn, owner)
    if not launch_records.is_over(db, turn.launch):
        usage.record(db, run, turn.launch, used, owner=owner)


@use_case.retried
def record_retry(db: Database, turn: Turn, *, owner: Owner, message: str, now: datetime) -> None:
    """Record that the agent waits and calls its model again."""
    run = _own(db, turn, owner)
    runs.change(db, run, owner=owner, now=now, event=RunEventKind.RETRYING)
    events.add_to_event(db, run, message=message)


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
    """Record the end of a turn and of its launch in one transaction. An accepted cancel wins.

    A repetition is safe when the answer to the commit was lost: the run may be in a later turn.

    Args:
        due: the deadline of the wait that begins, if one does; None: no deadline.
        due_in: gives the end of the pause before an interrupted turn is resumed.
        mark: the session fingerprint, taken after the process has ended; None: not taken.
        used: the last report of the turn's usage; None: there was none.
    """
    run = _own(db, turn, owner)
    if launch_records.is_over(db, turn.launch):
        return run
    launch_records.close(db, turn.launch, ended, now=now)
    if used is not None:
        usage.record(db, run, turn.launch, used, owner=owner)
    if run.cancel_requested:
        runs.change(db, run, owner=owner, now=now, status=RunStatus.CANCELED)
    elif isinstance(end, Asked):
        _ask(db, run, end.question, owner=owner, now=now, due=due, mark=mark)
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
        _fail(db, run, end.error, owner=owner, now=now)
    if used is not None:
        events.add_to_event(db, run, usage=used.turn)
    return runs.get_by_key(db, run.key)


def current_run(db: Database, turn: Turn, *, owner: Owner) -> Run:
    """Return the current run of a turn.

    The run is found by its run_id and the launch by its cookie. A database that lost commits gives
    out integer keys again; run_ids and cookies are unique.

    Raises:
        RunGone: the store has lost the run or the launch.
        Fenced: the run belongs to a newer epoch.
    """
    try:
        run = runs.get(db, turn.run.run_id)
    except RunNotFound:
        raise RunGone(f"run {turn.run.run_id!r}") from None
    if run.key != turn.run.key or not launch_records.is_recorded(db, turn.launch):
        raise RunGone(f"the launch of run {turn.run.run_id!r}")
    _demand_owned(run, owner)
    return run


def _own(db: Database, turn: Turn, owner: Owner) -> Run:
    run = current_run(db, turn, owner=owner)
    if run.status is None:
        raise RunQuarantined(run.run_id)
    return run


def _demand_owned(run: Run, owner: Owner) -> None:
    if run.owner == owner.instance and run.owner_epoch < owner.epoch:
        raise RunGone(f"this start's claim of run {run.run_id!r}")
    if run.owner_epoch != owner.epoch or run.owner != owner.instance:
        raise Fenced(f"run {run.run_id!r}")


def _interrupt(
    db: Database, run: Run, end: Interrupted, *, owner: Owner, due_in: DueIn, now: datetime
) -> None:
    """Apply the decision that a restart would make now. A run that fails is not reopenable."""
    facts = facts_of_run(db, run.key)
    if end.cause is InterruptionCause.SHIM_LOST and Fact.REPLY in facts:
        # The matrix delivers a reply again without a limit. If each process that gets the reply
        # lost its shim, this would never end.
        _fail(
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
        _fail(db, run, RunError(code=rule.error, message=because), owner=owner, now=now)
        return
    columns: dict[str, object] = {}
    if rule.name == RESUMED_RULE:
        columns |= interruptions.columns(run, end.cause, due_in=due_in, now=now)
    _apply_rule(db, run, rule, owner=owner, now=now, **columns)


def _start_over(db: Database, run: Run, end: SessionGone, *, owner: Owner, now: datetime) -> None:
    """Apply the decision of the recovery matrix on an interrupted run without a session."""
    rule = _rule(run, facts_of_run(db, run.key) & ~Fact.HANDLE)
    if rule.error is None:
        _apply_rule(db, run, rule, owner=owner, now=now)
    else:
        error = RunError(code=end.error.code, message=f"{end.error.message} {rule.because}")
        _fail(db, run, error, owner=owner, now=now)


def _rule(run: Run, facts: Fact) -> Rule:
    assert run.status is not None  # noqa: S101 - `_own` has refused such a run
    return decide(run.status, run.profile, facts)


def _apply_rule(
    db: Database, run: Run, rule: Rule, *, owner: Owner, now: datetime, **columns: object
) -> None:
    """Change the run to what a rule without an error makes of it."""
    if not rule.keeps:
        columns |= {"session_type": None, "session_value": None}
    if rule.becomes is RunStatus.QUEUED:
        columns["queued_at"] = to_us(now)
    event = RunEventKind(rule.becomes)
    runs.change(db, run, owner=owner, now=now, status=rule.becomes, event=event, about=0, **columns)
    if not rule.keeps:
        runs.close_questions(db, run)


def _ask(
    db: Database,
    run: Run,
    question: Question,
    *,
    owner: Owner,
    now: datetime,
    due: Due | None,
    mark: SessionFingerprint | None = None,
) -> None:
    number = run.interaction_count + 1
    armed = {} if due is None else {"wait_due_us": due.us, "due_clock": due.clock}
    runs.change(
        db,
        run,
        owner=owner,
        now=now,
        status=RunStatus.WAITING_USER,
        event=RunEventKind.ASKED,
        about=number,
        interaction_count=number,
        **{**_NO_FINDING, "session_mark": None if mark is None else str(mark)},
        **armed,
    )
    db.execute(
        "INSERT INTO interaction (run, no, kind, prompt, options, state, asked_at,"
        " wait_deadline_at, tool_call) VALUES (?, ?, ?, ?, ?, 'OPEN', ?, ?, ?)",
        (
            run.key,
            number,
            question.kind.value,
            question.prompt,
            options_to_json(question.options),
            to_us(now),
            None if due is None else to_us(due.at),
            tool_call_to_json(question.tool_call),
        ),
    )


def _fail(db: Database, run: Run, error: RunError, *, owner: Owner, now: datetime) -> None:
    runs.change(
        db,
        run,
        owner=owner,
        now=now,
        status=RunStatus.FAILED,
        error_code=error.code,
        error_message=error.message,
    )
