"""Use cases of runs (create, read, list, cancel), and the compare-and-set that changes a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from itertools import chain
from typing import Final, NamedTuple

import peewee as pw

from runrecovery_service.domain.errors import (
    EtagMismatch,
    Fenced,
    RunAlreadyExists,
    RunAlreadyTerminal,
    RunNotFound,
    RunOfAnotherInstance,
    RunQuarantined,
)
from runrecovery_service.domain.run import (
    InteractionState,
    NewRun,
    Page,
    RecoveryState,
    Run,
    RunEventKind,
    RunStatus,
    View,
)
from runrecovery_service.domain.transitions import is_legal
from runrecovery_service.storage import (
    events,
    instances,
    requests,
    tables,
    use_case,
)
from runrecovery_service.storage.database import Database, Row, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.queue_room import demand_room
from runrecovery_service.storage.requests import Receipt
from runrecovery_service.storage.rows import (
    INTERACTION_COLUMNS,
    LARGE_COLUMNS,
    RECOVERY_COLUMNS,
    RUN_COLUMNS,
    run_from_row,
    seconds_from_us,
    to_json,
    to_us,
)
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.statements import Statement, param
from runrecovery_service.storage.use_case import retried

_R = tables.Run

# -- reading -----------------------------------------------------------------------------------


_LEFT_OUT: Final = {
    View.FULL: {},
    View.BASIC: {
        "input": "NULL", "output": "NULL", "prompt": "''", "options": "'[]'", "tool_call": "NULL"
    },
}  # fmt: skip
"""The columns that each view does not read, and the SQL in their place."""


def select(view: View = View.FULL) -> pw.ModelSelect[tables.Run]:
    """Return a query for runs with their open question and their latest decision."""
    question, event, report = tables.Interaction, tables.RecoveryEvent, tables.Reconciliation
    left_out = _LEFT_OUT[view]
    columns = (
        pw.SQL(left_out[column.name]) if column.name in left_out else column
        for column in (*RUN_COLUMNS, *INTERACTION_COLUMNS, *RECOVERY_COLUMNS)
    )
    return (
        _R.select(*columns)
        .join(
            question,
            pw.JOIN.LEFT_OUTER,
            on=(
                (question.run == _R.id)
                & (question.no == _R.interaction_count)
                & (question.state == InteractionState.OPEN.value)
            ),
        )
        .join_from(
            _R,
            event,
            pw.JOIN.LEFT_OUTER,
            on=((event.run == _R.id) & (event.no == _R.recovery_count)),
        )
        .join_from(event, report, pw.JOIN.LEFT_OUTER, on=(report.id == event.reconciliation))
    )


_BY_RUN_ID = Statement(lambda: select().where(_R.run_id == param("run_id")))
_BY_KEY = Statement(lambda: select().where(_R.id == param("key")))


def get(db: Database, run_id: str) -> Run:
    """Return the run with this id.

    Raises:
        RunNotFound: there is no such run.
    """
    row = _BY_RUN_ID.run(db, run_id=run_id).fetchone()
    if row is None:
        raise RunNotFound(run_id)
    return run_from_row(row)


def get_by_key(db: Database, key: int) -> Run:
    """Return the run with this key."""
    row = _BY_KEY.run(db, key=key).fetchone()
    if row is None:
        raise RunNotFound(f"#{key}")
    return run_from_row(row)


class RunProgress(NamedTuple):
    """Two counters of a run: `version` rises with each change, `event_count` with each event."""

    version: int
    event_count: int


_PROGRESS = Statement(lambda: _R.select(_R.version, _R.event_count).where(_R.id == param("key")))


def progress(db: Database, key: int) -> RunProgress | None:
    """Return the counters of a run; None if the run does not exist."""
    row = _PROGRESS.run(db, key=key).fetchone()
    return None if row is None else RunProgress(*row)


def page_of(
    db: Database,
    queries: Iterable[pw.ModelSelect[tables.Run]],
    limit: int,
    key: Callable[[Row], tuple[int, ...]],
) -> Page[Run]:
    """Return a page of the rows of several queries that are built on `select()`.

    A query runs only if the queries before it did not fill the page.

    Args:
        key: returns the position of a row, from which the next page continues.
    """
    rows = chain.from_iterable(db.peewee.execute(query.limit(limit + 1)) for query in queries)
    return use_case.page_of(
        rows,
        limit,
        decode=run_from_row,
        key=key,
        texts=lambda row: (row[at] for at in LARGE_COLUMNS),
    )


# -- creating ----------------------------------------------------------------------------------

_INSERT = Statement(
    lambda: (
        _R.insert(
            {
                _R.run_id: param("run_id"),
                _R.engine: param("engine"),
                _R.labels: param("labels"),
                _R.input: param("input"),
                _R.status: RunStatus.QUEUED.value,
                _R.profile: param("profile"),
                _R.restart_policy: param("restart_policy"),
                _R.max_attempts: param("max_attempts"),
                _R.session_timeout_us: param("session_timeout_us"),
                _R.require_user_reply: param("require_user_reply"),
                _R.max_run_us: param("max_run_us"),
                _R.max_resumes: param("max_resumes"),
                _R.max_tokens: param("max_tokens"),
                _R.max_cost_nanos: param("max_cost_nanos"),
                _R.attempt: 0,
                _R.turn: 0,
                _R.interaction_count: 0,
                _R.owner: param("owner"),
                _R.owner_epoch: param("epoch"),
                _R.version: 1,
                _R.queued_at: param("now"),
                _R.created_at: param("now"),
                _R.updated_at: param("now"),
                _R.recovery_state: RecoveryState.NONE.value,
                _R.recovery_count: 0,
                _R.event_count: 1,
                _R.auto_decided_count: 0,
                _R.created_by: param("created_by"),
                _R.traceparent: param("traceparent"),
            }
        )
        .on_conflict_ignore()
        .returning(_R.id)
    )
)


_LABEL = Statement(
    lambda: tables.RunLabel.insert(
        {
            tables.RunLabel.key: param("key"),
            tables.RunLabel.value: param("value"),
            tables.RunLabel.run: param("run"),
        }
    )
)


@retried
def create(
    db: Database,
    new: NewRun,
    *,
    owner: Owner,
    max_queued: int,
    receipt: Receipt | None,
    now: datetime,
) -> Run:
    """Create a QUEUED run. If the receipt is already recorded, return the run it names instead.

    Raises:
        RunAlreadyExists: another request has created a run with this id.
        RequestIdReused: the receipt belongs to another request.
        Overloaded: `max_queued` runs are queued already.
    """
    earlier = requests.find_effect(db, receipt)
    if earlier is not None:
        return get_by_key(db, earlier)
    instances.demand_checked(db, owner)
    demand_room(db, owner, max_queued)
    row = _INSERT.run(
        db,
        run_id=new.run_id,
        engine=new.engine,
        labels=to_json(dict(new.labels)),
        input=to_json(new.input),
        profile=new.profile.value,
        restart_policy=new.restart_policy.value,
        max_attempts=new.max_attempts,
        session_timeout_us=_us(new.session_timeout_s),
        require_user_reply=int(new.require_user_reply),
        max_run_us=_us(new.max_run_s),
        max_resumes=new.max_resumes,
        max_tokens=new.budget.max_tokens,
        max_cost_nanos=new.budget.max_cost_nanos,
        created_by=new.created_by,
        traceparent=new.traceparent,
        owner=owner.instance,
        epoch=owner.epoch,
        now=to_us(now),
    ).fetchone()
    if row is None:
        if requests.find_effect(db, receipt) is not None:  # the same request arrived twice
            raise Stale
        raise RunAlreadyExists(new.run_id)
    run = _created(row[0], new, owner, now)
    for key, value in new.labels.items():
        _LABEL.run(db, key=key, value=value, run=run.key)
    requests.record_effect(db, receipt, run_key=run.key, now=now)
    db.mark_changed(run.key)
    return run


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)


def _created(key: int, new: NewRun, owner: Owner, now: datetime) -> Run:
    """Return the run that `_INSERT` has just added, as `get` would, but without reading it."""
    return Run(
        key=key,
        run_id=new.run_id,
        engine=new.engine,
        labels=new.labels,
        status=RunStatus.QUEUED,
        profile=new.profile,
        restart_policy=new.restart_policy,
        max_attempts=new.max_attempts,
        session_timeout_s=seconds_from_us(_us(new.session_timeout_s)),
        require_user_reply=new.require_user_reply,
        max_run_s=seconds_from_us(_us(new.max_run_s)),
        max_resumes=new.max_resumes,
        budget=new.budget,
        input=new.input,
        output=None,
        error=None,
        pending=None,
        session=None,
        interaction_count=0,
        attempt=0,
        turn=0,
        cancel_requested=False,
        recovery=None,
        owner=owner.instance,
        owner_epoch=owner.epoch,
        version=1,
        created_at=now,
        started_at=None,
        updated_at=now,
        ended_at=None,
        created_by=new.created_by,
        traceparent=new.traceparent,
    )


# -- changing ----------------------------------------------------------------------------------


def change(
    db: Database,
    run: Run,
    *,
    owner: Owner,
    now: datetime,
    status: RunStatus | None = None,
    event: RunEventKind | None = None,
    about: int = 0,
    caller: object = None,
    by_caller: object = False,
    **columns: object,
) -> None:
    """Change columns of a run, if the row has not changed since this transaction read it.

    All changes of runs use this function, except those by recovery and ReopenRun. A terminal status
    also clears the run's session, open question and deadlines.

    Args:
        run: the run as this transaction has read it.
        status: the new status; None: keep the status.
        event: the event to record; None: the event of the new status, if there is one.
        about: the interaction_id that the event is about.
        caller: the name of the caller that causes the event; None: no named caller does.
        by_caller: whether a caller requests the change. On PostgreSQL the run can then belong to
            another instance, which keeps it.

    Raises:
        Stale: the row has changed meanwhile; `retried` then repeats the use case.
        RunOfAnotherInstance, Fenced: this epoch may not write the run; see `demand_own`.
    """
    if not (by_caller and is_of_peer(db, run, owner)):
        demand_own(run, owner)
    if run.status is None:
        raise RunQuarantined(run.run_id)
    if status is not None:
        # Only recovery may write the same status again. Here the write would be a repetition.
        if status is run.status or not is_legal(run.status, status):
            raise ValueError(f"{run.status} may not become {status}")
        columns |= _entered(run.status, status, now)
        event = event or RunEventKind(status)
    if event is not None:
        columns["event_count"] = run.event_count + 1
    columns |= {"updated_at": to_us(now), "version": run.version + 1}
    _compare_and_set(db, run, run.status, columns)
    if event is not None:
        events.record_event(
            db,
            run,
            kind=event,
            status=status or run.status,
            attempt=columns.get("attempt", run.attempt),
            interaction_id=about,
            error_code=columns.get("error_code"),
            caller=caller,
            now=now,
        )
    if status is not None and status.is_terminal:
        # After the run's row, as in a reply: the same order of locks everywhere excludes deadlocks.
        close_questions(db, run)


def _compare_and_set(
    db: Database, run: Run, status: RunStatus, columns: Mapping[str, object]
) -> None:
    # The comparison includes owner and epoch, because a recovery or takeover may change them
    # without a new version.
    assignments = ", ".join(f"{name} = ?" for name in columns)
    changed = db.execute(
        f"UPDATE run SET {assignments}"
        " WHERE id = ? AND owner = ? AND owner_epoch = ? AND status = ? AND version = ?",
        (
            *columns.values(),
            run.key,
            run.owner,
            run.owner_epoch,
            status.value,
            run.version,
        ),
    ).rowcount
    if changed != 1:
        raise Stale
    db.mark_changed(run.key)


def is_of_peer(db: Database, run: Run, owner: Owner) -> bool:
    """Return whether another instance on the same PostgreSQL database owns the run."""
    return db.dialect.kind is DatabaseKind.POSTGRESQL and run.owner != owner.instance


def demand_own(run: Run, owner: Owner) -> None:
    """Raise if this epoch may not write the run.

    Raises:
        RunOfAnotherInstance: another instance on the same database owns the run.
        Fenced: the run belongs to a newer epoch.
    """
    if run.owner != owner.instance:
        raise RunOfAnotherInstance(run.run_id, run.owner)
    if run.owner_epoch > owner.epoch:
        raise Fenced(f"run {run.run_id!r}")


def _entered(before: RunStatus, status: RunStatus, now: datetime) -> dict[str, object]:
    """Return the columns that every change to this status sets."""
    columns: dict[str, object] = {"status": status.value}
    if before is RunStatus.WAITING_USER:
        columns["wait_due_us"] = None
    if status.is_terminal:
        columns |= {"ended_at": to_us(now), "session_type": None, "session_value": None}
        columns |= {"run_due_us": None, "resume_due_us": None, "resume_at": None}
    return columns


def close_questions(db: Database, run: Run) -> None:
    """Close the run's questions, except those whose reply a process has received."""
    db.execute(
        "UPDATE interaction SET state = 'CLOSED' WHERE run = ? AND state IN ('OPEN', 'ANSWERED')",
        (run.key,),
    )


def demand_etag(run: Run, etag: str | None) -> None:
    """Raise EtagMismatch if the caller has seen another version of the run."""
    if etag and etag != run.etag:
        raise EtagMismatch(run.run_id, run.etag)


@retried
def cancel(
    db: Database,
    run_id: str,
    *,
    owner: Owner,
    etag: str | None,
    receipt: Receipt | None,
    now: datetime,
    caller: str | None = None,
) -> Run:
    """Accept the cancel of a run. Idempotent.

    A run without a process becomes CANCELED at once. A run with a process becomes CANCELED when the
    process has ended. A repeated cancel is announced again, because the turn may have missed the
    first. On PostgreSQL the run can belong to another instance, which then ends the process.

    Raises:
        RunNotFound, RunAlreadyTerminal, RunQuarantined, EtagMismatch, RequestIdReused.
    """
    earlier = requests.find_effect(db, receipt)
    if earlier is not None:
        db.mark_changed(earlier)
        return get_by_key(db, earlier)
    run = get(db, run_id)
    if run.status is None:
        raise RunQuarantined(run_id)
    if run.status is not RunStatus.CANCELED and run.status.is_terminal:
        raise RunAlreadyTerminal(run_id)
    if run.status is not RunStatus.CANCELED and not run.cancel_requested:
        demand_etag(run, etag)
        has_process = run.holds_slot
        change(
            db,
            run,
            owner=owner,
            now=now,
            status=None if has_process else RunStatus.CANCELED,
            event=RunEventKind.CANCEL_REQUESTED if has_process else RunEventKind.CANCELED,
            caller=caller,
            by_caller=True,
            cancel_requested_at=to_us(now),
            canceled_by=caller,
        )
    requests.record_effect(db, receipt, run_key=run.key, now=now)
    db.mark_changed(run.key)
    return get_by_key(db, run.key)
