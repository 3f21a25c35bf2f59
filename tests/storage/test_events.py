"""The events of a run are a sequence without a gap, whatever happens to the run."""

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
from runrecovery_service.storage import events, passed_deadlines
from runrecovery_service.storage.recovery_apply import Batch
from storage.service_store import QUESTION, WAIT_S, ServiceStore

K = RunEventKind


def events_of(store: ServiceStore, run: Run, after: int = 0) -> tuple[RunEvent, ...]:
    return events.events_after(store.db, store.get(run), after)


def kinds(store: ServiceStore, run: Run) -> list[RunEventKind | None]:
    """Return the kinds of all events, and demand that their sequence numbers have no gap."""
    found = events_of(store, run)
    assert [event.sequence for event in found] == list(range(1, store.get(run).event_count + 1))
    return [event.kind for event in found]


def test_a_run_with_a_question_has_an_event_for_each_step(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run)
    turn = store.take()
    assert turn is not None
    store.end(turn, Succeeded({}))

    assert kinds(store, run) == [
        K.CREATED, K.STARTED, K.ASKED, K.ANSWERED, K.STARTED, K.SUCCEEDED
    ]  # fmt: skip
    asked, answered = events_of(store, run)[2:4]
    assert (asked.status, asked.interaction_id, asked.attempt) == (RunStatus.WAITING_USER, 1, 1)
    assert (answered.status, answered.interaction_id) == (RunStatus.QUEUED, 1)


def test_a_cancel_of_a_live_process_is_two_events(store: ServiceStore) -> None:
    turn = store.running()
    store.cancel(turn.run)
    store.end(turn, Asked(QUESTION))

    assert kinds(store, turn.run)[2:] == [K.CANCEL_REQUESTED, K.CANCELED]
    requested, _ = events_of(store, turn.run)[2:]
    assert requested.status is RunStatus.RUNNING


def test_a_failure_is_an_event_with_its_code(store: ServiceStore) -> None:
    turn = store.running()
    store.end(turn, Interrupted("stood still"))

    last = events_of(store, turn.run)[-1]
    assert (last.kind, last.error_code) == (K.FAILED, "ORCHESTRATOR_RESTART_INTERRUPTED")


def test_a_refused_call_is_no_event(store: ServiceStore) -> None:
    run = store.create()
    with pytest.raises(RunNotWaiting):
        store.reply(run)

    assert kinds(store, run) == [K.CREATED]


def test_decisions_of_restarts_are_among_the_events(store: ServiceStore) -> None:
    run = store.waiting()
    store.recover()
    store.reply(run)
    store.recover()
    store.take()
    store.recover()

    assert kinds(store, run) == [
        K.CREATED, K.STARTED, K.ASKED, K.RECOVERED, K.ANSWERED, K.RECOVERED, K.STARTED,
        K.RECOVERED,
    ]  # fmt: skip
    kept = events_of(store, run)[3]
    assert kept.recovery is not None
    assert kept.recovery.recovery_reason == "resumable_waiting_preserved"
    assert (kept.status, kept.recovery.recovery_count) == (RunStatus.WAITING_USER, 1)


def test_a_restart_that_decides_nothing_new_is_no_event(store: ServiceStore) -> None:
    run = store.waiting()
    store.recover()
    before = kinds(store, run)

    store.recover()

    assert kinds(store, run) == before


def test_a_quarantined_run_has_an_event_of_it(store: ServiceStore) -> None:
    run = store.create()
    store.set(run, status="NEWER_WORD")
    store.recover()

    last = events_of(store, run)[-1]
    assert (last.kind, last.sequence) == (K.RECOVERED, 2)
    assert last.recovery is not None
    assert last.recovery.recovery_reason == "record_damaged"


def test_a_watch_can_resume_after_every_event(store: ServiceStore) -> None:
    run = store.waiting()
    store.recover()
    every = events_of(store, run)

    for after in range(len(every) + 1):
        assert events_of(store, run, after) == every[after:]


def test_a_watch_cannot_resume_after_an_event_that_has_not_happened(store: ServiceStore) -> None:
    run = store.create()

    with pytest.raises(WatchSequenceUnknown) as caught:
        events_of(store, run, 2)
    assert caught.value.latest == 1


def test_only_the_latest_events_are_kept(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVENTS_KEPT", 5)
    run = store.waiting()
    for number in range(1, 4):
        store.reply(run, no=number)
        turn = store.take()
        assert turn is not None
        store.end(turn, Asked(QUESTION))

    last = store.get(run).event_count
    assert last == 12
    with pytest.raises(WatchHistoryPruned) as caught:
        events_of(store, run, last - 6)
    assert caught.value.oldest == last - 4
    assert [event.sequence for event in events_of(store, run, last - 5)] == list(range(8, 13))
    assert store.rows("SELECT count(*) FROM run_event") == [(5,)]


def test_an_automatic_decision_is_an_event_of_its_own_kind(store: ServiceStore) -> None:
    run = store.waiting(require_user_reply=False)
    store.advance(WAIT_S)
    passed_deadlines.end_wait(
        store.db, run.key, owner=store.owner, now=store.now, steady=store.steady
    )

    last = events_of(store, run)[-1]
    assert (last.kind, last.interaction_id) == (K.AUTO_DECIDED, 1)


def test_the_events_of_a_run_of_an_earlier_version_continue_its_sequence(
    store: ServiceStore,
) -> None:
    run = store.waiting()
    store.db.execute("DELETE FROM run_event")
    store.set(run, event_count=1)  # as the migration leaves it

    store.reply(run)

    assert kinds(store, run) == [K.CREATED, K.ANSWERED]


def test_every_way_to_end_is_an_event_kind() -> None:
    assert {K(status) for status in RunStatus if status.is_terminal} <= set(K)


def test_requeued_and_sticky_runs_have_events_without_a_gap(store: ServiceStore) -> None:
    again = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2).run
    sticky = store.waiting(profile=Profile.STICKY_PROCESS)
    store.recover()
    store.take()

    assert kinds(store, again) == [K.CREATED, K.STARTED, K.RECOVERED, K.STARTED]
    assert events_of(store, again)[-1].attempt == 2
    assert kinds(store, sticky) == [K.CREATED, K.STARTED, K.ASKED, K.RECOVERED]
    assert events_of(store, sticky)[-1].error_code == "INTERACTION_PROCESS_LOST"


def test_a_run_that_recovery_cannot_change_has_an_event_of_its_quarantine(
    store: ServiceStore,
) -> None:
    run = store.create()
    store.restart()
    scope = store.open_report()
    from runrecovery_service.storage import recovery_apply

    recovery_apply._quarantine(store.db, scope, Batch(run.key, run.key, 1), "refused")

    assert kinds(store, run) == [K.CREATED, K.RECOVERED]
    assert events_of(store, run)[-1].happened_at - store.now <= timedelta(0)


def test_events_after_a_gap_are_not_returned(store: ServiceStore) -> None:
    run = store.waiting()
    store.db.execute("DELETE FROM run_event WHERE no = 2")

    with pytest.raises(WatchHistoryPruned):
        events_of(store, run)
    assert [event.sequence for event in events_of(store, run, 2)] == [3]
