"""The usage of turns is recorded with their end, exactly once, and added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.run import RestartPolicy, Run, RunError, RunEventKind, RunStatus
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import Budget, SessionUsage, TurnUsage, Usage
from runrecovery_service.storage import events, turns, usage
from runrecovery_service.storage.database import Stale
from runrecovery_service.storage.turns import Turn
from storage.service_store import QUESTION, ServiceStore

RESUME: dict[str, Any] = {
    "restart_policy": RestartPolicy.RESUME, "max_resumes": 3, "max_attempts": 2,
}  # fmt: skip
DONE = Succeeded({})


def tokens(count: int, *, cost: int | None = None, model: str = "m") -> Usage:
    """Return a usage in which every number differs."""
    return Usage(
        input_tokens=8 * count,
        cached_input_tokens=4 * count,
        cache_write_input_tokens=2 * count,
        output_tokens=6 * count,
        reasoning_output_tokens=count,
        cost_nanos=cost,
        model=model,
    )


def used(count: int, *, session: int | None = None) -> TurnUsage:
    total = None if session is None else SessionUsage(total=tokens(session))
    return TurnUsage(turn=tokens(count), session=total)


def report(store: ServiceStore, turn: Turn, what: TurnUsage) -> None:
    turns.record_usage(store.db, turn, owner=store.owner, used=what)


def next_turn(store: ServiceStore) -> Turn:
    turn = store.take()
    assert turn is not None
    return turn


def of_engine(store: ServiceStore) -> tuple[int, Usage]:
    (one,) = usage.by_engine(store.db)
    assert one.engine == "demo"
    return one.turns, one.usage


def event_usages(store: ServiceStore, run: Run) -> list[tuple[RunEventKind | None, Usage | None]]:
    found = events.events_after(store.db, store.get(run), 0)
    return [(event.kind, event.usage) for event in found]


def test_a_run_has_the_sum_of_its_turns_and_each_end_its_own_part(store: ServiceStore) -> None:
    turn = store.running()
    store.keep_session(turn)
    run = store.end(turn, Asked(QUESTION), used=TurnUsage(turn=tokens(1, cost=5)))
    assert run.usage == tokens(1, cost=5)
    store.reply(run)

    run = store.end(next_turn(store), DONE, used=TurnUsage(turn=tokens(2, model="")))

    assert run.usage == tokens(3, cost=5)
    assert event_usages(store, run) == [
        (RunEventKind.CREATED, None),
        (RunEventKind.STARTED, None),
        (RunEventKind.ASKED, tokens(1, cost=5)),
        (RunEventKind.ANSWERED, None),
        (RunEventKind.STARTED, None),
        (RunEventKind.SUCCEEDED, tokens(2, model="")),
    ]
    assert of_engine(store) == (2, tokens(3, cost=5, model=""))


def by_model(store: ServiceStore) -> list[tuple[str, int, Usage]]:
    return [(one.engine, one.turns, one.usage) for one in usage.by_model(store.db, store.owner)]


def test_each_report_counts_for_the_model_that_it_names(store: ServiceStore) -> None:
    turn = store.running()
    report(store, turn, TurnUsage(turn=tokens(1, model="")))
    report(store, turn, TurnUsage(turn=tokens(3, model="first", cost=9)))
    report(store, turn, TurnUsage(turn=tokens(4, model="", cost=9)))
    store.end(turn, DONE, used=TurnUsage(turn=tokens(6, model="second", cost=10)))
    store.end(store.running(), DONE, used=TurnUsage(turn=tokens(2, model="first")))

    assert by_model(store) == [
        ("demo", 1, tokens(1, model="")),
        ("demo", 1, tokens(5, model="first", cost=9)),
        ("demo", 0, tokens(2, model="second", cost=1)),
    ]
    assert of_engine(store) == (2, tokens(8, model="", cost=10))


def test_twenty_models_of_an_engine_are_counted_separately_and_the_others_together(
    store: ServiceStore,
) -> None:
    names = [f"m{number:02}" for number in range(22)]
    for name in ("ä", "", *names, "m07", "two lines\n", "x" * 101):
        store.end(store.running(), DONE, used=TurnUsage(turn=tokens(1, model=name)))

    twice = {"m07": 2, "other": 5}
    assert by_model(store) == [
        ("demo", twice.get(name, 1), tokens(twice.get(name, 1), model=name))
        for name in ("", *names[:20], "other")
    ]


def test_the_usage_of_another_instance_is_not_counted_by_model(store: ServiceStore) -> None:
    store.end(store.running(), DONE, used=used(1))
    other = replace(store.owner, instance="other")

    assert usage.by_model(store.db, other) == []


def test_a_run_without_a_report_has_no_usage(store: ServiceStore) -> None:
    run = store.end(store.running(), DONE)

    assert run.usage is None
    assert usage.by_engine(store.db) == []


def test_a_report_in_the_middle_of_a_turn_is_part_of_its_last_one(store: ServiceStore) -> None:
    turn = store.running()
    report(store, turn, used(1))
    report(store, turn, used(3))
    report(store, turn, used(3))
    under_way = store.get(turn.run)
    assert under_way.usage == tokens(3)
    assert under_way.etag == turn.run.etag

    run = store.end(turn, DONE, used=used(4))

    assert run.usage == tokens(4)
    assert of_engine(store) == (1, tokens(4, model=""))


def test_an_end_that_is_recorded_twice_counts_once(store: ServiceStore) -> None:
    turn = store.running()
    store.end(turn, DONE, used=used(2))

    store.end(turn, DONE, used=used(2))
    report(store, turn, used(7))

    assert store.get(turn.run).usage == tokens(2)
    assert of_engine(store) == (1, tokens(2, model=""))


def test_a_killed_service_neither_loses_nor_repeats_recorded_usage(
    store: ServiceStore,
) -> None:
    turn = store.running(**RESUME)
    store.keep_session(turn)
    report(store, turn, used(2, session=2))
    for _ in range(2):
        store.recover()
    assert store.get(turn.run).usage == tokens(2)
    resumed = next_turn(store)
    assert resumed.session_usage == SessionUsage(total=tokens(2))

    run = store.end(resumed, DONE, used=used(3, session=5))

    assert run.usage == tokens(5)
    assert of_engine(store) == (2, tokens(5, model=""))


def test_an_attempt_that_starts_again_keeps_the_usage_and_forgets_the_session(
    store: ServiceStore,
) -> None:
    turn = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    report(store, turn, used(2, session=2))
    store.recover()
    again = next_turn(store)
    assert (again.run.attempt, again.session_usage) == (2, None)

    assert store.end(again, DONE, used=used(1, session=1)).usage == tokens(3)


def test_the_total_of_a_session_survives_a_restart_that_loses_the_session(
    store: ServiceStore,
) -> None:
    turn = store.running()
    store.keep_session(turn)
    run = store.end(turn, Asked(QUESTION), used=used(2, session=2))
    store.set(run, session_verdict="INVALID")
    store.recover()
    assert store.get(run).status is RunStatus.FAILED

    assert usage.of_session(store.db, run.key) == SessionUsage(total=tokens(2))


def test_a_superseded_epoch_records_no_usage(store: ServiceStore) -> None:
    turn, owner = store.running(**RESUME), store.owner
    store.recover()

    with pytest.raises(Fenced):
        turns.record_usage(store.db, turn, owner=owner, used=used(1))

    assert store.get(turn.run).usage is None
    assert usage.by_engine(store.db) == []


def test_a_run_that_another_epoch_takes_over_in_the_middle_of_a_write_is_not_written(
    store: ServiceStore,
) -> None:
    turn, owner = store.running(**RESUME), store.owner
    read_before = store.get(turn.run)
    store.recover()

    with pytest.raises(Stale), store.db.transaction():
        usage.record(store.db, read_before, turn.launch, used(1), owner=owner)

    assert store.get(turn.run).usage is None


def test_an_unreadable_stored_usage_does_not_stop_a_turn(store: ServiceStore) -> None:
    turn = store.running()
    store.set(turn.run, session_usage="[1")
    with store.db.transaction():
        store.db.execute("UPDATE process_lease SET usage = '{\"x\": 1}'")

    assert usage.of_session(store.db, turn.run.key) is None
    assert store.end(turn, DONE, used=used(1)).usage == tokens(1)


def test_a_queued_run_whose_budget_is_used_up_is_failed_and_the_next_one_is_taken(
    store: ServiceStore,
) -> None:
    turn = store.running(**RESUME, budget=Budget(max_tokens=28))
    store.keep_session(turn)
    report(store, turn, used(2))  # 28 tokens
    store.recover()
    assert store.get(turn.run).status is RunStatus.QUEUED
    other = store.create(budget=Budget(max_tokens=1, max_cost_nanos=1))

    taken = next_turn(store)

    assert taken.run.run_id == other.run_id
    assert taken.run.budget == Budget(max_tokens=1, max_cost_nanos=1)
    run = store.get(turn.run)
    assert run.error == RunError(
        code="BUDGET_EXCEEDED", message="The run has used 28 of its 28 tokens."
    )
    assert run.session is None


def test_a_retry_is_an_event_that_changes_no_status(store: ServiceStore) -> None:
    turn = store.running()

    turns.record_retry(store.db, turn, owner=store.owner, message="m", now=store.tick())
    store.end(turn, DONE, used=used(1))

    found = events.events_after(store.db, store.get(turn.run), 2)
    assert [(one.kind, one.status, one.message, one.usage) for one in found] == [
        (RunEventKind.RETRYING, RunStatus.RUNNING, "m", None),
        (RunEventKind.SUCCEEDED, RunStatus.SUCCEEDED, "", tokens(1)),
    ]


def test_the_usage_of_a_found_end_completes_the_recorded_usage(store: ServiceStore) -> None:
    turn = store.running()
    store.keep_session(turn)
    report(store, turn, used(2))
    found = FoundEnd(end=Asked(QUESTION), used=used(3, session=3))

    for _ in range(2):
        store.recover(found={turn.run.key: found})

    run = store.get(turn.run)
    assert (run.status, run.usage) == (RunStatus.WAITING_USER, tokens(3))
    assert of_engine(store) == (1, tokens(3, model=""))
    assert usage.of_session(store.db, run.key) == SessionUsage(total=tokens(3))


def test_the_answer_to_a_found_question_fails_a_run_whose_budget_is_used_up(
    store: ServiceStore,
) -> None:
    turn = store.running(budget=Budget(max_tokens=28))
    store.keep_session(turn)
    store.recover(found={turn.run.key: FoundEnd(end=Asked(QUESTION), used=used(2))})
    run = store.get(turn.run)
    assert run.status is RunStatus.WAITING_USER
    store.reply(run)

    assert store.take() is None

    assert store.get(run).error == RunError(
        code="BUDGET_EXCEEDED", message="The run has used 28 of its 28 tokens."
    )
