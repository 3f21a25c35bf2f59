"""Finds the deadlines of runs that have passed, and applies them.

Deadlines are measured on the steady clock of one boot of the machine (`domain.steady_time`). After
a reboot, or on another machine, a start converts them to the current clock. The conversion keeps
the time that is left by the wall clock. A peer that sets a deadline for another instance's run
cannot know the owner's clock, and leaves it out. The owner converts the deadline when it finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from runrecovery_service.domain.resume_backoff import LONGEST_DELAY_S
from runrecovery_service.domain.run import ErrorCode, Profile, Run, RunStatus
from runrecovery_service.domain.steady_time import DueKind, SteadyTime
from runrecovery_service.domain.turn import RUN_TIMEOUT
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import instances, interactions, runs, use_case
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import to_us

RUNS_PER_COMMIT: Final = 1000
_COLUMNS: Final = {
    DueKind.WAIT: "wait_due_us",
    DueKind.RUN: "run_due_us",
    DueKind.REOPEN: "reopen_due_us",
    DueKind.RESUME: "resume_due_us",
}
_WALL: Final = {
    DueKind.WAIT: "(SELECT i.wait_deadline_at FROM interaction i"
    " WHERE i.run = run.id AND i.no = run.interaction_count)",
    DueKind.RUN: "run_deadline_at",
    DueKind.REOPEN: "reopenable_until",
    DueKind.RESUME: "resume_at",
}


DUE_COLUMNS: Final = tuple(_COLUMNS.values())
"""The columns of deadlines.

An instance that sets a deadline in a run of another instance does not know the clock of the run's
owner. It writes 0 into the column of the deadline, and no `due_clock`. The owner then converts the
deadline.
"""


@dataclass(frozen=True, slots=True)
class PassedDeadline:
    """A deadline that has passed.

    Attributes:
        is_of_clock: whether the deadline is a time of the current clock. If not, it must be
            converted before it is applied.
    """

    run_key: int
    kind: DueKind
    is_of_clock: bool = True


def without_clock(columns: Mapping[str, object]) -> dict[str, object]:
    """Return these columns without a clock: the run's owner then converts the deadlines."""
    due = {name: 0 for name in DUE_COLUMNS if columns.get(name) is not None}
    return {**due, "due_clock": None}


def move_to_clock(db: Database, owner: Owner, *, now: datetime, steady: SteadyTime) -> int:
    """Convert deadlines of other clocks to the current clock, and return the number of runs.

    This takes several transactions. A deadline takes effect only after its conversion.
    """
    count = 0
    while keys := _of_another_clock(db, owner, steady):
        marks = ", ".join("?" for _ in keys)
        with db.transaction():
            count += _move(db, owner, f"id IN ({marks})", tuple(keys), now=now, steady=steady)
    with db.transaction():
        _limit_pauses(db, owner, "1 = 1", (), steady=steady)
    return count


def move_range(
    db: Database, owner: Owner, *, first: int, last: int, now: datetime, steady: SteadyTime
) -> None:
    """Convert the deadlines of a range of runs, in the caller's transaction."""
    which, keys = "id BETWEEN ? AND ?", (first, last)
    _move(db, owner, which, keys, now=now, steady=steady)
    _limit_pauses(db, owner, which, keys, steady=steady)


def _move(
    db: Database,
    owner: Owner,
    which: str,
    params: tuple[object, ...],
    *,
    now: datetime,
    steady: SteadyTime,
) -> int:
    offset_us = steady.us - to_us(now)
    moved = ", ".join(
        # A deadline without a wall-clock time counts as passed; otherwise it would never pass.
        f"{column} = CASE WHEN {column} IS NOT NULL THEN COALESCE({_WALL[kind]} + ?, 0) END"
        for kind, column in _COLUMNS.items()
    )
    # With OR, PostgreSQL would read all deadlines of the owner by their indexes.
    some = f"COALESCE({', '.join(_COLUMNS.values())}) IS NOT NULL"
    count: int = db.execute(
        f"UPDATE run SET {moved}, due_clock = ? WHERE owner = ? AND {which} AND {some}"
        " AND COALESCE(due_clock, '') <> ?",
        (
            *(offset_us for _ in _COLUMNS),
            steady.clock,
            owner.instance,
            *params,
            steady.clock,
        ),
    ).rowcount
    return count


def _limit_pauses(
    db: Database, owner: Owner, which: str, params: tuple[object, ...], *, steady: SteadyTime
) -> None:
    """Shorten pauses that have become too long because the wall clock was set back."""
    longest_us = steady.us + round(LONGEST_DELAY_S * 1e6)
    db.execute(
        f"UPDATE run SET resume_due_us = ? WHERE owner = ? AND {which} AND resume_due_us > ?",
        (longest_us, owner.instance, *params, longest_us),
    )


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


_PASSED: Final = " UNION ALL ".join(
    f"SELECT * FROM (SELECT '{kind.value}', id, due_clock FROM run"
    f" WHERE owner = ? AND {column} IS NOT NULL AND {column} <= ?"
    f" ORDER BY {column} LIMIT ?) AS {kind.name.lower()}_passed"
    for kind, column in _COLUMNS.items()
)


def find(db: Database, owner: Owner, *, steady: SteadyTime, limit: int) -> list[PassedDeadline]:
    """Return at most `limit` passed deadlines of each kind, each kind in order of time.

    Deadlines of another clock are included (`is_of_clock` is False), even if they have not passed.
    """
    rows = db.fetch_all(_PASSED, (owner.instance, steady.us, limit) * len(_COLUMNS))
    return [
        PassedDeadline(run_key, DueKind(kind), is_of_clock=clock == steady.clock)
        for kind, run_key, clock in rows
    ]


@use_case.retried
def end_wait(
    db: Database, run_key: int, *, owner: Owner, now: datetime, steady: SteadyTime
) -> Run | None:
    """Apply the passed deadline of a wait for a reply.

    A run with an automatic decision continues as after a reply. Otherwise the question is closed,
    so that no reply is accepted any more. The run fails when its process has ended.

    Returns:
        The run. After an automatic decision it is no longer WAITING_USER. None when a reply or a
        cancel was accepted first.
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
    # The deadline stays recorded until the run has ended, because the answer to this commit may be
    # lost.
    if run.pending is not None:
        runs.change(db, run, owner=owner, now=now)  # fails if a reply was committed first
        runs.close_questions(db, run)
    return runs.get_by_key(db, run_key)


@use_case.retried
def end_run(
    db: Database, run_key: int, *, owner: Owner, now: datetime, steady: SteadyTime
) -> Run | None:
    """Apply the passed deadline of a whole run. A run without a process fails at once.

    Returns:
        The run, which is not yet terminal if its process must be killed first. None if the run had
            already ended or was canceled before.
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
    """Delete the kept sessions of runs whose window for ReopenRun has passed."""
    marks = ", ".join("?" for _ in run_keys)
    with db.transaction():
        instances.demand_current(db, owner)
        db.execute(
            "UPDATE run SET reopen_due_us = NULL, retired_type = NULL, retired_value = NULL"
            f" WHERE owner = ? AND due_clock = ? AND reopen_due_us <= ? AND id IN ({marks})",
            (owner.instance, steady.clock, steady.us, *run_keys),
        )


def end_pauses(db: Database, run_keys: Sequence[int], *, owner: Owner, steady: SteadyTime) -> None:
    """Release interrupted runs whose pause has passed, so that they can be resumed."""
    marks = ", ".join("?" for _ in run_keys)
    with db.transaction():
        instances.demand_current(db, owner)
        db.execute(
            "UPDATE run SET resume_due_us = NULL"
            f" WHERE owner = ? AND due_clock = ? AND resume_due_us <= ? AND id IN ({marks})",
            (owner.instance, steady.clock, steady.us, *run_keys),
        )
        for run_key in run_keys:
            db.mark_changed(run_key)


def _has_passed(db: Database, run: Run, kind: DueKind, owner: Owner, steady: SteadyTime) -> bool:
    """Return whether the deadline has passed. Called in the transaction that applies it."""
    column = _COLUMNS[kind]
    row = db.fetch_one(
        f"SELECT 1 FROM run WHERE id = ? AND owner = ? AND due_clock = ? AND {column} <= ?",
        (run.key, owner.instance, steady.clock, steady.us),
    )
    return row is not None


def _disarm(db: Database, run: Run, kind: DueKind, owner: Owner) -> None:
    """Delete a deadline that no longer applies, if the run has not changed since it was read."""
    runs.demand_own(run, owner)
    db.execute(
        f"UPDATE run SET {_COLUMNS[kind]} = NULL"
        " WHERE id = ? AND owner = ? AND owner_epoch = ? AND version = ?",
        (run.key, owner.instance, run.owner_epoch, run.version),
    )
