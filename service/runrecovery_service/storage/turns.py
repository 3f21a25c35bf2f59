"""Records the progress of turns."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from runrecovery_service.domain.errors import Fenced, RunGone, RunNotFound, RunQuarantined
from runrecovery_service.domain.interruption import Interruption
from runrecovery_service.domain.run import (
    Interaction,
    Question,
    Run,
    RunError,
    RunEventKind,
    RunStatus,
    Session,
)
from runrecovery_service.domain.session_check import SessionFingerprint
from runrecovery_service.domain.steady_time import Due
from runrecovery_service.domain.usage import SessionUsage, TurnUsage
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import events, launch_records, runs, usage, use_case
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.rows import options_to_json, to_us, tool_call_to_json

NO_FINDING: Final[Mapping[str, None]] = {"session_verdict": None, "session_reason": None}
NO_FINGERPRINT: Final[Mapping[str, None]] = {**NO_FINDING, "session_mark": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A run that was taken from the queue, and the record of its launch.

    Without reply and interruption, the run starts from the beginning.

    Attributes:
        reply: the answered question with whose reply the process resumes the session.
        interruption: the interruption from which the process resumes the session.
        session_usage: the usage that earlier processes of the session have reported.
        queued_at: when the run last entered the queue of any instance.
    """

    run: Run
    launch: LaunchRecord
    reply: Interaction | None = None
    interruption: Interruption | None = None
    session_usage: SessionUsage | None = None
    queued_at: datetime | None = None


@use_case.retried
def record_session(
    db: Database, turn: Turn, *, owner: Owner, session: Session, now: datetime
) -> None:
    """Record the session with which the run can be resumed."""
    run = own(db, turn, owner)
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
        **(NO_FINGERPRINT if is_another else NO_FINDING),
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
    run = own(db, turn, owner)
    db.execute(
        "UPDATE interaction SET state = 'DELIVERED'"
        " WHERE run = ? AND no = ? AND state = 'ANSWERED'",
        (run.key, number),
    )


@use_case.retried
def record_undelivered(db: Database, turn: Turn, *, owner: Owner, number: int) -> None:
    """Record that a process ended without reading the reply to the question `number`."""
    run = own(db, turn, owner)
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
        number: the question's interaction_id. A question that is already recorded is left
            unchanged.
        due: the deadline of the wait.
    """
    run = own(db, turn, owner)
    if run.interaction_count >= number:
        return run
    ask(db, run, question, owner=owner, now=now, due=due)
    return runs.get_by_key(db, run.key)


@use_case.retried
def record_usage(db: Database, turn: Turn, *, owner: Owner, used: TurnUsage) -> None:
    """Record the usage so far of a turn under way. After the turn's end this changes nothing."""
    run = own(db, turn, owner)
    if not launch_records.is_over(db, turn.launch):
        usage.record(db, run, turn.launch, used, owner=owner)


@use_case.retried
def record_retry(db: Database, turn: Turn, *, owner: Owner, message: str, now: datetime) -> None:
    """Record the event that the agent is waiting to call its model again."""
    run = own(db, turn, owner)
    runs.change(db, run, owner=owner, now=now, event=RunEventKind.RETRYING)
    events.add_to_event(db, run, message=message)


def current_run(db: Database, turn: Turn, *, owner: Owner) -> Run:
    """Return the current run of a turn. Once the turn is over, a peer may have taken the run.

    The run is found by its run_id, the launch by its cookie. Both are unique, whereas a database
    that lost commits uses integer keys again.

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
    if run.owner == owner.instance or not launch_records.is_over(db, turn.launch):
        demand_owned(run, owner)
    return run


def own(db: Database, turn: Turn, owner: Owner) -> Run:
    """Return the current run of a turn, after a check that this start can change the run.

    Raises:
        RunGone, Fenced: as for `current_run`.
        RunQuarantined: the run is damaged.
    """
    run = current_run(db, turn, owner=owner)
    demand_owned(run, owner)
    if run.status is None:
        raise RunQuarantined(run.run_id)
    return run


def demand_owned(run: Run, owner: Owner) -> None:
    """Raise unless this start owns the run.

    Raises:
        RunGone: the store has lost this start's claim of the run.
        Fenced: the run belongs to a newer epoch.
    """
    if run.owner == owner.instance and run.owner_epoch < owner.epoch:
        raise RunGone(f"this start's claim of run {run.run_id!r}")
    if run.owner_epoch != owner.epoch or run.owner != owner.instance:
        raise Fenced(f"run {run.run_id!r}")


def ask(
    db: Database,
    run: Run,
    question: Question,
    *,
    owner: Owner,
    now: datetime,
    due: Due | None,
    mark: SessionFingerprint | None = None,
) -> None:
    """Record a question; the run becomes WAITING_USER. Arguments as for `record_end`."""
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
        **{**NO_FINDING, "session_mark": None if mark is None else str(mark)},
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


def fail(db: Database, run: Run, error: RunError, *, owner: Owner, now: datetime) -> None:
    """Make the run FAILED."""
    runs.change(
        db,
        run,
        owner=owner,
        now=now,
        status=RunStatus.FAILED,
        error_code=error.code,
        error_message=error.message,
    )
