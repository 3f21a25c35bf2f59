"""RESTART_POLICY_RESUME: a new process completes an interrupted turn, a bounded number of times."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Profile,
    RestartPolicy,
    Run,
    RunError,
    RunStatus,
)
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    SessionGone,
    Succeeded,
)
from runrecovery_service.storage import (
    interactions,
    launch_records,
    passed_deadlines,
    turn_starts,
    turns,
)
from runrecovery_service.storage.turns import Turn
from storage.service_store import QUESTION, ServiceStore

RESUME: dict[str, Any] = {
    "restart_policy": RestartPolicy.RESUME, "max_resumes": 3, "max_attempts": 2,
}  # fmt: skip
LOST = RunError(code=ErrorCode.SESSION_RESUME_FAILED, message="No such session.")
STANDSTILL = Interrupted("The service was suspended.")


def interrupted(store: ServiceStore, **changes: Any) -> Run:
    """Return a run that a restart found RUNNING with a session, after the recovery."""
    turn = store.running(**RESUME | changes)
    store.keep_session(turn)
    store.recover()
    return store.get(turn.run)


def taken(store: ServiceStore) -> Turn:
    turn = store.take()
    assert turn is not None
    return turn


def next_turn(store: ServiceStore) -> Turn:
    """Return the next turn, whose agent has been started."""
    turn = taken(store)
    launch_records.record_gated(store.db, turn.launch, owner=store.owner, pid=1, start_ticks=1)
    launch_records.record_running(store.db, turn.launch, owner=store.owner)
    return turn


def end_pauses(store: ServiceStore) -> None:
    passed = passed_deadlines.find(store.db, store.owner, steady=store.steady, limit=10)
    if keys := [one.run_key for one in passed]:
        passed_deadlines.end_pauses(store.db, keys, owner=store.owner, steady=store.steady)


def stop(store: ServiceStore) -> None:
    store.apply_recovery(cause=Cause.SHUTDOWN)
    store.restart()
    store.apply_recovery()


def restart(store: ServiceStore) -> None:
    store.recover()


@pytest.mark.parametrize("how", [restart, stop])
def test_an_interrupted_turn_resumes_its_session_in_the_same_attempt(
    store: ServiceStore, how: Callable[[ServiceStore], None]
) -> None:
    turn = store.running(**RESUME)
    store.keep_session(turn, "the session")
    how(store)
    run = store.get(turn.run)
    assert (run.status, run.recovery and run.recovery.recovery_reason) == (
        RunStatus.QUEUED, "interrupted_turn_resumed",
    )  # fmt: skip

    resumed = next_turn(store)

    assert (resumed.run.attempt, resumed.run.turn) == (1, 2)
    assert store.get(run).resume_count == 1
    assert resumed.run.session is not None
    assert resumed.run.session.handle == "the session"
    assert resumed.reply is None
    interruption = resumed.interruption
    assert interruption is not None
    assert (interruption.cause, interruption.times) == (InterruptionCause.RESTART, 1)
    assert interruption.reply is None
    assert run.recovery is not None
    assert interruption.at == run.recovery.recovered_at


def test_a_resumed_run_succeeds_as_any_other(store: ServiceStore) -> None:
    interrupted(store)

    assert store.end(next_turn(store), Succeeded({"x": 1})).status is RunStatus.SUCCEEDED


def test_the_reply_of_the_interrupted_turn_is_repeated(store: ServiceStore) -> None:
    run = store.reply(store.waiting(**RESUME), "blue")
    turn = next_turn(store)
    turns.record_delivered(store.db, turn, owner=store.owner, number=1)
    store.recover()

    resumed = next_turn(store)

    assert resumed.reply is None
    assert resumed.interruption is not None
    repeated = resumed.interruption.reply
    assert repeated is not None
    assert (repeated.interaction_id, repeated.response) == (1, "blue")
    question = interactions.find(store.db, run.key, 1)
    assert question is not None
    assert question.state is InteractionState.DELIVERED


def test_a_reply_that_no_process_has_received_is_delivered_instead_of_the_notice(
    store: ServiceStore,
) -> None:
    store.reply(store.waiting(**RESUME), "blue")
    next_turn(store)
    store.recover()

    resumed = next_turn(store)

    assert resumed.reply is not None
    assert resumed.interruption is None
    assert resumed.run.resume_count == 0


def test_a_turn_is_resumed_max_resumes_times_and_then_fails_with_the_reason(
    store: ServiceStore,
) -> None:
    run = interrupted(store, max_resumes=2)
    next_turn(store)
    store.recover()
    store.advance(10)
    end_pauses(store)
    next_turn(store)
    assert store.get(run).resume_count == 2

    store.recover()

    run = store.get(run)
    assert run.status is RunStatus.FAILED
    assert run.error == RunError(
        code="ORCHESTRATOR_RESTART_INTERRUPTED",
        message="The run was interrupted, and its turn had been resumed max_resumes times already.",
    )


def test_each_further_resume_of_a_turn_waits_longer(store: ServiceStore) -> None:
    run = interrupted(store, max_resumes=9)
    assert run.resume_at is None
    waits = []
    for _ in range(8):
        next_turn(store)
        store.recover()
        found = store.get(run)
        assert found.resume_at is not None
        assert found.recovery is not None
        waits.append((found.resume_at - found.recovery.recovered_at).total_seconds())
        assert store.take() is None
        store.advance(waits[-1])
        end_pauses(store)

    assert waits == [10, 20, 40, 80, 160, 300, 300, 300]


def test_a_turn_in_its_pause_is_not_taken_before_the_pause_has_passed(store: ServiceStore) -> None:
    run = interrupted(store)
    next_turn(store)
    store.recover()

    store.advance(5)
    end_pauses(store)
    assert store.take() is None
    store.step_wall_clock(timedelta(days=365))  # the wall clock does not matter
    end_pauses(store)
    assert store.take() is None
    store.advance(6)
    end_pauses(store)

    assert next_turn(store).run.key == run.key
    assert store.get(run).resume_at is None


def test_a_pause_goes_on_after_a_reboot_of_the_machine(store: ServiceStore) -> None:
    run = interrupted(store)
    next_turn(store)
    store.recover()
    store.reboot(60)
    store.restart()
    passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)
    store.apply_recovery()

    end_pauses(store)

    next_turn(store)
    assert store.get(run).resume_count == 2


def test_a_pause_after_a_reboot_leaves_the_deadline_of_the_run_where_it_was(
    store: ServiceStore,
) -> None:
    run = interrupted(store, max_run_s=86_400.0)
    deadline = next_turn(store).run.run_deadline_at
    assert deadline is not None
    store.reboot(60)
    store.restart()
    store.apply_recovery()
    passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)

    left_us = store.column(run, "run_due_us") - store.steady.us
    pause_us = store.column(run, "resume_due_us") - store.steady.us

    assert left_us / 1e6 == (deadline - store.now).total_seconds()
    assert 0 < pause_us <= 10_000_000


def test_a_restart_in_the_pause_keeps_the_pause_and_counts_nothing(store: ServiceStore) -> None:
    run = interrupted(store)
    next_turn(store)
    store.recover()
    before = store.get(run)

    for _ in range(5):
        store.recover()

    after = store.get(run)
    assert (after.status, after.resume_at, after.resume_count) == (
        RunStatus.QUEUED, before.resume_at, 1,
    )  # fmt: skip


def test_a_run_in_its_pause_can_be_canceled(store: ServiceStore) -> None:
    run = interrupted(store)
    next_turn(store)
    store.recover()

    assert store.cancel(run).status is RunStatus.CANCELED
    store.advance(1000)
    end_pauses(store)
    assert store.take() is None
    assert store.get(run).resume_at is None


def test_the_count_begins_anew_with_the_next_reply(store: ServiceStore) -> None:
    run = interrupted(store)
    store.end(next_turn(store), Asked(QUESTION))
    store.reply(run, "go on")

    turn = next_turn(store)

    assert turn.interruption is None
    assert store.get(run).resume_count == 0


@pytest.mark.parametrize("profile", Profile)
def test_without_a_session_the_run_starts_from_the_beginning(
    store: ServiceStore, profile: Profile
) -> None:
    turn = store.running(**RESUME, profile=profile)
    store.recover()
    run = store.get(turn.run)
    assert run.recovery is not None
    assert run.recovery.recovery_reason == "interrupted_before_session"

    again = next_turn(store)

    assert (again.run.attempt, again.run.turn) == (2, 1)
    assert again.interruption is None
    store.recover()
    failed = store.get(run)
    assert failed.status is RunStatus.FAILED
    assert failed.error == RunError(
        code="ORCHESTRATOR_RESTART_INTERRUPTED",
        message="The run was interrupted, there is no session to resume, and it had been started"
        " max_attempts times already.",
    )


def test_a_queued_run_stays_queued(store: ServiceStore) -> None:
    run = store.create(**RESUME)

    store.recover()

    assert store.get(run).status is RunStatus.QUEUED
    assert next_turn(store).run.attempt == 1


@pytest.mark.parametrize("cause", InterruptionCause)
def test_an_interruption_without_a_restart_is_resumed_too(
    store: ServiceStore, cause: InterruptionCause
) -> None:
    turn = store.running(**RESUME)
    store.keep_session(turn)

    run = store.end(turn, Interrupted("Why.", cause))

    assert run.status is RunStatus.QUEUED
    resumed = next_turn(store)
    assert resumed.interruption is not None
    assert resumed.interruption.cause is cause


def test_interruptions_without_a_restart_are_bounded_and_wait_too(store: ServiceStore) -> None:
    turn = store.running(**RESUME | {"max_resumes": 1})
    store.keep_session(turn)
    store.end(turn, STANDSTILL)

    run = store.end(next_turn(store), STANDSTILL)

    assert run.status is RunStatus.FAILED
    assert run.error == RunError(
        code="ORCHESTRATOR_RESTART_INTERRUPTED",
        message="The service was suspended. The run was interrupted, and its turn had been resumed"
        " max_resumes times already.",
    )


def test_a_second_interruption_without_a_restart_waits(store: ServiceStore) -> None:
    turn = store.running(**RESUME)
    store.keep_session(turn)
    store.end(turn, STANDSTILL)

    run = store.end(next_turn(store), STANDSTILL)

    assert run.resume_at is not None
    assert store.take() is None


def test_a_session_that_turns_out_to_be_lost_starts_the_run_from_the_beginning(
    store: ServiceStore,
) -> None:
    interrupted(store)

    run = store.end(next_turn(store), SessionGone(LOST))

    assert (run.status, run.session) == (RunStatus.QUEUED, None)
    again = next_turn(store)
    assert (again.run.attempt, again.run.turn, again.interruption) == (2, 1, None)


def test_a_lost_session_without_attempts_left_fails_with_both_reasons(store: ServiceStore) -> None:
    interrupted(store, max_attempts=1)

    run = store.end(next_turn(store), SessionGone(LOST))

    assert run.status is RunStatus.FAILED
    assert run.error == RunError(
        code="SESSION_RESUME_FAILED",
        message="No such session. The run was interrupted, there is no session to resume, and it"
        " had been started max_attempts times already.",
    )


@pytest.mark.parametrize("code", [ErrorCode.ENGINE_FAILED, ErrorCode.INTERACTION_PROCESS_LOST])
def test_failures_of_the_agent_are_no_interruptions(store: ServiceStore, code: ErrorCode) -> None:
    turn = store.running(**RESUME)
    store.keep_session(turn)

    run = store.end(turn, Failed(RunError(code=code, message="x")))

    assert run.status is RunStatus.FAILED


def test_a_lost_take_of_a_resumed_turn_is_undone_completely(store: ServiceStore) -> None:
    run = interrupted(store)
    taken(store)

    turn_starts.requeue_unlaunched(store.db, owner=store.owner, held=[], now=store.tick())

    assert store.get(run).resume_count == 0
    again = taken(store)
    assert again.run.turn == 2
    assert again.interruption is not None
    assert again.interruption.times == 1


def test_the_end_of_a_pause_of_an_older_epoch_changes_nothing(store: ServiceStore) -> None:
    run = interrupted(store)
    next_turn(store)
    store.recover()
    old = store.owner
    store.restart()
    store.advance(100)
    before = store.get(run)

    with pytest.raises(Fenced):
        passed_deadlines.end_pauses(store.db, [run.key], owner=old, steady=store.steady)

    assert store.get(run) == before


def test_a_run_with_another_policy_keeps_its_rules(store: ServiceStore) -> None:
    turn = store.running()
    store.keep_session(turn)

    store.recover()

    run = store.get(turn.run)
    assert run.recovery is not None
    assert run.recovery.recovery_reason == "running_interrupted"


def test_a_pause_is_recorded_just_before_a_steady_clock_needs_more_than_32_bits(
    store: ServiceStore,
) -> None:
    run = interrupted(store)
    next_turn(store)
    store.steady_us = 2**31 - 8_000_000

    store.recover()

    found = store.get(run)
    assert (found.status, found.quarantined) == (RunStatus.QUEUED, False)
    assert store.column(run, "resume_due_us") - store.steady.us in range(9_000_000, 10_000_001)


def test_a_reply_of_an_earlier_attempt_is_not_repeated(store: ServiceStore) -> None:
    run = store.reply(store.waiting(**RESUME), "blue")
    turn = next_turn(store)
    turns.record_delivered(store.db, turn, owner=store.owner, number=1)
    store.recover()
    store.end(next_turn(store), SessionGone(LOST))
    second = next_turn(store)
    assert second.run.attempt == 2
    store.keep_session(second, "another session")
    store.recover()

    resumed = next_turn(store)

    assert resumed.run.run_id == run.run_id
    assert resumed.interruption is not None
    assert resumed.interruption.reply is None


def test_an_accepted_reply_whose_session_is_lost_is_not_discarded(store: ServiceStore) -> None:
    run = store.reply(store.waiting(**RESUME), "blue")
    next_turn(store)
    store.set(run, session_verdict="INVALID", session_reason="missing")

    store.recover()

    found = store.get(run)
    assert found.recovery is not None
    assert found.recovery.recovery_reason == "accepted_reply_session_lost"
    assert found.reopenable_until is not None


def test_a_shim_that_is_lost_before_the_reply_was_read_fails_the_run(store: ServiceStore) -> None:
    store.reply(store.waiting(**RESUME), "blue")

    run = store.end(next_turn(store), Interrupted("Lost.", InterruptionCause.SHIM_LOST))

    assert run.status is RunStatus.FAILED
    assert run.error == RunError(code="SUPERVISION_LOST", message="Lost.")


def test_a_launch_whose_agent_was_not_started_uses_up_no_resume(store: ServiceStore) -> None:
    run = interrupted(store, max_resumes=1)
    for _ in range(5):
        assert taken(store).interruption is not None
        store.recover()

    assert store.get(run).status is RunStatus.QUEUED
    assert store.get(run).resume_count == 0


def test_a_start_that_is_recorded_twice_is_counted_once(store: ServiceStore) -> None:
    run = interrupted(store)
    turn = next_turn(store)

    launch_records.record_running(store.db, turn.launch, owner=store.owner)

    assert store.get(run).resume_count == 1


def test_a_pause_that_another_machine_recorded_is_converted(store: ServiceStore) -> None:
    run = interrupted(store, max_run_s=86_400.0)
    next_turn(store)
    here, uptime_us = store.clock, store.steady_us
    store.clock, store.steady_us = "another machine", uptime_us + 10**13
    store.restart()
    store.apply_recovery()  # killed before it has converted the deadlines
    store.clock, store.steady_us = here, uptime_us
    store.restart()
    store.apply_recovery()

    passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)

    assert store.column(run, "resume_due_us") - store.steady.us <= 10_000_000


def test_a_wall_clock_that_was_set_back_prolongs_no_pause(store: ServiceStore) -> None:
    run = interrupted(store)
    next_turn(store)
    store.recover()
    store.reboot(60)
    store.step_wall_clock(timedelta(days=-365))
    store.restart()

    passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)

    assert store.column(run, "resume_due_us") - store.steady.us == 300_000_000


def test_a_queued_run_that_can_be_neither_resumed_nor_started_fails(
    store: ServiceStore,
) -> None:
    run = interrupted(store, max_attempts=1)
    next_turn(store)
    store.recover()  # in its pause
    store.set(run, session_verdict="INVALID", session_reason="missing")

    store.recover()

    found = store.get(run)
    assert found.status is RunStatus.FAILED
    assert found.recovery is not None
    assert found.recovery.recovery_reason == "attempts_used_up"
    assert found.resume_at is None
    assert store.column(run, "resume_due_us") is None


def test_the_count_of_a_sticky_process_begins_anew_with_its_next_reply(store: ServiceStore) -> None:
    run = interrupted(store, profile=Profile.STICKY_PROCESS)
    turn = next_turn(store)
    assert store.get(run).resume_count == 1
    store.ask_and_stay(turn)

    store.reply(run, "go on")

    assert store.get(run).resume_count == 0
