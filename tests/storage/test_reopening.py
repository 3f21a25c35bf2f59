"""Setting a run back: only what a recovery failed for want of its session, and only in time."""

from __future__ import annotations

from typing import Any

import pytest
from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.errors import (
    EtagMismatch,
    RequestIdReused,
    RunNotReopenable,
    RunQuarantined,
    SessionNotResumable,
)
from runrecovery_service.domain.run import RecoveryState, Run, RunStatus
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import deadlines, decisions, interactions, reopening

from .conftest import REOPEN_S, World, receipt


def reopen(world: World, run: Run, handle: str | None = None, **changes: Any) -> Run:
    given: dict[str, Any] = {
        "session_type": lambda _: "jsonl", "owner": world.owner, "etag": None, "receipt": None,
        "due_in": world.due_in, "steady": world.steady, "now": world.tick(),
    } | changes  # fmt: skip
    return reopening.reopen(world.db, run.run_id, handle=handle, **given)


def lost(world: World, *, replied: bool = False, **changes: Any) -> Run:
    """A run that a restart failed because its session was lost."""
    run = world.waiting(**changes)
    if replied:
        world.reply(run, "accepted")
    world.set(run, session_verdict="INVALID")
    world.recover()
    failed = world.get(run)
    assert failed.status is RunStatus.FAILED
    assert failed.session is None
    return failed


def test_a_failed_wait_waits_again_with_its_question(world: World) -> None:
    run = lost(world)

    back = reopen(world, run)

    assert back.status is RunStatus.WAITING_USER
    assert back.pending is not None
    assert back.pending.interaction_id == 1
    assert (back.error, back.ended_at, back.reopenable_until) == (None, None, None)
    assert back.session is not None
    assert (back.session.handle, back.session.turn) == ("secret", 1)


def test_it_goes_on_as_if_nothing_had_happened(world: World) -> None:
    run = lost(world)
    reopen(world, run)
    world.reply(run, "yes")
    turn = world.take()
    assert turn is not None
    assert turn.reply is not None
    assert turn.reply.response == "yes"

    assert world.end(turn, Succeeded({"done": True})).status is RunStatus.SUCCEEDED


def test_an_accepted_reply_is_not_lost_with_the_session(world: World) -> None:
    run = lost(world, replied=True)

    back = reopen(world, run)
    turn = world.take()

    assert back.status is RunStatus.QUEUED
    assert turn is not None
    assert turn.reply is not None
    assert (turn.reply.response, turn.run.key) == ("accepted", run.key)


def test_another_handle_takes_the_place_of_the_lost_one(world: World) -> None:
    back = reopen(world, lost(world), "newer")

    assert back.session is not None
    assert back.session.handle == "newer"


def test_the_mark_of_a_session_file_stays_with_its_own_handle_alone(world: World) -> None:
    kept, named, replaced = lost(world), lost(world), lost(world)
    for run in (kept, named, replaced):
        world.set(run, session_mark="12 34")

    reopen(world, kept)
    reopen(world, named, "secret")
    reopen(world, replaced, "newer")

    assert world.column(kept, "session_mark") == "12 34"
    assert world.column(named, "session_mark") == "12 34"
    assert world.column(replaced, "session_mark") is None


def test_a_run_without_a_handle_needs_one(world: World) -> None:
    run = world.waiting()
    world.set(run, session_value=None, session_type=None)
    world.recover()

    with pytest.raises(SessionNotResumable):
        reopen(world, run)
    back = reopen(world, run, "found again")
    assert back.session is not None
    assert (back.session.type, back.session.handle) == ("jsonl", "found again")


def test_it_is_a_decision_in_the_history(world: World) -> None:
    run = lost(world)
    failed = run.recovery
    reopen(world, run)

    newest, before = decisions.history(world.db, run.run_id)

    assert before == failed
    assert (newest.recovery_state, newest.recovery_reason) == (
        RecoveryState.REOPENED, "reopened_by_caller"
    )  # fmt: skip
    assert (newest.status_before, newest.status_after) == (
        RunStatus.FAILED, RunStatus.WAITING_USER
    )  # fmt: skip
    assert world.get(run).recovery == newest


def test_the_next_restart_keeps_it_waiting(world: World) -> None:
    run = lost(world)
    reopen(world, run)
    world.recover()

    kept = world.get(run).recovery
    assert kept is not None
    assert (kept.recovery_state, kept.recovery_count) == (RecoveryState.RECOVERED_WAITING, 3)


def test_the_window_closes(world: World) -> None:
    run = lost(world)
    assert run.reopenable_until is not None
    world.wait(REOPEN_S + 1)

    with pytest.raises(RunNotReopenable, match="window"):
        reopen(world, run)


def test_a_window_by_another_clock_is_closed_until_it_is_brought_over(world: World) -> None:
    from runrecovery_service.storage import deadlines

    run = lost(world)
    world.reboot(60)
    with pytest.raises(RunNotReopenable):
        reopen(world, run)
    deadlines.move_to_clock(world.db, world.owner, now=world.now, steady=world.steady)

    assert reopen(world, run).status is RunStatus.WAITING_USER


@pytest.mark.parametrize("how", ["queued", "running", "question", "succeeded", "canceled"])
def test_nothing_else_is_set_back(world: World, how: str) -> None:
    if how == "succeeded":
        turn = world.running()
        run = world.end(turn, Succeeded({}))
    else:
        run = world.create() if how == "queued" else world.waiting()
        if how == "running":
            world.reply(run)
            world.take()
            world.set(run, session_value=None)
            world.db.execute("UPDATE interaction SET state = 'DELIVERED'")
        elif how == "question":
            world.db.execute("DELETE FROM interaction")
        elif how == "canceled":
            world.cancel(run)
        world.recover()
    before = world.dump()

    with pytest.raises(RunNotReopenable):
        reopen(world, run)
    assert world.dump() == before


def test_a_run_that_waits_is_not_set_back(world: World) -> None:
    with pytest.raises(RunNotReopenable):
        reopen(world, world.waiting())


def test_a_quarantined_run_is_not_set_back(world: World) -> None:
    run = lost(world)
    world.set(run, recovery_state="QUARANTINED")

    with pytest.raises(RunQuarantined):
        reopen(world, run)


def test_a_question_that_cannot_be_read_is_in_the_way(world: World) -> None:
    run = lost(world)
    world.db.execute("UPDATE interaction SET kind = 'newer'")

    with pytest.raises(RunNotReopenable, match="question"):
        reopen(world, run)


def test_the_etag_decides_between_two(world: World) -> None:
    run = lost(world)

    with pytest.raises(EtagMismatch):
        reopen(world, run, etag="1-1")
    assert reopen(world, run, etag=run.etag).status is RunStatus.WAITING_USER


def test_the_same_call_again_changes_nothing(world: World) -> None:
    run = lost(world)
    reopen(world, run, "mine")
    before = world.dump("run", "interaction", "recovery_event", "run_event")

    reopen(world, run, "mine")
    reopen(world, run)
    with pytest.raises(RunNotReopenable):
        reopen(world, run, "another")

    assert world.dump("run", "interaction", "recovery_event", "run_event") == before


def test_a_receipt_gives_the_run_whatever_became_of_it(world: World) -> None:
    run = lost(world)
    reopen(world, run, receipt=receipt())
    world.cancel(run)

    assert reopen(world, run, receipt=receipt()).status is RunStatus.CANCELED
    with pytest.raises(RequestIdReused):
        reopen(world, run, receipt=receipt(payload=b"other"))


def test_its_deadlines_begin_anew(world: World) -> None:
    run = lost(world, require_user_reply=False, session_timeout_s=50.0, max_run_s=100.0)
    world.wait(500)

    back = reopen(world, run)

    assert back.pending is not None
    assert back.pending.wait_deadline_at is not None
    assert (back.pending.wait_deadline_at - world.now).total_seconds() == 50
    assert back.run_deadline_at is not None
    assert (back.run_deadline_at - world.now).total_seconds() == 100


def test_its_deadlines_are_gone_by_as_they_are_shown(world: World) -> None:
    run = lost(world, require_user_reply=False, session_timeout_s=50.0, max_run_s=100.0)
    world.wait(500)
    reopen(world, run)

    def passed() -> list[DueKind]:
        found = deadlines.passed_deadlines(world.db, world.owner, steady=world.steady, limit=9)
        return [one.kind for one in found]

    told = [passed()]
    for seconds in (49.9, 0.1, 49.9, 0.1):
        world.wait(seconds)
        told.append(passed())

    assert told == [[], [], [DueKind.WAIT], [DueKind.WAIT], [DueKind.WAIT, DueKind.RUN]]


def test_the_handle_is_in_no_repr(world: World) -> None:
    found = reopening.find_candidate(world.db, lost(world).run_id)

    assert found.handle == "secret"
    assert "secret" not in repr(found).replace("<secret>", "")


def test_a_closed_question_of_an_ended_run_stays_closed(world: World) -> None:
    run = lost(world)

    asked = interactions.find(world.db, run.key, 1)
    assert asked is not None
    assert asked.state.value == "CLOSED"
