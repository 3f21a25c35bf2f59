"""A recovery finds the result or the question of a turn whose end was not recorded."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import pytest
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Profile,
    RecoveryState,
    RestartPolicy,
    Run,
    RunStatus,
    Session,
    ToolCall,
)
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import Budget, SessionUsage, TurnUsage, Usage
from runrecovery_service.storage import found_ends, interactions, launch_records, turns
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.recovery_scope import RecoveryScope
from runrecovery_service.storage.rows import usage_to_json
from runrecovery_service.storage.turns import Turn
from storage.service_store import QUESTION, Crash, CrashingDatabase, ServiceStore

RESULT: Final = FoundEnd(end=Succeeded({"done": True, "text": "ä"}))
ASKED: Final = FoundEnd(end=Asked(QUESTION))


def in_turn(store: ServiceStore, **changes: Any) -> Turn:
    """Return a turn whose agent runs, and has named its session."""
    turn = store.running(**changes)
    store.keep_session(turn)
    launch_records.record_gated(store.db, turn.launch, owner=store.owner, pid=7, start_ticks=9)
    launch_records.record_running(store.db, turn.launch, owner=store.owner)
    return turn


def recovered(store: ServiceStore, turn: Turn, found: FoundEnd) -> Run:
    store.recover(found={turn.run.key: found})
    return store.get(turn.run)


# -- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", list(RestartPolicy))
def test_a_run_whose_result_is_found_has_succeeded(
    store: ServiceStore, policy: RestartPolicy
) -> None:
    turn = in_turn(store, restart_policy=policy, max_attempts=3, max_resumes=3)
    before = store.get(turn.run)

    run = recovered(store, turn, RESULT)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True, "text": "ä"})
    assert (run.error, run.session, run.pending) == (None, None, None)
    assert run.ended_at is not None
    assert run.version == before.version + 1
    assert run.recovery is not None
    assert (run.recovery.recovery_reason, run.recovery.recovery_state) == (
        "result_found_in_output",
        RecoveryState.SUCCEEDED_RECONCILED,
    )
    assert run.recovery.status_before is RunStatus.RUNNING


@pytest.mark.parametrize("policy", list(RestartPolicy))
def test_a_run_whose_question_is_found_waits_for_its_user(
    store: ServiceStore, policy: RestartPolicy
) -> None:
    turn = in_turn(store, restart_policy=policy, max_attempts=3, max_resumes=3)
    before = store.get(turn.run)

    run = recovered(store, turn, ASKED)

    assert (run.status, run.interaction_count) == (RunStatus.WAITING_USER, 1)
    assert run.session == Session(type="demo", handle="secret", turn=1)
    assert run.pending is not None
    assert (run.pending.prompt, run.pending.options) == (QUESTION.prompt, QUESTION.options)
    assert (run.pending.state, run.pending.wait_deadline_at) == (InteractionState.OPEN, None)
    assert run.version == before.version + 1
    assert run.recovery is not None
    assert run.recovery.recovery_reason == "question_found_in_output"
    assert store.column(run, "wait_due_us") is None


def test_a_run_that_has_used_up_its_budget_is_not_asked_a_question_that_is_found(
    store: ServiceStore,
) -> None:
    turn = in_turn(store, restart_policy=RestartPolicy.RESUME, max_resumes=3)
    used = TurnUsage(turn=Usage(input_tokens=7))

    run = recovered(store, turn, replace(ASKED, used=used, is_last=True))

    assert (run.status, run.pending, run.interaction_count) == (RunStatus.FAILED, None, 0)
    assert run.error is not None
    assert run.error.code == ErrorCode.BUDGET_EXCEEDED
    assert run.recovery is not None
    assert run.recovery.recovery_reason == "budget_used_up"
    assert run.usage == Usage(input_tokens=7)


def test_a_question_for_permission_that_is_found_has_its_call(store: ServiceStore) -> None:
    call = ToolCall(
        id="c1", tool="Bash", input={"command": "ä"}, workspace="/w", pattern="Bash", is_last=False
    )
    asked = FoundEnd(end=Asked(replace(QUESTION, tool_call=call)))

    run = recovered(store, in_turn(store), asked)

    assert run.pending is not None
    assert run.pending.tool_call == call


def test_the_reply_to_a_found_question_resumes_the_session(store: ServiceStore) -> None:
    run = recovered(store, in_turn(store), ASKED)

    store.reply(run)
    turn = store.take()

    assert turn is not None
    assert turn.run.session == Session(type="demo", handle="secret", turn=1)
    assert turn.reply is not None
    assert (turn.reply.interaction_id, turn.reply.response) == (1, "yes")


def test_a_found_question_comes_after_the_earlier_ones(store: ServiceStore) -> None:
    store.reply(store.waiting())
    turn = store.take()
    assert turn is not None

    run = recovered(store, turn, ASKED)

    assert run.pending is not None
    assert (run.interaction_count, run.pending.interaction_id) == (2, 2)
    first = interactions.find(store.db, run.key, 1)
    assert first is not None
    assert first.state is InteractionState.ANSWERED


def test_a_found_question_that_need_not_be_answered_has_a_deadline(store: ServiceStore) -> None:
    turn = in_turn(store, require_user_reply=False)

    run = recovered(store, turn, replace(ASKED, wait_s=60.0))

    assert run.pending is not None
    assert run.pending.wait_deadline_at == run.pending.asked_at + timedelta(seconds=60)
    assert store.column(run, "wait_due_us") == store.steady.us + 60_000_000
    assert store.column(run, "due_clock") == store.steady.clock


def test_the_deadlines_of_a_found_question_are_converted_together_after_a_reboot(
    store: ServiceStore,
) -> None:
    turn = in_turn(store, require_user_reply=False, max_run_s=3600.0)
    store.reboot(5.0)

    run = recovered(store, turn, replace(ASKED, wait_s=60.0))

    assert store.column(run, "due_clock") == ""


# -- what is not ---------------------------------------------------------------------------------


def test_a_cancel_wins_over_a_result_that_is_found(store: ServiceStore) -> None:
    turn = in_turn(store)
    store.cancel(store.get(turn.run))

    run = recovered(store, turn, RESULT)

    assert (run.status, run.output) == (RunStatus.CANCELED, None)


def test_a_question_without_its_session_is_not_asked(store: ServiceStore) -> None:
    turn = in_turn(store)
    store.set(turn.run, session_value=None)

    run = recovered(store, turn, ASKED)

    assert (run.status, run.interaction_count) == (RunStatus.FAILED, 0)
    assert run.recovery is not None
    assert run.recovery.recovery_reason == "running_interrupted"


def test_a_question_of_a_sticky_process_is_not_asked(store: ServiceStore) -> None:
    turn = in_turn(store, profile=Profile.STICKY_PROCESS)

    run = recovered(store, turn, ASKED)

    assert run.status is RunStatus.FAILED


def test_a_run_that_left_its_turn_meanwhile_is_decided_by_its_status(store: ServiceStore) -> None:
    waiting = store.waiting()

    store.recover(found={waiting.key: RESULT})
    run = store.get(waiting)

    assert (run.status, run.output) == (RunStatus.WAITING_USER, None)


# -- the turns to read ---------------------------------------------------------------------------


def open_turns(store: ServiceStore, **span: int) -> list[OpenTurn]:
    scope = RecoveryScope(owner=store.owner, before=store.owner.epoch + 1)
    return found_ends.open_turns(store.db, scope, **span)


def test_the_usage_of_the_session_is_that_from_before_the_turn(store: ServiceStore) -> None:
    before, own = Usage(input_tokens=50), Usage(input_tokens=7, output_tokens=2)
    turn = in_turn(store)
    store.set(turn.run, session_usage=usage_to_json(SessionUsage(total=before)))
    assert [one.session_usage for one in open_turns(store)] == [SessionUsage(total=before)]
    used = TurnUsage(turn=own, session=SessionUsage(total=before.plus(own)))

    turns.record_usage(store.db, turn, owner=store.owner, used=used)

    assert [one.session_usage for one in open_turns(store)] == [SessionUsage(total=before)]


def test_the_usage_before_a_turn_has_nothing_of_the_turn(store: ServiceStore) -> None:
    before, own = Usage(input_tokens=50, model="m"), Usage(input_tokens=7, output_tokens=2)
    first = in_turn(store, budget=Budget(max_tokens=60))
    turns.record_usage(store.db, first, owner=store.owner, used=TurnUsage(turn=before))
    store.reply(store.end(first, Asked(QUESTION)))
    turn = store.take()
    assert turn is not None
    launch_records.record_gated(store.db, turn.launch, owner=store.owner, pid=7, start_ticks=9)
    turns.record_usage(store.db, turn, owner=store.owner, used=TurnUsage(turn=own))

    (found,) = open_turns(store)

    assert (found.used_before, found.budget) == (before, Budget(max_tokens=60))


def test_the_turns_to_read_are_those_that_run_with_a_process(store: ServiceStore) -> None:
    turn = in_turn(store, session_timeout_s=30.0)
    store.waiting()
    store.running()  # its shim is not recorded
    store.cancel(in_turn(store).run)

    assert open_turns(store) == [
        OpenTurn(
            run_key=turn.run.key,
            run_id=turn.run.run_id,
            engine="demo",
            profile=Profile.RESUMABLE,
            attempt=1,
            turn=1,
            session=Session(type="demo", handle="secret", turn=1),
            boot_id="boot",
            shim=(7, 9),
            session_timeout_s=30.0,
            require_user_reply=True,
        )
    ]
    assert open_turns(store, first=turn.run.key + 1) == []
    assert open_turns(store, last=turn.run.key - 1) == []


def test_a_turn_whose_launch_an_earlier_try_closed_is_read_again(store: ServiceStore) -> None:
    turn = in_turn(store)
    launch_records.close(
        store.db,
        turn.launch,
        launch_records.LaunchEnd(exit_code=None, processes_ended=0, gone=True),
        now=store.tick(),
        reconciliation_key=1,
    )

    assert [one.run_key for one in open_turns(store)] == [turn.run.key]


# -- crashes -------------------------------------------------------------------------------------


def test_a_recovery_that_is_killed_at_any_statement_records_each_end_once(
    store: ServiceStore,
) -> None:
    ended, asking = in_turn(store), in_turn(store)
    found = {ended.run.key: RESULT, asking.run.key: ASKED}
    store.restart()
    at, db = 0, store.db
    while True:
        store.db = CrashingDatabase(db, at)
        try:
            store.apply_recovery(found=found)
            break
        except Crash:
            at += 1
        finally:
            store.db = db

    runs = [store.get(turn.run) for turn in (ended, asking)]
    assert at > 5
    assert [run.status for run in runs] == [RunStatus.SUCCEEDED, RunStatus.WAITING_USER]
    assert [run.interaction_count for run in runs] == [0, 1]
    assert store.rows("SELECT run, no FROM interaction") == [(asking.run.key, 1)]
    assert store.rows("SELECT run, no, facts FROM recovery_event ORDER BY run") == [
        (ended.run.key, 1, (Fact.HANDLE | Fact.RESULT).value),
        (asking.run.key, 1, (Fact.HANDLE | Fact.QUESTION).value),
    ]


def test_a_planned_stop_finds_ends_too(store: ServiceStore) -> None:
    turn = in_turn(store)

    store.apply_recovery(cause=Cause.SHUTDOWN, found={turn.run.key: RESULT})

    assert store.get(turn.run).status is RunStatus.SUCCEEDED
