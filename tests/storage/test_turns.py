"""Turns are taken in order, numbered, and ended in one step with their lease."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial

import pytest
from runrecovery_service.domain.errors import Fenced, RunNotWaiting, RunQuarantined, StorageBusy
from runrecovery_service.domain.run import (
    InteractionState,
    Profile,
    RestartPolicy,
    Run,
    RunError,
    RunStatus,
    Session,
)
from runrecovery_service.domain.turn import Asked, Failed, Interrupted, Succeeded, TurnEnd
from runrecovery_service.storage import deadlines, interactions, launch_records, turns
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.turns import Turn

from .conftest import GONE, QUESTION, WAIT_S, World

FAILED = Failed(RunError(code="ENGINE_FAILED", message="broke"))
ENDS: list[TurnEnd] = [
    Asked(QUESTION), Succeeded({"x": 1}), FAILED, Interrupted("The service stood still."),
]  # fmt: skip


def test_runs_are_taken_in_the_order_of_their_coming(world: World) -> None:
    made = [world.create().run_id for _ in range(4)]

    taken = [world.take() for _ in range(5)]

    assert [*made, None] == [turn and turn.run.run_id for turn in taken]


def test_a_replied_run_queues_behind_what_waits_already(world: World) -> None:
    waiting = world.waiting()
    first = world.create()
    world.reply(waiting)

    taken = [world.take(), world.take()]

    assert [first.run_id, waiting.run_id] == [turn.run.run_id for turn in taken if turn]


def test_runs_of_busy_engines_are_passed_over(world: World) -> None:
    for engine in ("a", "b", "c"):
        world.create(engine=engine)

    turn = world.take(busy=("a", "b"))

    assert turn is not None
    assert (turn.run.engine, world.take(busy=("a", "b"))) == ("c", None)


def test_taking_records_the_launch_before_it_happens(world: World) -> None:
    turn = world.running()

    assert (turn.run.status, turn.run.attempt, turn.run.turn) == (RunStatus.RUNNING, 1, 1)
    assert turn.run.started_at == world.now
    assert [(turn.launch.key, "INTENT", 1, 1, None)] == world.rows(
        "SELECT id, state, attempt, turn, pid FROM process_lease"
    )
    assert (turn.run.key, "host", "boot", 1, 32) == (
        turn.launch.run_key, turn.launch.host_id, turn.launch.boot_id, turn.launch.pid_namespace,
        len(turn.launch.cookie),
    )  # fmt: skip


def test_a_resumed_run_gets_its_reply_in_the_next_turn_of_its_attempt(world: World) -> None:
    run = world.waiting()
    world.reply(run, {"a": 1})

    turn = world.take()

    assert turn is not None
    assert (turn.run.attempt, turn.run.turn) == (1, 2)
    assert turn.reply is not None
    assert (turn.reply.response, turn.reply.interaction_id) == ({"a": 1}, 1)
    assert run.session == turn.run.session


def test_a_run_that_starts_over_gets_a_new_attempt_and_no_session(world: World) -> None:
    turn = world.running()
    world.keep_session(turn)
    world.set(turn.run, status="QUEUED")

    again = world.take()

    assert again is not None
    assert (
        again.run.attempt, again.run.turn, again.run.session, again.reply
    ) == (2, 1, None, None)  # fmt: skip


def test_a_quarantined_or_unowned_run_is_not_taken(world: World) -> None:
    world.set(world.create(), recovery_state="QUARANTINED")
    world.set(world.create(), owner="other")
    world.set(world.create(), owner_epoch=0)

    assert world.take() is None


def test_of_many_takers_at_once_each_gets_a_run_of_its_own(world: World) -> None:
    made = [world.create().run_id for _ in range(12)]

    def take() -> Turn | None:
        while True:
            with suppress(StorageBusy):  # overtaken by the others too often in a row
                return world.take()

    results = world.all_at_once([take] * 12, threads=4)

    turns_taken = [result for result in results if isinstance(result, Turn)]
    assert sorted(made) == sorted(turn.run.run_id for turn in turns_taken)


def test_a_kept_session_is_read_back_and_never_shown(world: World) -> None:
    turn = world.running()
    world.keep_session(turn, "very secret")

    run = world.get(turn.run)

    assert Session(type="demo", handle="very secret", turn=1) == run.session
    assert "very secret" not in repr(run)


def test_a_delivered_answer_is_on_record(world: World) -> None:
    run = world.waiting()
    world.reply(run)
    turn = world.take()
    assert turn is not None

    turns.record_delivered(world.db, turn, owner=world.owner)
    turns.record_delivered(world.db, turn, owner=world.owner)

    asked = interactions.find(world.db, run.key, 1)
    assert asked is not None
    assert InteractionState.DELIVERED is asked.state


def test_an_answer_that_was_not_read_is_known_by_its_question_though_another_is_open(
    world: World,
) -> None:
    turn = world.running(profile=Profile.STICKY_PROCESS)
    world.reply(world.ask_and_stay(turn))
    turns.record_delivered(world.db, turn, owner=world.owner)
    turns.record_sticky_question(
        world.db,
        turn,
        owner=world.owner,
        number=2,
        question=QUESTION,
        due=world.due_in(WAIT_S),
        now=world.tick(),
    )

    turns.record_undelivered(world.db, turn, owner=world.owner, number=1)

    states = world.rows("SELECT no, state FROM interaction ORDER BY no")
    assert states == [(1, "ANSWERED"), (2, "OPEN")]


def test_a_turn_that_asks_waits(world: World) -> None:
    run = world.end(world.running(), Asked(QUESTION))

    assert (run.status, run.interaction_count) == (RunStatus.WAITING_USER, 1)
    assert run.pending is not None
    assert world.rows("SELECT state, exit_code FROM process_lease") == [("CLOSED", 0)]


def test_a_turn_that_succeeds_ends_the_run_with_its_output(world: World) -> None:
    turn = world.running()
    world.keep_session(turn)

    run = world.end(turn, Succeeded({"x": 1}))

    assert (run.status, run.output, run.session) == (RunStatus.SUCCEEDED, {"x": 1}, None)
    assert run.ended_at == world.now


def test_a_turn_that_fails_ends_the_run_with_its_error(world: World) -> None:
    run = world.end(world.running(), FAILED)

    assert (RunStatus.FAILED, FAILED.error) == (run.status, run.error)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_an_accepted_cancel_wins_over_every_end(world: World, end: TurnEnd) -> None:
    turn = world.running()
    world.cancel(turn.run)

    run = world.end(turn, end)

    assert (run.status, run.output, run.error) == (RunStatus.CANCELED, None, None)
    assert world.rows("SELECT * FROM interaction") == []


def test_an_undelivered_answer_is_closed_with_its_run(world: World) -> None:
    run = world.waiting()
    world.reply(run)
    turn = world.take()
    assert turn is not None

    world.end(turn, FAILED)

    assert world.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_an_older_epoch_is_refused_everywhere(world: World) -> None:
    turn, waiting = world.running(), world.waiting(profile=Profile.STICKY_PROCESS)
    old, world.owner = world.owner, world.restart()
    for run in (turn.run, waiting):
        world.set(run, owner_epoch=world.owner.epoch)
    before = world.dump()
    session = Session(type="demo", handle="h", turn=1)
    now = world.now
    writes: list[Callable[[], object]] = [
        partial(turns.record_session, world.db, turn, owner=old, session=session, now=now),
        partial(turns.record_delivered, world.db, turn, owner=old),
        partial(
            turns.record_sticky_question, world.db, turn, owner=old, number=1, question=QUESTION,
            due=world.due_in(1), now=now,
        ),
        *(
            partial(
                turns.record_end, world.db, turn, owner=old, end=end,
                ended=GONE, due=None, now=now,
            )
            for end in ENDS
        ),
    ]  # fmt: skip

    for write in writes:
        with pytest.raises(Fenced):
            write()

    assert before == world.dump()


def test_a_quarantined_run_takes_no_end(world: World) -> None:
    turn = world.running()
    world.set(turn.run, status="NEWER_WORD")

    with pytest.raises(RunQuarantined):
        world.end(turn, FAILED)


def test_an_end_that_is_written_again_changes_nothing_even_in_a_later_turn(world: World) -> None:
    turn = world.running()
    world.keep_session(turn)
    waiting = world.end(turn, Asked(QUESTION))
    world.reply(waiting)
    world.take()
    before = world.dump()

    world.end(turn, Asked(QUESTION))

    assert world.dump() == before


def test_a_question_that_is_written_again_is_asked_once(world: World) -> None:
    turn = world.running(profile=Profile.STICKY_PROCESS)
    run = world.ask_and_stay(turn)

    again = turns.record_sticky_question(
        world.db,
        turn,
        owner=world.owner,
        number=1,
        question=QUESTION,
        due=world.due_in(1),
        now=world.tick(),
    )

    assert again == run


def test_a_run_whose_process_could_not_be_ended_is_not_started(world: World) -> None:
    turn = world.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    stuck = LaunchEnd(exit_code=None, processes_ended=0, gone=False)
    launch_records.close(world.db, turn.launch, stuck, now=world.tick())
    world.recover()

    assert world.get(turn.run).status is RunStatus.QUEUED
    assert world.take() is None


# -- the end of a wait -------------------------------------------------------------------------


def stop_waiting(world: World, run: Run) -> bool:
    ended = deadlines.end_wait(
        world.db, run.key, owner=world.owner, now=world.now, steady=world.steady
    )
    return ended is not None


def test_a_sticky_question_says_how_long_it_waits(world: World) -> None:
    run = world.waiting(profile=Profile.STICKY_PROCESS)

    asked = interactions.find(world.db, run.key, 1)
    assert run.pending is not None
    assert run.pending.wait_deadline_at == world.now - timedelta(seconds=1 - WAIT_S)
    assert asked == run.pending


def test_a_resumable_run_waits_without_end(world: World) -> None:
    run = world.waiting()

    assert run.pending is not None
    assert run.pending.wait_deadline_at is None


def test_a_wait_that_was_stopped_takes_no_reply(world: World) -> None:
    run = world.waiting(profile=Profile.STICKY_PROCESS)

    world.wait(WAIT_S)
    stopped = [stop_waiting(world, run), stop_waiting(world, run)]  # an answer was lost

    assert stopped == [True, True]
    with pytest.raises(RunNotWaiting):
        world.reply(run)
    assert world.get(run).status is RunStatus.WAITING_USER
    assert world.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_reply_that_came_before_the_stop_stands(world: World) -> None:
    run = world.waiting(profile=Profile.STICKY_PROCESS)
    world.reply(run, "just in time")
    world.wait(WAIT_S)

    assert not stop_waiting(world, run)
    assert world.get(run).status is RunStatus.RUNNING
    assert world.rows("SELECT state, response FROM interaction") == [("ANSWERED", '"just in time"')]


def test_a_cancel_that_came_before_the_stop_stands(world: World) -> None:
    run = world.waiting(profile=Profile.STICKY_PROCESS)
    world.cancel(run)
    before = world.get(run)
    world.wait(WAIT_S)

    assert not stop_waiting(world, run)
    assert world.get(run) == before
    assert world.rows("SELECT state FROM interaction") == [("OPEN",)]


def test_a_restart_after_the_stop_of_a_wait_finds_the_process_lost(world: World) -> None:
    run = world.waiting(profile=Profile.STICKY_PROCESS)
    world.wait(WAIT_S)
    assert stop_waiting(world, run)

    world.recover()

    ended = world.get(run)
    assert ended.error is not None
    assert ended.error.code == "INTERACTION_PROCESS_LOST"
