"""Starts of turns: takes runs from the queue, and returns runs to the queue."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from runrecovery_service.domain.errors import RunQuarantined
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Run,
    RunError,
    RunEventKind,
    RunStatus,
)
from runrecovery_service.domain.steady_time import DueIn, SteadyTime
from runrecovery_service.storage import (
    interactions,
    interruptions,
    launch_records,
    runs,
    turns,
    usage,
    use_case,
)
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.queue_order import latest_entry, next_in_queue
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.turns import Turn


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
    without: Collection[int] = (),
) -> Turn | None:
    """Take the run that has been queued longest; return None if no run can be taken.

    The run becomes RUNNING, and its launch is recorded before the process is spawned. The first
    launch starts the deadline of the whole run. A run whose deadline has passed is not taken. A run
    whose budget is used up becomes FAILED.

    Args:
        busy_engines: engines without a free slot, whose runs are not taken.
        without: the keys of runs that are not taken.
    """
    while (found := next_in_queue(db, owner, busy_engines, steady, without)) is not None:
        key, queued_at = found
        run = runs.get_by_key(db, key)
        if run.status is not RunStatus.QUEUED:
            raise Stale
        used_up = run.budget.why_used_up(run.usage)
        if used_up is None:
            entered = latest_entry(run, queued_at)
            return _take(db, run, owner=owner, site=site, due_in=due_in, queued_at=entered, now=now)
        error = RunError(code=ErrorCode.BUDGET_EXCEEDED, message=used_up)
        turns.fail(db, run, error, owner=owner, now=now)
    return None


def _take(
    db: Database,
    run: Run,
    *,
    owner: Owner,
    site: LaunchSite,
    due_in: DueIn,
    queued_at: datetime,
    now: datetime,
) -> Turn:
    last = interactions.find(db, run.key, run.interaction_count)
    reply = last if last is not None and last.state is InteractionState.ANSWERED else None
    interruption = interruptions.pending(db, run, last) if reply is None else None
    columns: dict[str, object] = {"turn": run.turn + 1, "resume_at": None}
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
        **turns.NO_FINGERPRINT,
    }


@use_case.retried
def requeue_unlaunched(db: Database, *, owner: Owner, held: Collection[str], now: datetime) -> int:
    """Return runs to the queue that were taken by a commit whose answer was lost.

    Args:
        held: the cookies of the launches that have a supervisor. Every other launch in state INTENT
            is deleted, and its run is queued again, or becomes CANCELED if a cancel was accepted.

    Returns:
        The number of runs that were returned to the queue or canceled.
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
        turns.demand_owned(run, owner)
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
