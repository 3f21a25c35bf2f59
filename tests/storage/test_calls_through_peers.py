"""Replies, cancels and reopenings of runs that another instance on the same PostgreSQL owns."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.domain.errors import (
    EtagMismatch,
    Fenced,
    RunNotReopenable,
    RunOfAnotherInstance,
)
from runrecovery_service.domain.run import Profile, Run, RunEventKind, RunStatus
from runrecovery_service.domain.steady_time import DueKind, SteadyTime
from runrecovery_service.storage import events, instances, passed_deadlines, reopening, runs
from runrecovery_service.storage.database import Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.passed_deadlines import PassedDeadline
from storage.service_store import REOPEN_S, ServiceStore, boot, receipt


@pytest.fixture
def peer(shared: ServiceStore) -> Owner:
    """Another instance, through which callers reach the runs of `default`."""
    return instances.claim(shared.db, boot("peer"), now=shared.now)


def owned_by(store: ServiceStore, run: Run) -> tuple[str, int]:
    return store.column(run, "owner"), store.column(run, "owner_epoch")


# -- replies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "becomes"),
    [(Profile.RESUMABLE, RunStatus.QUEUED), (Profile.STICKY_PROCESS, RunStatus.RUNNING)],
)
def test_a_reply_through_a_peer_is_accepted_and_the_run_keeps_its_owner(
    shared: ServiceStore, peer: Owner, profile: Profile, becomes: RunStatus
) -> None:
    run = shared.waiting(profile=profile)

    answered = shared.reply(run, "yes", owner=peer)

    assert (answered.status, answered.version) == (becomes, run.version + 1)
    assert owned_by(shared, run) == ("default", 1)
    assert events.events_after(shared.db, answered, 0)[-1].kind is RunEventKind.ANSWERED


def test_the_owner_takes_the_reply_that_a_peer_has_accepted(
    shared: ServiceStore, peer: Owner
) -> None:
    run = shared.waiting()
    shared.reply(run, "yes", owner=peer)

    assert shared.take(owner=peer) is None
    turn = shared.take()

    assert turn is not None
    assert turn.reply is not None
    assert (turn.run.key, turn.reply.response) == (run.key, "yes")


def test_a_request_that_is_repeated_through_other_instances_has_one_effect(
    shared: ServiceStore, peer: Owner
) -> None:
    run = shared.waiting()
    first = shared.reply(run, "yes", owner=peer, receipt=receipt())

    again = shared.reply(run, "yes", receipt=receipt())

    assert again == first


def test_a_peer_refuses_an_old_etag(shared: ServiceStore, peer: Owner) -> None:
    run = shared.waiting()

    for call in (shared.reply, shared.cancel):
        with pytest.raises(EtagMismatch):
            call(run, owner=peer, etag="old")


def test_a_reply_to_a_run_of_a_dead_instance_waits_for_its_next_start(
    shared: ServiceStore, peer: Owner
) -> None:
    run = shared.waiting()
    shared.db.execute("UPDATE instance SET lease_until = 1 WHERE name = 'default'")

    shared.reply(run, "yes", owner=peer)
    shared.recover()
    turn = shared.take()

    assert turn is not None
    assert turn.reply is not None
    assert turn.reply.response == "yes"


# -- cancels ---------------------------------------------------------------------------------------


def test_a_cancel_through_a_peer_ends_a_run_without_a_process(
    shared: ServiceStore, peer: Owner
) -> None:
    waiting, queued = shared.waiting(), shared.create()

    ended = [shared.cancel(run, owner=peer).status for run in (waiting, queued)]

    assert ended == [RunStatus.CANCELED, RunStatus.CANCELED]
    assert [owned_by(shared, run) for run in (waiting, queued)] == [("default", 1)] * 2


@pytest.mark.parametrize("waits", [False, True])
def test_a_cancel_through_a_peer_leaves_the_process_to_its_owner(
    shared: ServiceStore, peer: Owner, *, waits: bool
) -> None:
    run = shared.waiting(profile=Profile.STICKY_PROCESS) if waits else shared.running().run

    accepted = shared.cancel(run, owner=peer)

    assert accepted.cancel_requested
    assert (accepted.status, owned_by(shared, run)) == (run.status, ("default", 1))


# -- fencing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [{"owner_epoch": 2}, {"owner": "successor"}])
def test_a_write_through_a_peer_checks_owner_and_epoch_of_the_row_that_was_read(
    shared: ServiceStore, peer: Owner, moved: dict[str, object]
) -> None:
    """A recovery moves a run to the next epoch without a new version."""
    read = shared.waiting()
    shared.set(read, **moved)
    before = shared.dump("run")

    with pytest.raises(Stale), shared.db.transaction():
        runs.change(
            shared.db,
            read,
            owner=peer,
            now=shared.now,
            status=RunStatus.QUEUED,
            by_caller=True,
        )

    assert before == shared.dump("run")


def test_a_superseded_peer_writes_no_run(shared: ServiceStore, peer: Owner) -> None:
    run, ended = shared.waiting(), lost(shared)
    instances.claim(shared.db, boot("peer"), now=shared.now)
    before = shared.dump("run", "interaction")
    shared.db.guard(lambda db: instances.demand_current(db, peer))

    for call in (shared.reply, shared.cancel):
        with pytest.raises(Fenced):
            call(run, owner=peer)
    with pytest.raises(Fenced):
        reopen(shared, ended, peer)

    assert before == shared.dump("run", "interaction")


def test_what_the_execution_writes_stays_with_the_owner(shared: ServiceStore, peer: Owner) -> None:
    run = shared.create()

    with pytest.raises(RunOfAnotherInstance, match="belongs to instance 'default'"):
        runs.change(shared.db, run, owner=peer, now=shared.now, status=RunStatus.RUNNING)


# -- reopening -------------------------------------------------------------------------------------

OTHER_HOST = SteadyTime("another boot", 17)
"""The steady clock of the peer's host, on which the owner's deadlines are not measured."""


def lost(store: ServiceStore, **changes: Any) -> Run:
    """Return a run that a restart failed because its session was lost."""
    run = store.waiting(**changes)
    store.set(run, session_verdict="INVALID")
    store.recover()
    return store.get(run)


def reopen(store: ServiceStore, run: Run, owner: Owner) -> Run:
    return reopening.reopen(
        store.db,
        run.run_id,
        handle=None,
        session_type_of=lambda _: "jsonl",
        wait_s_of=lambda _: 90.0,
        owner=owner,
        etag=None,
        receipt=None,
        due_in=lambda s: replace(store.due_in(s), clock=OTHER_HOST.clock, us=OTHER_HOST.us),
        steady=OTHER_HOST,
        now=store.tick(),
    )


def test_a_run_that_a_peer_reopens_stays_with_the_current_epoch_of_its_owner(
    shared: ServiceStore, peer: Owner
) -> None:
    run = lost(shared)
    shared.restart()

    back = reopen(shared, run, peer)
    shared.reply(back)

    assert back.status is RunStatus.WAITING_USER
    assert owned_by(shared, run) == ("default", 3)
    assert shared.take() is not None


def test_the_wall_clock_ends_the_window_for_a_reopening_through_a_peer(
    shared: ServiceStore, peer: Owner
) -> None:
    early, late = lost(shared), lost(shared)
    shared.step_wall_clock(timedelta(seconds=REOPEN_S - 60))
    assert reopen(shared, early, peer).status is RunStatus.WAITING_USER
    shared.step_wall_clock(timedelta(seconds=60))

    with pytest.raises(RunNotReopenable, match="the time in which it could be reopened is over"):
        reopen(shared, late, peer)


def test_the_owner_converts_the_deadlines_of_a_run_that_a_peer_has_reopened(
    shared: ServiceStore, peer: Owner
) -> None:
    run = lost(shared, require_user_reply=False, max_run_s=600.0)
    reopen(shared, run, peer)

    found = passed_deadlines.find(shared.db, shared.owner, steady=shared.steady, limit=9)
    assert found == [
        PassedDeadline(run.key, kind, is_of_clock=False) for kind in (DueKind.WAIT, DueKind.RUN)
    ]
    passed_deadlines.move_to_clock(shared.db, shared.owner, now=shared.now, steady=shared.steady)

    assert [shared.column(run, f"{kind}_due_us") for kind in ("wait", "run")] == [
        shared.steady.us + 90_000_000,
        shared.steady.us + 600_000_000,
    ]
    assert shared.column(run, "due_clock") == shared.steady.clock


def test_a_deadline_that_a_peer_has_set_is_not_carried_out_before_it_is_converted(
    shared: ServiceStore, peer: Owner
) -> None:
    run = reopen(shared, lost(shared, require_user_reply=False), peer)

    ended = passed_deadlines.end_wait(
        shared.db, run.key, owner=shared.owner, now=shared.now, steady=shared.steady
    )

    assert ended is None
    assert shared.get(run).status is RunStatus.WAITING_USER


def test_a_run_of_an_instance_that_the_database_does_not_know_is_not_reopened(
    shared: ServiceStore, peer: Owner
) -> None:
    run = lost(shared)
    shared.set(run, owner="gone")

    with pytest.raises(RunOfAnotherInstance, match="belongs to instance 'gone'"):
        reopen(shared, run, peer)
