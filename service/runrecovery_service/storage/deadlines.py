"""Deadlines of runs: found when they have passed, and carried out.

They are gone by on a clock that runs steadily from the machine's boot; see `domain.deadline`. At a
start, deadlines by another clock (the machine was booted since, or is another one) are brought
onto the one that runs now, by what the wall clock says is left of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runrecovery_service.domain.deadline import DueKind, SteadyTime
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import ErrorCode, Profile, Run, RunStatus
from runrecovery_service.domain.turn import RUN_TIMEOUT
from runrecovery_service.storage import instances, interactions, runs, use_case
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import to_us

RUNS_PER_COMMIT: Final = 1000
_COLUMNS: Final = {
    DueKind.WAIT: "wait_due_us",
    DueKind.RUN: "run_due_us",
    DueKind.REOPEN: "reopen_due_us",
}
_WALL: Final = {
    DueKind.WAIT: "(SELECT i.wait_deadline_at FROM interaction i"
    " WHERE i.run = run.id AND i.no = run.interaction_count)",
    DueKind.RUN: "run_deadline_at",
    DueKind.REOPEN: "reopenable_until",
}


@dataclass(frozen=True, slots=True)
class PassedDeadline:
    """A deadline that has passed."""

    run_key: int
    kind: DueKind


def move_to_clock(db: Database, owner: Owner, *, now: datetime, steady: SteadyTime) -> int:
    """Bring deadlines by another clock onto the one that runs now, some at a time; return of how
    many runs. Until it is through nobody may set a deadline of these runs, or go by one."""
    offset_us = steady.us - to_us(now)
    moved = ", ".join(
        # Where the wall clock does not tell, the deadline has passed: better than never.
        f"{column} = CASE WHEN {column} IS NOT NULL THEN COALESCE({_WALL[kind]} + ?, 0) END"
        for kind, column in _COLUMNS.items()
    )
    count = 0
    while keys := _of_another_clock(db, owner, steady):
        marks = ", ".join("?" for _ in keys)
        with db.transaction():
            count += db.execute(
                f"UPDATE run SET {moved}, due_clock = ? WHERE owner = ? AND id IN ({marks})"
                " AND COALESCE(due_clock, '') <> ?",
                (
                    *(offset_us for _ in _COLUMNS),
                    steady.clock,
                    owner.instance,
                    *keys,
                    steady.clock,
                ),
            ).rowcount
    return count


def _of_another_clock(db: Database, owner: Owner, steady: SteadyTime) -> list[int]:
    for column in _COLUMNS.values():
        rows = db.fetch_all(
            f"SELECT id FROM run WHERE owner = ? AND {column} IS NOT NULL"
            f" AND COALESCE(due_clock, '') <> ? ORDER BY {column} LIMIT ?",
            (owner.instance, steady.clock, RUNS_PER_COMMIT),
        )
        if rows:
            return [key for (key,) in rows]
    return []


def passed_deadlines(
    db: Database, owner: Owner, *, steady: SteadyTime, limit: int
) -> list[PassedDeadline]:
    """Return what has passed of each kind, the longest ago first, at most `limit` of each."""
    found = []
    for kind, column in _COLUMNS.items():
        rows = db.fetch_all(
            f"SELECT id FROM run WHERE owner = ? AND {column} IS NOT NULL AND {column} <= ?"
            f" AND due_clock = ? ORDER BY {column} LIMIT ?",
            (owner.instance, steady.us, steady.clock, limit),
        )
        found += [PassedDeadline(run_key, kind) for (run_key,) in rows]
    return found


@use_case.retried
def end_wait(
    db: Database, run_key: int, *, owner: Owner, now: datetime, steady: SteadyTime
) -> Run | None:
    """Carry out the deadline of a wait.

    With an automatic decision the run goes on, as after a reply. Otherwise its question is closed,
    so that no answer is accepted from here on; the run fails once its process has been ended.

    Returns:
        The run: not WAITING_USER any more when it was decided for. None when there was nothing
        to carry out: an answer or a cancel was quicker.
    """
    run = runs.get_by_key(db, run_key)
    if not _has_passed(db, run, DueKind.WAIT, owner, steady):
        return None
    if run.status is not RunStatus.WAITING_USER or run.cancel_requested:
        _disarm(db, run, DueKind.WAIT, owner)
        return None
    if not run.require_user_reply and run.pending is not None:
        interactions.accept(db, run, None, owner=owner, now=now, auto_decided=True)
        return runs.get_by_key(db, run_key)
    if run.profile is not Profile.STICKY_PROCESS:
        _disarm(db, run, DueKind.WAIT, owner)
        return None
    # It stays armed until the run has ended: who asked may not have got this answer.
    if run.pending is not None:
        runs.change(db, run, owner=owner, now=now)  # a reply that is being accepted wins
        runs.close_questions(db, run)
    return runs.get_by_key(db, run_key)


@use_case.retried
def end_run(
    db: Database, run_key: int, *, owner: Owner, now: datetime, steady: SteadyTime
) -> Run | None:
    """Carry out the deadline of a whole run: FAILED at once where it has no process.

    Returns:
        The run; still alive when its process has to be ended first. None when there was nothing
        to carry out.
    """
    run = runs.get_by_key(db, run_key)
    if not _has_passed(db, run, DueKind.RUN, owner, steady):
        return None
    if run.status is None or run.status.is_terminal or run.cancel_requested:
        _disarm(db, run, DueKind.RUN, owner)
        return None
    if not run.holds_slot:
        runs.change(
            db,
            run,
            owner=owner,
            now=now,
            status=RunStatus.FAILED,
            error_code=ErrorCode.RUN_TIMEOUT.value,
            error_message=RUN_TIMEOUT,
        )
    return runs.get_by_key(db, run_key)


def end_reopening(
    db: Database, run_keys: Sequence[int], *, owner: Owner, steady: SteadyTime
) -> None:
    """Forget the sessions of runs that nobody has set back in their window."""
    marks = ", ".join("?" for _ in run_keys)
    with db.transaction():
        instances.demand_current(db, owner)
        db.execute(
            "UPDATE run SET reopen_due_us = NULL, retired_type = NULL, retired_value = NULL"
            f" WHERE owner = ? AND due_clock = ? AND reopen_due_us <= ? AND id IN ({marks})",
            (owner.instance, steady.clock, steady.us, *run_keys),
        )


def _has_passed(db: Database, run: Run, kind: DueKind, owner: Owner, steady: SteadyTime) -> bool:
    """Look again, in the transaction that carries it out."""
    column = _COLUMNS[kind]
    row = db.fetch_one(
        f"SELECT 1 FROM run WHERE id = ? AND owner = ? AND due_clock = ? AND {column} <= ?",
        (run.key, owner.instance, steady.clock, steady.us),
    )
    return row is not None


def _disarm(db: Database, run: Run, kind: DueKind, owner: Owner) -> None:
    """Forget a deadline that is nobody's any more, if the run is still what was read."""
    if run.owner_epoch > owner.epoch or run.owner != owner.instance:
        raise Fenced(f"run {run.run_id!r}")
    db.execute(
        f"UPDATE run SET {_COLUMNS[kind]} = NULL"
        " WHERE id = ? AND owner = ? AND owner_epoch = ? AND version = ?",
        (run.key, owner.instance, run.owner_epoch, run.version),
    )
