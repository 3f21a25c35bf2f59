"""Turns are taken in order, numbered, and ended in one step with their launch."""

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
from runrecovery_service.storage import (
    interactions,
    launch_records,
    passed_deadlines,
    turn_ends,
    turns,
)
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.turns import Turn
from storage.service_store import GONE, QUESTION, WAIT_S, ServiceStore

FAILED = Failed(RunError(code="ENGINE_FAILED", message="broke"))
ENDS: list[TurnEnd] = [
    Asked(QUESTION), Succeeded({"x": 1}), FAILED, Interrupted("The service stood still."),
]  # fmt: skip


def test_runs_are_taken_in_the_order_of_their_creation(store: ServiceStore) -> None:
    made = [store.create().run_id for _ in range(4)]

    taken = [store.take() for _ in range(5)]

    assert [*made, None] == [turn and turn.run.run_id for turn in taken]


def test_a_run_with_a_reply_queues_behind_runs_that_are_queued(store: ServiceStore) -> None:
    waiting = store.waiting()
    first = store.create()
    store.reply(waiting)

    taken = [store.take(), store.take()]

    assert [first.run_id, waiting.run_id] == [turn.run.run_id for turn in taken if turn]


def test_runs_of_busy_engines_are_skipped(store: ServiceStore) -> None:
    for engine in ("a", "b", "c"):
        store.create(engine=engine)

    turn = store.take(busy=("a", "b"))

    assert turn is not None
    assert (turn.run.engine, store.take(busy=("a", "b"))) == ("c", None)


def test_taking_a_run_records_its_launch_before_it_happens(store: ServiceStore) -> None:
    turn = store.running()

    assert (turn.run.status, turn.run.attempt, turn.run.turn) == (RunStatus.RUNNING, 1, 1)
    assert turn.run.started_at == store.now
    assert [(turn.launch.key, "INTENT", 1, 1, None)] == store.rows(
        "SELECT id, state, attempt, turn, pid FROM process_lease"
    )
    assert (turn.run.key, "host", "boot", 1, 32) == (
        turn.launch.run_key, turn.launch.host_id, turn.launch.boot_id, turn.launch.pid_namespace,
        len(turn.launch.cookie),
    )  # fmt: skip


def test_a_resumed_run_gets_its_reply_in_the_next_turn_of_its_attempt(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run, {"a": 1})

    turn = store.take()

    assert turn is not None
    assert (turn.run.attempt, turn.run.turn) == (1, 2)
    assert turn.reply is not None
    assert (turn.reply.response, turn.reply.interaction_id) == ({"a": 1}, 1)
    assert run.session == turn.run.session


def test_a_run_that_starts_over_gets_a_new_attempt_and_no_session(store: ServiceStore) -> None:
    turn = store.running()
    store.keep_session(turn)
    store.set(turn.run, status="QUEUED")

    again = store.take()

    assert again is not None
    assert (
        again.run.attempt, again.run.turn, again.run.session, again.reply
    ) == (2, 1, None, None)  # fmt: skip


def test_a_quarantined_or_unowned_run_is_not_taken(store: ServiceStore) -> None:
    store.set(store.create(), recovery_state="QUARANTINED")
    store.set(store.create(), owner="other")
    store.set(store.create(), owner_epoch=0)

    assert store.take() is None


def test_many_takers_at_once_get_different_runs(store: ServiceStore) -> None:
    made = [store.create().run_id for _ in range(12)]

    def take() -> Turn | None:
        while True:
            with suppress(StorageBusy):  # overtaken by the others too often in a row
                return store.take()

    results = store.all_at_once([take] * 12, threads=4)

    turns_taken = [result for result in results if isinstance(result, Turn)]
    assert sorted(made) == sorted(turn.run.run_id for turn in turns_taken)


def test_a_session_handle_is_read_back_and_in_no_repr(store: ServiceStore) -> None:
    turn = store.running()
    store.keep_session(turn, "very secret")

    run = store.get(turn.run)

    assert Session(type="demo", handle="very secret", turn=1) == run.session
    assert "very secret" not in repr(run)


def test_a_delivered_reply_is_recorded(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run)
    turn = store.take()
    assert turn is not None

    turns.record_delivered(store.db, turn, owner=store.owner, number=1)
    turns.record_delivered(store.db, turn, owner=store.owner, number=1)

    asked = interactions.find(store.db, run.key, 1)
    assert asked is not None
    assert InteractionState.DELIVERED is asked.state


def test_an_unread_reply_is_identified_by_its_question_while_another_is_open(
    store: ServiceStore,
) -> None:
    turn = store.running(profile=Profile.STICKY_PROCESS)
    store.reply(store.ask_and_stay(turn))
    turns.record_delivered(store.db, turn, owner=store.owner, number=1)
    turns.record_sticky_question(
        store.db,
        turn,
        owner=store.owner,
        number=2,
        question=QUESTION,
        due=store.due_in(WAIT_S),
        now=store.tick(),
    )

    turns.record_undelivered(store.db, turn, owner=store.owner, number=1)

    states = store.rows("SELECT no, state FROM interaction ORDER BY no")
    assert states == [(1, "ANSWERED"), (2, "OPEN")]


def test_a_turn_that_asks_waits(store: ServiceStore) -> None:
    run = store.end(store.running(), Asked(QUESTION))

    assert (run.status, run.interaction_count) == (RunStatus.WAITING_USER, 1)
    assert run.pending is not None
    assert store.rows("SELECT state, exit_code FROM process_lease") == [("CLOSED", 0)]


def test_a_turn_that_succeeds_ends_the_run_with_its_output(store: ServiceStore) -> None:
    turn = store.running()
    store.keep_session(turn)

    run = store.end(turn, Succeeded({"x": 1}))

    assert (run.status, run.output, run.session) == (RunStatus.SUCCEEDED, {"x": 1}, None)
    assert run.ended_at == store.now


def test_a_turn_that_fails_ends_the_run_with_its_error(store: ServiceStore) -> None:
    run = store.end(store.running(), FAILED)

    assert (RunStatus.FAILED, FAILED.error) == (run.status, run.error)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_an_accepted_cancel_wins_over_every_way_to_end(store: ServiceStore, end: TurnEnd) -> None:
    turn = store.running()
    store.cancel(turn.run)

    run = store.end(turn, end)

    assert (run.status, run.output, run.error) == (RunStatus.CANCELED, None, None)
    assert store.rows("SELECT * FROM interaction") == []


def test_an_undelivered_reply_is_closed_with_its_run(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run)
    turn = store.take()
    assert turn is not None

    store.end(turn, FAILED)

    assert store.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_superseded_epoch_is_refused_by_every_step_of_a_turn(store: ServiceStore) -> None:
    turn, waiting = store.running(), store.waiting(profile=Profile.STICKY_PROCESS)
    old, store.owner = store.owner, store.restart()
    for run in (turn.run, waiting):
        store.set(run, owner_epoch=store.owner.epoch)
    before = store.dump()
    session = Session(type="demo", handle="h", turn=1)
    now = store.now
    writes: list[Callable[[], object]] = [
        partial(turns.record_session, store.db, turn, owner=old, session=session, now=now),
        partial(turns.record_delivered, store.db, turn, owner=old, number=1),
        partial(
            turns.record_sticky_question, store.db, turn, owner=old, number=1, question=QUESTION,
            due=store.due_in(1), now=now,
        ),
        *(
            partial(
                turn_ends.record_end, store.db, turn, owner=old, end=end,
                ended=GONE, due=None, due_in=store.due_in, now=now,
            )
            for end in ENDS
        ),
    ]  # fmt: skip

    for write in writes:
        with pytest.raises(Fenced):
            write()

    assert before == store.dump()


def test_the_end_of_a_turn_does_not_change_a_quarantined_run(store: ServiceStore) -> None:
    turn = store.running()
    store.set(turn.run, status="NEWER_WORD")

    with pytest.raises(RunQuarantined):
        store.end(turn, FAILED)


def test_recording_an_end_twice_changes_nothing_even_in_a_later_turn(
    store: ServiceStore,
) -> None:
    turn = store.running()
    store.keep_session(turn)
    waiting = store.end(turn, Asked(QUESTION))
    store.reply(waiting)
    store.take()
    before = store.dump()

    store.end(turn, Asked(QUESTION))

    assert store.dump() == before


def test_recording_a_question_twice_asks_it_once(store: ServiceStore) -> None:
    turn = store.running(profile=Profile.STICKY_PROCESS)
    run = store.ask_and_stay(turn)

    again = turns.record_sticky_question(
        store.db,
        turn,
        owner=store.owner,
        number=1,
        question=QUESTION,
        due=store.due_in(1),
        now=store.tick(),
    )

    assert again == run


def test_a_run_whose_process_could_not_be_ended_is_not_launched(store: ServiceStore) -> None:
    turn = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    stuck = LaunchEnd(exit_code=None, processes_ended=0, gone=False)
    launch_records.close(store.db, turn.launch, stuck, now=store.tick())
    store.recover()

    assert store.get(turn.run).status is RunStatus.QUEUED
    assert store.take() is None


# -- the end of a wait -------------------------------------------------------------------------


def stop_waiting(store: ServiceStore, run: Run) -> bool:
    ended = passed_deadlines.end_wait(
        store.db, run.key, owner=store.owner, now=store.now, steady=store.steady
    )
    return ended is not None


def test_a_sticky_question_has_the_deadline_of_its_wait(store: ServiceStore) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS)

    asked = interactions.find(store.db, run.key, 1)
    assert run.pending is not None
    assert run.pending.wait_deadline_at == store.now - timedelta(seconds=1 - WAIT_S)
    assert asked == run.pending


def test_a_resumable_run_waits_without_end(store: ServiceStore) -> None:
    run = store.waiting()

    assert run.pending is not None
    assert run.pending.wait_deadline_at is None


def test_a_wait_that_was_ended_accepts_no_reply(store: ServiceStore) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS)

    store.advance(WAIT_S)
    stopped = [stop_waiting(store, run), stop_waiting(store, run)]  # an answer was lost

    assert stopped == [True, True]
    with pytest.raises(RunNotWaiting):
        store.reply(run)
    assert store.get(run).status is RunStatus.WAITING_USER
    assert store.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_reply_before_the_end_of_the_wait_is_kept(store: ServiceStore) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS)
    store.reply(run, "just in time")
    store.advance(WAIT_S)

    assert not stop_waiting(store, run)
    assert store.get(run).status is RunStatus.RUNNING
    assert store.rows("SELECT state, response FROM interaction") == [("ANSWERED", '"just in time"')]


def test_a_cancel_before_the_end_of_the_wait_is_kept(store: ServiceStore) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS)
    store.cancel(run)
    before = store.get(run)
    store.advance(WAIT_S)

    assert not stop_waiting(store, run)
    assert store.get(run) == before
    assert store.rows("SELECT state FROM interaction") == [("OPEN",)]


def test_a_restart_after_the_end_of_a_wait_finds_the_process_lost(store: ServiceStore) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS)
    store.advance(WAIT_S)
    assert stop_waiting(store, run)

    store.recover()

    ended = store.get(run)
    assert ended.error is not None
    assert ended.error.code == "INTERACTION_PROCESS_LOST"
