"""A run that recovery failed because of its session can be reopened until its deadline."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.domain.errors import (
    EtagMismatch,
    RequestIdReused,
    RunNotReopenable,
    RunQuarantined,
    SessionNotResumable,
)
from runrecovery_service.domain.run import RecoveryState, Run, RunStatus
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import decisions, events, interactions, passed_deadlines, reopening
from storage.service_store import REOPEN_S, ServiceStore, receipt

ENGINE_WAIT_S = 90.0


def reopen(store: ServiceStore, run: Run, handle: str | None = None, **changes: Any) -> Run:
    given: dict[str, Any] = {
        "session_type_of": lambda _: "jsonl",
        "wait_s_of": lambda run: run.session_timeout_s or ENGINE_WAIT_S,
        "owner": store.owner, "etag": None, "receipt": None,
        "due_in": store.due_in, "steady": store.steady, "now": store.tick(),
    } | changes  # fmt: skip
    return reopening.reopen(store.db, run.run_id, handle=handle, **given)


def lost(store: ServiceStore, *, replied: bool = False, **changes: Any) -> Run:
    """Return a run that a restart failed because its session was lost."""
    run = store.waiting(**changes)
    if replied:
        store.reply(run, "accepted")
    store.set(run, session_verdict="INVALID")
    store.recover()
    failed = store.get(run)
    assert failed.status is RunStatus.FAILED
    assert failed.session is None
    return failed


def test_a_failed_wait_waits_again_with_its_question(store: ServiceStore) -> None:
    run = lost(store)

    back = reopen(store, run)

    assert back.status is RunStatus.WAITING_USER
    assert back.pending is not None
    assert back.pending.interaction_id == 1
    assert (back.error, back.ended_at, back.reopenable_until) == (None, None, None)
    assert back.session is not None
    assert (back.session.handle, back.session.turn) == ("secret", 1)


def test_the_question_of_a_reopened_run_waits_as_long_as_its_engine_says(
    store: ServiceStore,
) -> None:
    """The run itself has no time limit."""
    run = lost(store, require_user_reply=False)
    assert run.session_timeout_s is None

    back = reopen(store, run)

    assert back.pending is not None
    assert back.pending.wait_deadline_at == store.now + timedelta(seconds=ENGINE_WAIT_S)


def test_the_caller_that_reopened_a_run_is_in_its_events(store: ServiceStore) -> None:
    back = reopen(store, lost(store), caller="ops")

    found = events.events_after(store.db, back, 0)

    assert [(event.kind, event.caller) for event in found[-2:]] == [
        ("RECOVERED", None), ("REOPENED", "ops"),
    ]  # fmt: skip


def test_a_candidate_shows_no_handle(store: ServiceStore) -> None:
    found = reopening.find_candidate(store.db, lost(store).run_id)

    assert repr(found) == "ReopenCandidate(run='run-0001', handle=<secret>)"


def test_a_reopened_run_accepts_a_reply_and_resumes(store: ServiceStore) -> None:
    run = lost(store)
    reopen(store, run)
    store.reply(run, "yes")
    turn = store.take()
    assert turn is not None
    assert turn.reply is not None
    assert turn.reply.response == "yes"

    assert store.end(turn, Succeeded({"done": True})).status is RunStatus.SUCCEEDED


def test_a_reopened_run_with_an_accepted_reply_is_queued_with_it(store: ServiceStore) -> None:
    run = lost(store, replied=True)

    back = reopen(store, run)
    turn = store.take()

    assert back.status is RunStatus.QUEUED
    assert turn is not None
    assert turn.reply is not None
    assert (turn.reply.response, turn.run.key) == ("accepted", run.key)


def test_a_new_handle_replaces_the_lost_one(store: ServiceStore) -> None:
    back = reopen(store, lost(store), "newer")

    assert back.session is not None
    assert back.session.handle == "newer"


def test_a_fingerprint_is_kept_only_with_its_own_handle(store: ServiceStore) -> None:
    kept, named, replaced = lost(store), lost(store), lost(store)
    for run in (kept, named, replaced):
        store.set(run, session_mark="12 34")

    reopen(store, kept)
    reopen(store, named, "secret")
    reopen(store, replaced, "newer")

    assert store.column(kept, "session_mark") == "12 34"
    assert store.column(named, "session_mark") == "12 34"
    assert store.column(replaced, "session_mark") is None


def test_a_run_without_a_handle_is_reopened_only_with_one(store: ServiceStore) -> None:
    run = store.waiting()
    store.set(run, session_value=None, session_type=None)
    store.recover()

    with pytest.raises(SessionNotResumable):
        reopen(store, run)
    back = reopen(store, run, "found again")
    assert back.session is not None
    assert (back.session.type, back.session.handle) == ("jsonl", "found again")


def test_a_reopening_is_a_decision_in_the_history(store: ServiceStore) -> None:
    run = lost(store)
    failed = run.recovery
    reopen(store, run)

    newest, before = decisions.history(store.db, run.run_id)

    assert before == failed
    assert (newest.recovery_state, newest.recovery_reason) == (
        RecoveryState.REOPENED, "reopened_by_caller"
    )  # fmt: skip
    assert (newest.status_before, newest.status_after) == (
        RunStatus.FAILED, RunStatus.WAITING_USER
    )  # fmt: skip
    assert store.get(run).recovery == newest


def test_the_next_restart_keeps_a_reopened_run_waiting(store: ServiceStore) -> None:
    run = lost(store)
    reopen(store, run)
    store.recover()

    kept = store.get(run).recovery
    assert kept is not None
    assert (kept.recovery_state, kept.recovery_count) == (RecoveryState.RECOVERED_WAITING, 3)


def test_a_run_is_reopened_only_before_its_deadline(store: ServiceStore) -> None:
    run = lost(store)
    assert run.reopenable_until is not None
    store.advance(REOPEN_S + 1)

    with pytest.raises(RunNotReopenable, match="is over"):
        reopen(store, run)


def test_a_deadline_of_an_earlier_boot_refuses_reopening_until_it_is_rearmed(
    store: ServiceStore,
) -> None:

    run = lost(store)
    store.reboot(60)
    with pytest.raises(RunNotReopenable):
        reopen(store, run)
    passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)

    assert reopen(store, run).status is RunStatus.WAITING_USER


@pytest.mark.parametrize("how", ["queued", "running", "question", "succeeded", "canceled"])
def test_a_run_that_failed_for_another_reason_is_not_reopened(
    store: ServiceStore, how: str
) -> None:
    if how == "succeeded":
        turn = store.running()
        run = store.end(turn, Succeeded({}))
    else:
        run = store.create() if how == "queued" else store.waiting()
        if how == "running":
            store.reply(run)
            store.take()
            store.set(run, session_value=None)
            store.db.execute("UPDATE interaction SET state = 'DELIVERED'")
        elif how == "question":
            store.db.execute("DELETE FROM interaction")
        elif how == "canceled":
            store.cancel(run)
        store.recover()
    before = store.dump()

    with pytest.raises(RunNotReopenable):
        reopen(store, run)
    assert store.dump() == before


def test_a_waiting_run_is_not_reopened(store: ServiceStore) -> None:
    with pytest.raises(RunNotReopenable):
        reopen(store, store.waiting())


def test_a_quarantined_run_is_not_reopened(store: ServiceStore) -> None:
    run = lost(store)
    store.set(run, recovery_state="QUARANTINED")

    with pytest.raises(RunQuarantined):
        reopen(store, run)


def test_a_run_with_an_unreadable_question_is_not_reopened(store: ServiceStore) -> None:
    run = lost(store)
    store.db.execute("UPDATE interaction SET kind = 'newer'")

    with pytest.raises(RunNotReopenable, match="question"):
        reopen(store, run)


def test_a_reopening_with_an_old_etag_is_refused(store: ServiceStore) -> None:
    run = lost(store)

    with pytest.raises(EtagMismatch):
        reopen(store, run, etag="1-1")
    assert reopen(store, run, etag=run.etag).status is RunStatus.WAITING_USER


def test_the_same_call_again_changes_nothing(store: ServiceStore) -> None:
    run = lost(store)
    reopen(store, run, "mine")
    before = store.dump("run", "interaction", "recovery_event", "run_event")

    reopen(store, run, "mine")
    reopen(store, run)
    with pytest.raises(RunNotReopenable):
        reopen(store, run, "another")

    assert store.dump("run", "interaction", "recovery_event", "run_event") == before


def test_a_repeated_call_returns_the_run_as_it_is_now(store: ServiceStore) -> None:
    run = lost(store)
    reopen(store, run, receipt=receipt())
    store.cancel(run)

    assert reopen(store, run, receipt=receipt()).status is RunStatus.CANCELED
    with pytest.raises(RequestIdReused):
        reopen(store, run, receipt=receipt(payload=b"other"))


def test_the_deadlines_of_a_reopened_run_begin_anew(store: ServiceStore) -> None:
    run = lost(store, require_user_reply=False, session_timeout_s=50.0, max_run_s=100.0)
    store.advance(500)

    back = reopen(store, run)

    assert back.pending is not None
    assert back.pending.wait_deadline_at is not None
    assert (back.pending.wait_deadline_at - store.now).total_seconds() == 50
    assert back.run_deadline_at is not None
    assert (back.run_deadline_at - store.now).total_seconds() == 100


def test_the_deadlines_of_a_reopened_run_pass_at_the_times_that_callers_see(
    store: ServiceStore,
) -> None:
    run = lost(store, require_user_reply=False, session_timeout_s=50.0, max_run_s=100.0)
    store.advance(500)
    reopen(store, run)

    def passed() -> list[DueKind]:
        found = passed_deadlines.find(store.db, store.owner, steady=store.steady, limit=9)
        return [one.kind for one in found]

    found = [passed()]
    for seconds in (49.9, 0.1, 49.9, 0.1):
        store.advance(seconds)
        found.append(passed())

    assert found == [[], [], [DueKind.WAIT], [DueKind.WAIT], [DueKind.WAIT, DueKind.RUN]]


def test_the_handle_is_in_no_repr(store: ServiceStore) -> None:
    found = reopening.find_candidate(store.db, lost(store).run_id)

    assert found.handle == "secret"
    assert "secret" not in repr(found).replace("<secret>", "")


def test_a_closed_question_of_an_ended_run_stays_closed(store: ServiceStore) -> None:
    run = lost(store)

    asked = interactions.find(store.db, run.key, 1)
    assert asked is not None
    assert asked.state.value == "CLOSED"
