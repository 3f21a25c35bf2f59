"""One turn of a run: taken from the queue, launched, followed, ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runrecovery_service.domain.deadline import Due, SteadyTime
from runrecovery_service.domain.errors import Fenced, RunGone, RunNotFound, RunQuarantined
from runrecovery_service.domain.recovery_matrix import decide
from runrecovery_service.domain.run import (
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
from runrecovery_service.domain.turn import Asked, Interrupted, Succeeded, TurnEnd
from runrecovery_service.storage import interactions, launch_records, runs, use_case
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd, LaunchRecord, LaunchSite
from runrecovery_service.storage.recovery_sql import facts_of_run
from runrecovery_service.storage.rows import options_to_json, to_json, to_us

DueIn = Callable[[float], Due]
"""Gives the deadline that is so many seconds away."""
_UNCHECKED: Final[Mapping[str, None]] = {"session_verdict": None, "session_reason": None}
_UNSEEN: Final[Mapping[str, None]] = {**_UNCHECKED, "session_mark": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A run that was taken from the queue, and what its process is to be given.

    `reply` is the accepted answer that a resuming process gets; None when the run starts from
    the beginning.
    """

    run: Run
    lease: LaunchRecord
    reply: Interaction | None


@use_case.retried
def take_next(
    db: Database,
    *,
    owner: Owner,
    busy_engines: Sequence[str],
    place: LaunchSite,
    due_in: DueIn,
    steady: SteadyTime,
    now: datetime,
) -> Turn | None:
    """Take the run that waits longest, of an engine that is not busy; None when there is none. A
    run whose time is over is left to its deadline.

    The run is RUNNING and its lease on record (write-ahead) when this returns. With its first
    launch the time begins that the whole run may take.
    """
    marks = ", ".join("?" for _ in busy_engines)
    row = db.fetch_one(
        "SELECT id FROM run WHERE owner = ? AND status = 'QUEUED' AND owner_epoch = ?"
        " AND recovery_state <> 'QUARANTINED'"
        " AND (run_due_us IS NULL OR run_due_us > ?)"
        # Nobody works beside a process that could not be ended.
        " AND NOT EXISTS (SELECT 1 FROM process_lease l"
        " WHERE l.run = run.id AND l.state = 'KILL_PENDING')"
        + (f" AND engine NOT IN ({marks})" if marks else "")
        + " ORDER BY queued_at, id LIMIT 1",
        (owner.instance, owner.epoch, steady.us, *busy_engines),
    )
    if row is None:
        return None
    run = runs.get_by_key(db, row[0])
    if run.status is not RunStatus.QUEUED:
        raise Stale
    last = interactions.find(db, run.key, run.interaction_count)
    reply = last if last is not None and last.state is InteractionState.ANSWERED else None
    columns: dict[str, object] = (
        {"turn": run.turn + 1}
        if reply is not None
        else {
            "attempt": run.attempt + 1,
            "turn": 1,
            "started_at": to_us(now),
            "session_type": None,
            "session_value": None,
            **_UNSEEN,
        }
    )
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
    lease = launch_records.record_launch(db, run, owner=owner, place=place, now=now)
    return Turn(run=run, lease=lease, reply=reply)


@use_case.retried
def requeue_unlaunched(db: Database, *, owner: Owner, held: Collection[str], now: datetime) -> int:
    """Put runs back into the queue that were taken by a commit whose answer never came.

    Args:
        held: cookies of the leases that somebody follows; a run of any other one whose process was
            never launched goes back, and its lease with it.

    Returns:
        How many runs went back.
    """
    rows = db.fetch_all(
        "SELECT id, run, cookie FROM process_lease"
        " WHERE instance = ? AND epoch = ? AND state = 'INTENT'",
        (owner.instance, owner.epoch),
    )
    lost = [(lease_key, run_key) for lease_key, run_key, cookie in rows if cookie not in held]
    for lease_key, run_key in lost:
        run = runs.get_by_key(db, run_key)
        if run.status is None:
            raise RunQuarantined(run.run_id)
        _demand_owned(run, owner)
        before = {"turn": run.turn - 1} if run.turn > 1 else {"attempt": run.attempt - 1, "turn": 0}
        runs.change(
            db,
            run,
            owner=owner,
            now=now,
            status=RunStatus.QUEUED,
            event=RunEventKind.QUEUED,
            about=0,
            **before,
        )
        db.execute("DELETE FROM process_lease WHERE id = ?", (lease_key,))
    return len(lost)


@use_case.retried
def record_session(
    db: Database, turn: Turn, *, owner: Owner, session: Session, now: datetime
) -> None:
    """Record the handle that the conversation can be resumed by."""
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
        **(_UNSEEN if is_another else _UNCHECKED),
    )


def recorded_fingerprint(db: Database, turn: Turn) -> SessionFingerprint | None:
    """Return what a run's session file was when its question was recorded; None: nobody looked."""
    row = db.fetch_one(
        "SELECT session_mark FROM run WHERE id = ? AND run_id = ?", (turn.run.key, turn.run.run_id)
    )
    return SessionFingerprint.read(row[0]) if row else None


@use_case.retried
def record_delivered(db: Database, turn: Turn, *, owner: Owner) -> None:
    """Record that a process has been given the accepted answer."""
    run = _own(db, turn, owner)
    db.execute(
        "UPDATE interaction SET state = 'DELIVERED'"
        " WHERE run = ? AND no = ? AND state = 'ANSWERED'",
        (run.key, run.interaction_count),
    )


@use_case.retried
def record_undelivered(db: Database, turn: Turn, *, owner: Owner, number: int) -> None:
    """Record that the answer to a question was given to a process, and never read."""
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
    """Record the question of a sticky process, which lives on: WAITING_USER.

    Args:
        number: the question's interaction_id; one that is on record is not asked again.
        due: when the wait will have lasted long enough.
    """
    run = _own(db, turn, owner)
    if run.interaction_count >= number:
        return run
    _ask(db, run, question, owner=owner, now=now, due=due)
    return runs.get_by_key(db, run.key)


@use_case.retried
def record_end(
    db: Database,
    turn: Turn,
    *,
    owner: Owner,
    end: TurnEnd,
    ended: LaunchEnd,
    due: Due | None,
    mark: SessionFingerprint | None = None,
    now: datetime,
) -> Run:
    """Record how a turn ended, and close its lease, in one step. An accepted cancel wins.

    `due` is when the wait that begins with it, if any, will have lasted long enough; None: never.
    `mark` is what the session's file is, now that nothing writes to it any more, if it was looked
    at.

    Safe to repeat when it is not known whether it was committed: the run may be in a later turn.
    """
    run = _own(db, turn, owner)
    if launch_records.is_over(db, turn.lease):
        return run
    launch_records.close(db, turn.lease, ended, now=now)
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
        _interrupt(db, run, end, owner=owner, now=now)
    else:
        _fail(db, run, end.error, owner=owner, now=now)
    return runs.get_by_key(db, run.key)


def current_run(db: Database, turn: Turn, *, owner: Owner) -> Run:
    """Return the run of a turn as it is now.

    Integer keys are handed out again when the database has lost commits. So the run is found by its
    run_id, and the launch by its cookie: neither comes again.

    Raises:
        RunGone: the run, or the launch, is not in the store.
        Fenced: the run belongs to a newer epoch.
    """
    try:
        run = runs.get(db, turn.run.run_id)
    except RunNotFound:
        raise RunGone(f"run {turn.run.run_id!r}") from None
    if run.key != turn.run.key or not launch_records.is_recorded(db, turn.lease):
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


def _interrupt(db: Database, run: Run, end: Interrupted, *, owner: Owner, now: datetime) -> None:
    """Do with the run what a restart at this moment would: the same matrix decides."""
    assert run.status is not None  # noqa: S101 - `_own` has refused such a run
    rule = decide(run.status, run.profile, facts_of_run(db, run.key))
    if rule.error is not None:
        error = RunError(code=rule.error, message=end.because)
        _fail(db, run, error, owner=owner, now=now)
        return
    columns: dict[str, object] = {}
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
        **{**_UNCHECKED, "session_mark": None if mark is None else str(mark)},
        **armed,
    )
    db.execute(
        "INSERT INTO interaction (run, no, kind, prompt, options, state, asked_at,"
        " wait_deadline_at) VALUES (?, ?, ?, ?, ?, 'OPEN', ?, ?)",
        (
            run.key,
            number,
            question.kind.value,
            question.prompt,
            options_to_json(question.options),
            to_us(now),
            None if due is None else to_us(due.at),
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
