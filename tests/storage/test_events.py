"""The events of a run: a sequence without a gap, whatever happens to it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from runrecovery_service.domain.errors import (
    RunNotWaiting,
    WatchHistoryPruned,
    WatchSequenceUnknown,
)
from runrecovery_service.domain.run import (
    Profile,
    RestartPolicy,
    Run,
    RunEvent,
    RunEventKind,
    RunStatus,
)
from runrecovery_service.domain.turn import Asked, Interrupted, Succeeded
from runrecovery_service.storage import deadlines, events
from runrecovery_service.storage.recovery_apply import Batch

from .conftest import QUESTION, WAIT_S, World

K = RunEventKind


def told(world: World, run: Run, after: int = 0) -> tuple[RunEvent, ...]:
    return events.events_after(world.db, world.get(run), after)


def kinds(world: World, run: Run) -> list[RunEventKind | None]:
    """The kinds of all events; that their sequence has no gap is always demanded."""
    found = told(world, run)
    assert [event.sequence for event in found] == list(range(1, world.get(run).event_count + 1))
    return [event.kind for event in found]


def test_a_conversation_is_told_event_by_event(world: World) -> None:
    run = world.waiting()
    world.reply(run)
    turn = world.take()
    assert turn is not None
    world.end(turn, Succeeded({}))

    assert kinds(world, run) == [
        K.CREATED, K.STARTED, K.ASKED, K.ANSWERED, K.STARTED, K.SUCCEEDED
    ]  # fmt: skip
    asked, answered = told(world, run)[2:4]
    assert (asked.status, asked.interaction_id, asked.attempt) == (RunStatus.WAITING_USER, 1, 1)
    assert (answered.status, answered.interaction_id) == (RunStatus.QUEUED, 1)


def test_a_cancel_of_a_live_process_is_told_twice(world: World) -> None:
    turn = world.running()
    world.cancel(turn.run)
    world.end(turn, Asked(QUESTION))

    assert kinds(world, turn.run)[2:] == [K.CANCEL_REQUESTED, K.CANCELED]
    requested, _ = told(world, turn.run)[2:]
    assert requested.status is RunStatus.RUNNING


def test_a_failure_is_told_with_its_code(world: World) -> None:
    turn = world.running()
    world.end(turn, Interrupted("stood still"))

    last = told(world, turn.run)[-1]
    assert (last.kind, last.error_code) == (K.FAILED, "ORCHESTRATOR_RESTART_INTERRUPTED")


def test_a_refused_call_is_no_event(world: World) -> None:
    run = world.create()
    with pytest.raises(RunNotWaiting):
        world.reply(run)

    assert kinds(world, run) == [K.CREATED]


def test_decisions_of_restarts_are_among_the_events(world: World) -> None:
    run = world.waiting()
    world.recover()
    world.reply(run)
    world.recover()
    world.take()
    world.recover()

    assert kinds(world, run) == [
        K.CREATED, K.STARTED, K.ASKED, K.RECOVERED, K.ANSWERED, K.RECOVERED, K.STARTED,
        K.RECOVERED,
    ]  # fmt: skip
    kept = told(world, run)[3]
    assert kept.recovery is not None
    assert kept.recovery.recovery_reason == "resumable_waiting_preserved"
    assert (kept.status, kept.recovery.recovery_count) == (RunStatus.WAITING_USER, 1)


def test_a_restart_that_decides_nothing_new_is_no_event(world: World) -> None:
    run = world.waiting()
    world.recover()
    before = kinds(world, run)

    world.recover()

    assert kinds(world, run) == before


def test_a_damaged_run_is_told_to_be_set_aside(world: World) -> None:
    run = world.create()
    world.set(run, status="NEWER_WORD")
    world.recover()

    last = told(world, run)[-1]
    assert (last.kind, last.sequence) == (K.RECOVERED, 2)
    assert last.recovery is not None
    assert last.recovery.recovery_reason == "record_damaged"


def test_a_watch_goes_on_behind_any_event(world: World) -> None:
    run = world.waiting()
    world.recover()
    every = told(world, run)

    for after in range(len(every) + 1):
        assert told(world, run, after) == every[after:]


def test_a_watch_does_not_begin_behind_what_has_not_happened(world: World) -> None:
    run = world.create()

    with pytest.raises(WatchSequenceUnknown) as caught:
        told(world, run, 2)
    assert caught.value.latest == 1


def test_only_the_latest_events_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EVENTS_KEPT", 5)
    run = world.waiting()
    for number in range(1, 4):
        world.reply(run, no=number)
        turn = world.take()
        assert turn is not None
        world.end(turn, Asked(QUESTION))

    last = world.get(run).event_count
    assert last == 12
    with pytest.raises(WatchHistoryPruned) as caught:
        told(world, run, last - 6)
    assert caught.value.oldest == last - 4
    assert [event.sequence for event in told(world, run, last - 5)] == list(range(8, 13))
    assert world.rows("SELECT count(*) FROM run_event") == [(5,)]


def test_an_automatic_decision_is_told_as_one(world: World) -> None:
    run = world.waiting(require_user_reply=False)
    world.wait(WAIT_S)
    deadlines.end_wait(world.db, run.key, owner=world.owner, now=world.now, steady=world.steady)

    last = told(world, run)[-1]
    assert (last.kind, last.interaction_id) == (K.AUTO_DECIDED, 1)


def test_a_run_of_an_earlier_version_goes_on_counting(world: World) -> None:
    run = world.waiting()
    world.db.execute("DELETE FROM run_event")
    world.set(run, event_count=1)  # as the migration leaves it

    world.reply(run)

    assert kinds(world, run) == [K.CREATED, K.ANSWERED]


def test_every_kind_of_ending_is_one_of_the_kinds() -> None:
    assert {K(status) for status in RunStatus if status.is_terminal} <= set(K)


def test_a_requeued_run_and_a_sticky_one_count_too(world: World) -> None:
    again = world.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2).run
    sticky = world.waiting(profile=Profile.STICKY_PROCESS)
    world.recover()
    world.take()

    assert kinds(world, again) == [K.CREATED, K.STARTED, K.RECOVERED, K.STARTED]
    assert told(world, again)[-1].attempt == 2
    assert kinds(world, sticky) == [K.CREATED, K.STARTED, K.ASKED, K.RECOVERED]
    assert told(world, sticky)[-1].error_code == "INTERACTION_PROCESS_LOST"


def test_a_row_that_recovery_cannot_change_is_told_as_well(world: World) -> None:
    run = world.create()
    world.restart()
    scope = world.begin()
    from runrecovery_service.storage import recovery_apply

    recovery_apply._quarantine(world.db, scope, Batch(run.key, run.key, 1), "refused")

    assert kinds(world, run) == [K.CREATED, K.RECOVERED]
    assert told(world, run)[-1].happened_at - world.now <= timedelta(0)


def test_a_gap_is_never_passed_over(world: World) -> None:
    run = world.waiting()
    world.db.execute("DELETE FROM run_event WHERE no = 2")

    with pytest.raises(WatchHistoryPruned):
        told(world, run)
    assert [event.sequence for event in told(world, run, 2)] == [3]
