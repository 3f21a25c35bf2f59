"""Deadlines on rows: never early by a stepped clock, never forgotten, carried out once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.errors import Fenced, InteractionSuperseded, RunNotWaiting
from runrecovery_service.domain.run import InteractionState, Profile, Run, RunStatus
from runrecovery_service.storage import deadlines, interactions
from runrecovery_service.storage.deadlines import PassedDeadline
from runrecovery_service.storage.sql_dialects import DatabaseKind

from .conftest import QUESTION, REOPEN_S, WAIT_S, World

STEPS = [timedelta(days=10), timedelta(days=-10)]
RUN_S = 600.0


def passed(world: World) -> list[PassedDeadline]:
    return deadlines.passed_deadlines(world.db, world.owner, steady=world.steady, limit=100)


def rearm(world: World) -> int:
    return deadlines.move_to_clock(world.db, world.owner, now=world.now, steady=world.steady)


def end_wait(world: World, run: Run) -> Run | None:
    given: dict[str, Any] = {"owner": world.owner, "now": world.now, "steady": world.steady}
    return deadlines.end_wait(world.db, run.key, **given)


def end_run(world: World, run: Run) -> Run | None:
    given: dict[str, Any] = {"owner": world.owner, "now": world.now, "steady": world.steady}
    return deadlines.end_run(world.db, run.key, **given)


def armed(world: World) -> Run:
    """A run that waits, and decides automatically at its deadline."""
    return world.waiting(require_user_reply=False)


# -- the clocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=["ahead", "back"])
@pytest.mark.parametrize("restarts", [False, True], ids=["while up", "over a restart"])
def test_a_stepped_wall_clock_ends_no_wait_early_and_none_late(
    world: World, *, step: timedelta, restarts: bool
) -> None:
    run = armed(world)
    world.step(step)
    if restarts:
        world.recover()
        rearm(world)

    world.wait(WAIT_S / 2)
    early = (passed(world), end_wait(world, run))
    world.wait(WAIT_S / 2)

    assert early == ([], None)
    assert passed(world) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_a_reboot_goes_by_what_the_wall_clock_says_is_left(world: World) -> None:
    run = armed(world)
    world.reboot(100)
    world.recover()

    assert rearm(world) == 1
    world.wait(WAIT_S - 200)
    early = passed(world)
    world.wait(200)

    assert early == []
    assert passed(world) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_what_passed_during_a_reboot_has_passed(world: World) -> None:
    run = armed(world)
    world.reboot(WAIT_S + 60)
    world.recover()
    rearm(world)

    assert passed(world) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_deadlines_of_another_clock_are_not_gone_by_before_they_are_brought_over(
    world: World,
) -> None:
    run = armed(world)
    world.reboot(60)
    world.wait(10 * WAIT_S)
    world.steady_us += 10**15  # whatever a clock says that is not the one of the row

    assert end_wait(world, run) is None


def test_arming_again_changes_nothing_the_second_time(world: World) -> None:
    armed(world)
    world.reboot(5)
    world.recover()
    rearm(world)
    before = world.dump()

    assert rearm(world) == 0
    assert world.dump() == before


# -- waits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", list(Profile))
def test_a_wait_that_requires_no_reply_is_decided_and_kept(world: World, profile: Profile) -> None:
    run = world.waiting(profile=profile, require_user_reply=False)
    world.wait(WAIT_S)

    decided = end_wait(world, run)

    goes_on = RunStatus.QUEUED if profile is Profile.RESUMABLE else RunStatus.RUNNING
    assert decided is not None
    assert (decided.status, decided.auto_decided_count) == (goes_on, 1)
    asked = interactions.find(world.db, run.key, 1)
    assert asked is not None
    assert (asked.state, asked.auto_decided) == (InteractionState.ANSWERED, True)
    assert (asked.response, asked.replied_at) == (None, world.now)
    assert passed(world) == []


def test_it_is_decided_once(world: World) -> None:
    run = armed(world)
    world.wait(WAIT_S)
    end_wait(world, run)
    before = world.dump()

    assert end_wait(world, run) is None
    assert world.dump() == before


def test_an_answer_after_the_automatic_one_is_refused(world: World) -> None:
    run = armed(world)
    world.wait(WAIT_S)
    end_wait(world, run)

    with pytest.raises(InteractionSuperseded):
        world.reply(run, "too late")


def test_an_answer_before_it_stands(world: World) -> None:
    run = armed(world)
    world.reply(run, "in time")
    world.wait(WAIT_S)

    assert (passed(world), end_wait(world, run)) == ([], None)
    assert world.get(run).auto_decided_count == 0


def test_the_deadline_of_one_question_is_not_that_of_the_next(world: World) -> None:
    run = armed(world)
    stale = PassedDeadline(run.key, DueKind.WAIT)
    world.wait(WAIT_S)
    assert passed(world) == [stale]
    world.reply(run)  # between the look and the carrying out
    turn = world.take()
    assert turn is not None
    from runrecovery_service.domain.turn import Asked

    world.end(turn, Asked(QUESTION))

    assert end_wait(world, run) is None
    assert passed(world) == []
    world.wait(WAIT_S)
    assert passed(world) == [stale]


def test_a_cancel_goes_before_an_automatic_decision(world: World) -> None:
    run = world.waiting(profile=Profile.STICKY_PROCESS, require_user_reply=False)
    world.cancel(run)
    world.wait(WAIT_S)

    assert end_wait(world, run) is None
    assert world.get(run).auto_decided_count == 0
    assert passed(world) == []  # nobody asks again and again


def test_a_resumable_run_that_requires_a_reply_waits_for_ever(world: World) -> None:
    world.waiting()
    world.wait(10**9)

    assert passed(world) == []


def test_an_automatic_decision_survives_a_restart(world: World) -> None:
    run = armed(world)
    world.wait(WAIT_S)
    end_wait(world, run)
    world.recover()

    turn = world.take()
    assert turn is not None
    assert turn.reply is not None
    assert (turn.reply.interaction_id, turn.reply.auto_decided) == (1, True)


def test_a_stale_epoch_decides_nothing(world: World) -> None:
    run, old = armed(world), world.owner
    world.recover()
    world.wait(WAIT_S)

    with pytest.raises(Fenced):
        deadlines.end_wait(world.db, run.key, owner=old, now=world.now, steady=world.steady)
    assert world.get(run).status is RunStatus.WAITING_USER


def test_a_reply_that_is_accepted_meanwhile_wins_over_the_deadline(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the clock and the closing of the question."""
    if world.db.dialect.kind is DatabaseKind.SQLITE:
        pytest.skip("a transaction of SQLite excludes every other writer")
    run = world.waiting(profile=Profile.STICKY_PROCESS)
    world.wait(WAIT_S)
    look, replies = deadlines._has_passed, iter([partial(world.reply, run, "just in time")])

    def reply_after_the_look(*args: Any) -> bool:
        answer = look(*args)
        for reply in replies:
            elsewhere(world, reply)
        return answer

    monkeypatch.setattr(deadlines, "_has_passed", reply_after_the_look)

    assert end_wait(world, run) is None
    assert world.get(run).status is RunStatus.RUNNING
    assert world.rows("SELECT state, response FROM interaction") == [("ANSWERED", '"just in time"')]


def elsewhere(world: World, do: Callable[[], object]) -> None:
    """Do something on another thread, that is on another connection, and wait for it."""

    def work() -> None:
        try:
            do()
        finally:
            world.db.close()

    with ThreadPoolExecutor(1) as other:
        other.submit(work).result(30)


def test_a_stale_epoch_closes_no_question_and_disarms_nothing(world: World) -> None:
    run, old = world.waiting(profile=Profile.STICKY_PROCESS), world.owner
    world.restart()
    world.set(run, owner_epoch=world.owner.epoch)
    world.wait(WAIT_S)
    before = world.dump()

    with pytest.raises(Fenced):
        deadlines.end_wait(world.db, run.key, owner=old, now=world.now, steady=world.steady)
    with pytest.raises(Fenced):
        deadlines.end_reopening(world.db, [run.key], owner=old, steady=world.steady)
    assert world.dump() == before


def test_a_deadline_without_a_time_of_the_wall_has_passed(world: World) -> None:
    run = armed(world)
    world.db.execute("UPDATE interaction SET wait_deadline_at = NULL")
    world.reboot(5)
    world.recover()
    rearm(world)

    assert passed(world) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_of_more_deadlines_than_are_looked_at_the_longest_past_come_first(world: World) -> None:
    later, middle, first = armed(world), armed(world), armed(world)
    for run, seconds in ((first, 1), (middle, 2), (later, 3)):
        world.set(run, wait_due_us=world.steady_us + seconds)
    world.wait(10)

    found = deadlines.passed_deadlines(world.db, world.owner, steady=world.steady, limit=2)

    assert [one.run_key for one in found] == [first.key, middle.key]


# -- whole runs --------------------------------------------------------------------------------


def test_a_run_may_take_its_time_from_its_first_launch_on(world: World) -> None:
    run = world.create(max_run_s=RUN_S)
    world.wait(RUN_S)
    queued = (passed(world), world.get(run).run_deadline_at)
    world.take()
    world.wait(RUN_S - 2)
    running = passed(world)
    world.wait(2)

    assert (queued, running) == (([], None), [])
    assert passed(world) == [PassedDeadline(run.key, DueKind.RUN)]


def test_a_run_without_a_process_fails_at_its_deadline(world: World) -> None:
    run = world.waiting(max_run_s=RUN_S)
    world.wait(RUN_S)

    ended = end_run(world, run)

    assert ended is not None
    assert ended.status is RunStatus.FAILED
    assert ended.error is not None
    assert ended.error.code == "RUN_TIMEOUT"
    assert (ended.session, passed(world)) == (None, [])
    with pytest.raises(RunNotWaiting):
        world.reply(run)


def test_a_run_with_a_process_is_told_of_until_that_has_ended(world: World) -> None:
    turn = world.running(max_run_s=RUN_S)
    world.wait(RUN_S)

    told = [end_run(world, turn.run) for _ in range(2)]

    assert [run.status for run in told if run is not None] == [RunStatus.RUNNING] * 2
    assert passed(world) == [PassedDeadline(turn.run.key, DueKind.RUN)]


def test_the_deadline_of_a_run_survives_restarts_and_new_attempts(world: World) -> None:
    from runrecovery_service.domain.run import RestartPolicy

    turn = world.running(max_run_s=RUN_S, restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    deadline = world.get(turn.run).run_deadline_at
    world.wait(RUN_S / 2)
    world.recover()
    again = world.take()

    assert again is not None
    assert (again.run.attempt, again.run.run_deadline_at) == (2, deadline)
    world.wait(RUN_S / 2)
    assert passed(world) == [PassedDeadline(turn.run.key, DueKind.RUN)]


def test_a_canceled_run_has_no_deadline(world: World) -> None:
    turn = world.running(max_run_s=RUN_S)
    world.cancel(turn.run)
    world.wait(RUN_S)

    assert end_run(world, turn.run) is None
    assert passed(world) == []


def test_a_run_whose_time_is_over_is_not_launched_again(world: World) -> None:
    from runrecovery_service.domain.run import RestartPolicy

    turn = world.running(max_run_s=RUN_S, restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    world.recover()
    world.wait(RUN_S)

    assert world.take() is None
    ended = end_run(world, turn.run)
    assert ended is not None
    assert (ended.status, ended.attempt) == (RunStatus.FAILED, 1)


# -- what is kept to set a run back ------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=["ahead", "back"])
def test_a_session_is_kept_for_its_window_and_no_longer(world: World, step: timedelta) -> None:
    run = world.waiting()
    world.set(run, session_verdict="INVALID")
    world.recover()
    world.step(step)
    world.wait(REOPEN_S - 100)
    early = passed(world)
    world.wait(100)

    assert early == []
    assert passed(world) == [PassedDeadline(run.key, DueKind.REOPEN)]
    deadlines.end_reopening(world.db, [run.key], owner=world.owner, steady=world.steady)
    assert passed(world) == []
    assert world.rows("SELECT retired_value, session_value FROM run") == [(None, None)]
