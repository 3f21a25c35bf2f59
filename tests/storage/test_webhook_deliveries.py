"""Deliveries of webhooks are recorded with the events of runs, and kept until they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import Profile, RestartPolicy, Run, RunStatus
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.storage import (
    adoption,
    instances,
    reopening,
    runs,
    webhook_deliveries,
    webhook_outbox,
)
from runrecovery_service.storage.database import Stale
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.webhook_deliveries import Backlog
from storage.service_store import QUESTION, ServiceStore, boot

WAITING, ENDED, RECOVERED = WebhookEvent
OF_RUN = "SELECT event, sequence, status FROM webhook_delivery WHERE run = ? ORDER BY id"


def webhook(
    name: str = "chat",
    events: Iterable[WebhookEvent] = WebhookEvent,
    engines: frozenset[str] | None = None,
) -> WebhookFilter:
    return WebhookFilter(name=name, events=frozenset(events), engines=engines)


@pytest.fixture
def store(store: ServiceStore) -> ServiceStore:
    """A store with one webhook, `chat`, that gets every event."""
    store.db.webhooks = (webhook(),)
    return store


def of_run(store: ServiceStore, run: Run) -> list[tuple[Any, ...]]:
    """Return event, sequence and status of the deliveries of a run."""
    return store.rows(OF_RUN, run.key)


def due(store: ServiceStore, name: str = "chat", **named: Any) -> list[int]:
    """Return the keys of runs with due deliveries."""
    given: dict[str, Any] = {"without": [], "limit": 10} | named
    return webhook_deliveries.due_runs(store.db, store.owner.instance, name, **given)


def deliver(store: ServiceStore, run: Run, name: str = "chat") -> int:
    """Record that the next delivery of a run has arrived, and return its sequence number."""
    found = webhook_deliveries.next_delivery(store.db, store.owner.instance, name, run.key)
    assert found is not None
    webhook_deliveries.remove_delivered(store.db, found)
    return found.sequence


# -- what is recorded ------------------------------------------------------------------------------


def test_questions_and_ends_are_recorded_with_the_sequences_of_their_events(
    store: ServiceStore,
) -> None:
    run = store.waiting()
    store.reply(run)
    turn = store.take()
    assert turn is not None
    store.end(turn, Succeeded({"done": True}))

    assert of_run(store, run) == [("WAITING_USER", 3, "WAITING_USER"), ("ENDED", 6, "SUCCEEDED")]
    first = webhook_deliveries.next_delivery(store.db, "default", "chat", run.key)
    assert first is not None
    assert (first.run_id, first.engine, first.event) == (run.run_id, "demo", WAITING)
    assert first.created_at == run.updated_at


def test_a_carried_out_cancel_is_an_end_and_its_request_is_no_event(store: ServiceStore) -> None:
    sticky = store.waiting(profile=Profile.STICKY_PROCESS)
    canceled = store.cancel(store.create())
    store.cancel(sticky)

    assert of_run(store, canceled) == [("ENDED", 2, "CANCELED")]
    assert of_run(store, sticky) == [("WAITING_USER", 3, "WAITING_USER")]


def test_a_webhook_gets_only_the_events_and_engines_that_it_names(store: ServiceStore) -> None:
    store.db.webhooks = (
        webhook("asks", [WAITING]),
        webhook("ends", [ENDED]),
        webhook("demo", engines=frozenset({"demo"})),
        webhook("other", engines=frozenset({"other"})),
    )
    waiting, ended = store.waiting(), store.cancel(store.create())

    assert store.rows("SELECT webhook, run FROM webhook_delivery ORDER BY 1, 2") == [
        ("asks", waiting.key),
        ("demo", waiting.key),
        ("demo", ended.key),
        ("ends", ended.key),
    ]


def test_without_webhooks_nothing_is_recorded(store: ServiceStore) -> None:
    store.db.webhooks = ()
    store.cancel(store.waiting())
    store.waiting()
    store.recover()

    assert store.rows("SELECT * FROM webhook_delivery") == []


def test_a_change_that_is_rolled_back_leaves_no_delivery(store: ServiceStore) -> None:
    run = store.create()
    with pytest.raises(Stale), store.db.transaction():
        _cancel_and_fail(store, run)

    assert of_run(store, run) == []


def _cancel_and_fail(store: ServiceStore, run: Run) -> None:
    store.cancel(run)
    raise Stale


# -- the decisions of recoveries -----------------------------------------------------------------


def test_each_decision_of_a_recovery_is_recorded_once(store: ServiceStore) -> None:
    waits, works = store.waiting(), store.running().run
    store.recover()
    store.recover()

    assert of_run(store, waits) == [
        ("WAITING_USER", 3, "WAITING_USER"),
        ("RECOVERED", 4, "WAITING_USER"),
    ]
    assert of_run(store, works) == [("RECOVERED", 3, "FAILED")]
    assert store.rows("SELECT error_code FROM webhook_delivery WHERE status = 'FAILED'") == [
        ("ORCHESTRATOR_RESTART_INTERRUPTED",)
    ]


def test_a_webhook_without_the_event_recovered_gets_a_decision_as_its_end_or_question(
    store: ServiceStore,
) -> None:
    store.db.webhooks = (webhook("chat", [WAITING, ENDED]), webhook("ends", [ENDED]))
    keeps, fails = store.waiting(), store.running().run
    requeued = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2).run
    asked = store.running()
    store.keep_session(asked)
    before = len(store.rows("SELECT * FROM webhook_delivery"))

    store.recover(found={asked.run.key: FoundEnd(end=Asked(QUESTION))})

    found = store.rows("SELECT webhook, run, event, status FROM webhook_delivery ORDER BY id")
    assert sorted(found[before:]) == [
        ("chat", fails.key, "ENDED", "FAILED"),
        ("chat", asked.run.key, "WAITING_USER", "WAITING_USER"),
        ("ends", fails.key, "ENDED", "FAILED"),
    ]
    assert {keeps.key, requeued.key}.isdisjoint(run for _, run, *_ in found[before:])


def test_decisions_are_recorded_for_the_engines_that_a_webhook_names(store: ServiceStore) -> None:
    store.db.webhooks = (webhook("other", engines=frozenset({"other", "third"})),)
    store.create()
    other = store.create(engine="other")
    store.recover()

    assert store.rows("SELECT run, event FROM webhook_delivery") == [(other.key, "RECOVERED")]


def test_a_quarantined_run_is_recorded(store: ServiceStore) -> None:
    run = store.create()
    store.set(run, status="???")
    store.recover()

    assert of_run(store, run) == [("RECOVERED", 2, "???")]


def test_the_decisions_of_a_planned_stop_and_of_the_next_start_are_both_recorded(
    store: ServiceStore,
) -> None:
    run = store.waiting()
    store.apply_recovery(cause=Cause.SHUTDOWN)
    store.reply(run)
    store.recover()

    assert [sequence for _, sequence, _ in of_run(store, run)] == [3, 4, 6]


def test_a_reopened_run_that_waits_again_asks_again(store: ServiceStore) -> None:
    run = store.waiting()
    store.set(run, session_verdict="INVALID")
    store.recover()
    reopening.reopen(
        store.db,
        run.run_id,
        handle=None,
        session_type_of=lambda _: "jsonl",
        wait_s_of=lambda _: 90.0,
        owner=store.owner,
        etag=None,
        receipt=None,
        due_in=store.due_in,
        steady=store.steady,
        now=store.tick(),
    )

    assert runs.get(store.db, run.run_id).status is RunStatus.WAITING_USER
    assert of_run(store, run) == [
        ("WAITING_USER", 3, "WAITING_USER"),
        ("RECOVERED", 4, "FAILED"),
        ("WAITING_USER", 5, "WAITING_USER"),
    ]


# -- how they are taken --------------------------------------------------------------------------


def test_deliveries_of_a_run_are_due_in_order_until_they_arrive(store: ServiceStore) -> None:
    run = store.waiting()
    store.cancel(run)

    assert (due(store), deliver(store, run)) == ([run.key], 3)
    assert (due(store), deliver(store, run)) == ([run.key], 4)
    assert due(store) == []
    assert webhook_deliveries.next_delivery(store.db, "default", "chat", run.key) is None


def test_each_run_is_due_once_in_turn(store: ServiceStore) -> None:
    first, second, third = (store.waiting() for _ in range(3))
    store.cancel(first)

    assert due(store) == [first.key, second.key, third.key]
    assert due(store, without=[first.key]) == [second.key, third.key]
    assert due(store, limit=1) == [first.key]
    assert due(store, after=first.key) == [second.key, third.key, first.key]
    assert due(store, after=first.key, limit=2, without=[third.key]) == [second.key, first.key]
    assert due(store, after=third.key) == [first.key, second.key, third.key]


def test_an_instance_delivers_only_what_is_its_own(store: ServiceStore) -> None:
    run = store.waiting()

    assert webhook_deliveries.due_runs(store.db, "other", "chat", without=[], limit=9) == []
    assert webhook_deliveries.next_delivery(store.db, "other", "chat", run.key) is None
    assert webhook_deliveries.backlogs(store.db, "other") == {}


def test_a_superseded_epoch_removes_no_delivery(store: ServiceStore) -> None:
    run, owner = store.waiting(), store.owner
    found = webhook_deliveries.next_delivery(store.db, "default", "chat", run.key)
    assert found is not None
    store.restart()
    store.db.guard(lambda db: instances.demand_current(db, owner))

    with pytest.raises(Fenced):
        webhook_deliveries.remove_delivered(store.db, found)


def test_an_event_whose_row_reuses_the_key_of_a_delivered_one_is_not_removed(
    store: ServiceStore,
) -> None:
    run = store.waiting()
    found = webhook_deliveries.next_delivery(store.db, "default", "chat", run.key)
    assert found is not None
    other: dict[str, Any] = {"run": run.key + 1, "sequence": 4, "webhook": "other"}
    for column, value in other.items():
        webhook_deliveries.remove_delivered(store.db, replace(found, **{column: value}))

    assert len(of_run(store, run)) == 1
    webhook_deliveries.remove_delivered(store.db, found)
    assert of_run(store, run) == []


def test_old_deliveries_are_given_up_and_can_be_tried_again(store: ServiceStore) -> None:
    old, other = store.waiting(), store.waiting()
    store.advance(100)
    limit = store.now
    young = store.waiting()

    def give_up(only: list[int] | None) -> int:
        return webhook_deliveries.give_up(
            store.db, "default", "chat", before=limit, runs=only, now=store.tick()
        )

    assert (give_up([young.key, old.key]), due(store)) == (1, [other.key, young.key])
    assert webhook_deliveries.next_delivery(store.db, "default", "chat", old.key) is None
    assert (give_up(None), due(store)) == (1, [young.key])
    assert webhook_deliveries.backlogs(store.db, "default") == {
        "chat": Backlog(due=1, oldest_at=young.updated_at, given_up=2)
    }

    assert webhook_deliveries.try_again(store.db, "default", "chat") == 2
    assert due(store) == [old.key, other.key, young.key]


def test_deliveries_that_were_given_up_long_ago_are_forgotten(store: ServiceStore) -> None:
    store.waiting()
    store.waiting()
    given_up_at = store.tick()
    webhook_deliveries.give_up(
        store.db, "default", "chat", before=given_up_at, runs=None, now=given_up_at
    )
    store.waiting()

    def forget_after(before: timedelta) -> int:
        return webhook_deliveries.forget_given_up(
            store.db, "default", "chat", before=given_up_at + before
        )

    assert [forget_after(timedelta(0)), forget_after(timedelta(seconds=1))] == [0, 2]
    assert len(due(store)) == 1


def forget(store: ServiceStore, **named: Any) -> dict[str, int]:
    """Delete the deliveries of webhooks that are not configured."""
    given: dict[str, Any] = {"stopping": lambda: False} | named
    return webhook_outbox.forget_removed(store.db, store.owner, **given)


def test_the_deliveries_of_removed_webhooks_are_forgotten_in_short_transactions(
    store: ServiceStore,
) -> None:
    store.db.webhooks = (webhook("kept"), webhook("removed"), webhook("renamed"))
    run = store.waiting()
    store.cancel(run)
    webhook_deliveries.give_up(
        store.db, "default", "renamed", before=store.tick(), runs=None, now=store.now
    )
    store.db.webhooks = (webhook("kept"),)

    assert forget(store, rows=1) == {"removed": 2, "renamed": 2}
    assert (due(store, "kept"), due(store, "removed")) == ([run.key], [])
    assert forget(store) == {}
    store.db.webhooks = ()
    assert forget(store) == {"kept": 2}


def test_a_stop_or_a_newer_epoch_ends_the_forgetting(store: ServiceStore) -> None:
    store.waiting()
    store.db.webhooks = ()
    with pytest.raises(RecoveryInterrupted):
        forget(store, stopping=lambda: True)
    owner = store.owner
    store.restart()
    store.owner = owner
    with pytest.raises(Fenced):
        forget(store)

    assert len(store.rows("SELECT * FROM webhook_delivery")) >= 1


def test_a_backlog_is_counted_by_indexes(store: ServiceStore) -> None:
    """Each scrape counts the backlog, and reading 100,000 rows would take a tenth of a second."""
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL chooses its plans by the size of the tables")
    asked: list[str] = []
    execute = store.db.execute

    def note(sql: str, params: Sequence[object] = ()) -> Any:
        asked.extend(row[3] for row in execute(f"EXPLAIN QUERY PLAN {sql}", params).fetchall())
        return execute(sql, params)

    store.db.execute = note  # type: ignore[method-assign]
    webhook_deliveries.backlogs(store.db, "default")

    found = [plan for plan in asked if "webhook_delivery" in plan]
    assert len(found) == 3
    assert all(plan.startswith("SEARCH webhook_delivery USING ") for plan in found), found


def test_another_instance_name_adopts_the_deliveries_of_a_sqlite_store(
    store: ServiceStore,
) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL is shared")
    run = store.cancel(store.create())
    store.owner = instances.claim(store.db, boot("other"), now=store.tick())

    adoption.adopt(store.db, store.owner, record=lambda db, found: None, stopping=lambda: False)

    assert due(store) == [run.key]
