"""Questions of runs: answer and list them."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from runrecovery_service.domain.errors import (
    FieldViolation,
    InteractionSuperseded,
    InvalidFields,
    RunNotWaiting,
    RunQuarantined,
)
from runrecovery_service.domain.permission import FORMS, parse_answer
from runrecovery_service.domain.run import (
    Interaction,
    InteractionState,
    JsonValue,
    Page,
    Profile,
    Run,
    RunEventKind,
    RunStatus,
)
from runrecovery_service.storage import requests, runs, tables, use_case
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.requests import Receipt
from runrecovery_service.storage.rows import (
    INTERACTION_COLUMNS,
    interaction_from_row,
    to_json,
    to_us,
)
from runrecovery_service.storage.statements import Statement, param

_I: Final = tables.Interaction

_FIND = Statement(
    lambda: _I.select(*INTERACTION_COLUMNS).where((_I.run == param("run")) & (_I.no == param("no")))
)


def find(db: Database, run_key: int, interaction_id: int) -> Interaction | None:
    """Return a question of a run, None if the run has not asked it."""
    row = _FIND.run(db, run=run_key, no=interaction_id).fetchone()
    return None if row is None else interaction_from_row(row)


@use_case.retried
def reply(
    db: Database,
    run_id: str,
    interaction_id: int,
    response: JsonValue,
    *,
    owner: Owner,
    etag: str | None,
    receipt: Receipt | None,
    now: datetime,
    caller: str | None = None,
) -> Run:
    """Accept the reply to the open question. An accepted reply is never lost.

    A resumable run becomes QUEUED for its next turn. A sticky run becomes RUNNING. If the same
    reply is already recorded, the run is returned unchanged. The reply is announced again, because
    the turn may have missed it. On PostgreSQL the run can belong to another instance, which then
    passes the reply to the agent.

    Raises:
        RunNotFound, RunNotWaiting, InteractionSuperseded, RunQuarantined, EtagMismatch,
        RequestIdReused.
        InvalidFields: the open question asks for a permission, and the response says neither yes
            nor no.
    """
    earlier = requests.find_effect(db, receipt)
    if earlier is not None:
        db.mark_changed(earlier)
        return runs.get_by_key(db, earlier)
    run = runs.get(db, run_id)
    if not _is_already_answered(db, run, interaction_id, response):
        _demand_open(run, interaction_id)
        runs.demand_etag(run, etag)
        _demand_answer(run, response)
        accept(db, run, response, owner=owner, now=now, caller=caller, by_caller=True)
    requests.record_effect(db, receipt, run_key=run.key, now=now)
    db.mark_changed(run.key)
    return runs.get_by_key(db, run.key)


def _is_already_answered(db: Database, run: Run, interaction_id: int, response: JsonValue) -> bool:
    """Return whether this reply was accepted before. Raise if another reply was."""
    asked = find(db, run.key, interaction_id)
    if asked is None or asked.replied_at is None:
        return False
    if to_json(asked.response) != to_json(response):
        raise InteractionSuperseded(run.run_id)
    return True


def _demand_open(run: Run, interaction_id: int) -> None:
    if run.status is None:
        raise RunQuarantined(run.run_id)
    if run.status is not RunStatus.WAITING_USER or run.pending is None or run.cancel_requested:
        raise RunNotWaiting(run.run_id)
    if run.pending.interaction_id != interaction_id:
        raise InteractionSuperseded(run.run_id)


def _demand_answer(run: Run, response: JsonValue) -> None:
    """Raise InvalidFields if the response to a permission question is neither yes nor no."""
    asks = run.pending is not None and run.pending.tool_call is not None
    if asks and parse_answer(response) is None:
        raise InvalidFields((FieldViolation("response", FORMS),))


def accept(
    db: Database,
    run: Run,
    response: JsonValue,
    *,
    owner: Owner,
    now: datetime,
    auto_decided: bool = False,
    caller: str | None = None,
    by_caller: bool = False,
) -> None:
    """Record the reply to the open question of a waiting run, in the caller's transaction.

    Args:
        auto_decided: whether the service itself replies, because the deadline has passed.
        caller: the name of the replying caller; None: it has no name.
        by_caller: see `runs.change`.
    """
    resumable = run.profile is Profile.RESUMABLE
    runs.change(
        db,
        run,
        owner=owner,
        now=now,
        status=RunStatus.QUEUED if resumable else RunStatus.RUNNING,
        event=RunEventKind.AUTO_DECIDED if auto_decided else RunEventKind.ANSWERED,
        about=run.interaction_count,
        caller=caller,
        by_caller=by_caller,
        queued_at=to_us(now),
        resume_count=0,
        auto_decided_count=run.auto_decided_count + auto_decided,
    )
    answered = db.execute(
        "UPDATE interaction SET state = ?, response = ?, replied_at = ?, auto_decided = ?,"
        " replied_by = ?"
        " WHERE run = ? AND no = ? AND state = 'OPEN'",
        (
            InteractionState.ANSWERED.value,
            to_json(response),
            to_us(now),
            int(auto_decided),
            caller,
            run.key,
            run.interaction_count,
        ),
    ).rowcount
    if answered != 1:
        raise Stale


def page(
    db: Database, run_id: str, *, after: tuple[int, ...] | None, limit: int
) -> Page[Interaction]:
    """Return a page of the run's questions, oldest first.

    Raises:
        RunNotFound: there is no such run.
    """
    run = runs.get(db, run_id)
    query = _I.select(*INTERACTION_COLUMNS).where(
        (_I.run == run.key) & (_I.no > (after[0] if after else 0))
    )
    return use_case.page_of(
        db.peewee.execute(query.order_by(_I.no).limit(limit + 1)),
        limit,
        decode=interaction_from_row,
        key=lambda row: (row[0],),
    )
