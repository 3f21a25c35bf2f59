"""Decisions are read in one order, and a reader can resume after any decision."""

from __future__ import annotations

from datetime import timedelta

import pytest
from runrecovery_service.domain.errors import StorageBusy, WatchCursorInvalid
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.run import RecoveryState
from runrecovery_service.storage import decision_feed, instances, recovery_apply, reports
from runrecovery_service.storage.decision_feed import START, FeedCursor, FeedDecision
from runrecovery_service.storage.recovery_scope import ApplyScope
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot

EVERYTHING = RecoveredFilter()


def complete(store: ServiceStore) -> None:
    store.db.execute("UPDATE reconciliation SET state = 'COMPLETED'")


def recover(store: ServiceStore) -> None:
    store.recover()
    complete(store)


def read(
    store: ServiceStore,
    place: FeedCursor = START,
    wanted: RecoveredFilter = EVERYTHING,
    *,
    limit: int = 2,
) -> list[FeedDecision]:
    """Read to the end in small pages; check that each page begins where the last one ended."""
    found: list[FeedDecision] = []
    while True:
        stretch = decision_feed.decisions_after(store.db, place, wanted, limit=limit)
        found += stretch.decided
        assert stretch.upto >= place
        place = stretch.upto
        if not stretch.more:
            return found


def test_decisions_about_other_engines_are_left_out(store: ServiceStore) -> None:
    runs = [store.waiting(engine=engine) for engine in ("a", "b", "a")]
    recover(store)

    found = [one.run_id for one in read(store, wanted=RecoveredFilter(engines=frozenset({"a"})))]

    assert found == [runs[0].run_id, runs[2].run_id]


def test_decisions_come_in_the_order_of_restarts_and_runs(store: ServiceStore) -> None:
    runs = [store.waiting() for _ in range(5)]
    recover(store)
    for run in runs[:2]:
        store.reply(run)
    recover(store)

    found = [(one.run_id, one.recovery.recovery_reason) for one in read(store)]

    assert found == [
        *((run.run_id, "resumable_waiting_preserved") for run in runs),
        *((run.run_id, "accepted_reply_redriven") for run in runs[:2]),
    ]


def test_the_feed_can_be_resumed_after_every_decision(store: ServiceStore) -> None:
    for _ in range(5):
        store.waiting()
    recover(store)
    every = read(store)

    for at, one in enumerate(every):
        assert read(store, one.cursor) == every[at + 1 :]


def test_a_feed_that_starts_at_the_end_misses_no_later_decision(store: ServiceStore) -> None:
    store.waiting()
    recover(store)
    end = decision_feed.end_cursor(store.db)
    assert read(store, end) == []

    run = store.create()
    recover(store)

    assert [one.run_id for one in read(store, end)] == [run.run_id]


def test_decisions_of_a_running_recovery_are_returned_and_hold_back_later_recoveries(
    store: ServiceStore,
) -> None:
    if store.db.dialect.kind is DatabaseKind.SQLITE:
        pytest.skip("one service at a time")
    for _ in range(4):
        store.create()
    store.restart()
    scope = store.open_report()
    first = recovery_apply.next_batch(store.db, scope, after=0, rows=2)
    assert first is not None
    recovery_apply.apply_batch(store.db, scope, first, report=lambda db, tally: None)
    # Meanwhile another instance begins and completes a recovery.
    other = ServiceStore(db=store.db, owner=instances.claim(store.db, boot("other"), now=store.now))
    other.count = iter(range(100, 200))
    elsewhere = other.create()
    other.recover()
    store.db.execute("UPDATE reconciliation SET state = 'COMPLETED' WHERE instance = 'other'")

    so_far = read(store)
    second = recovery_apply.next_batch(store.db, scope, after=first.last, rows=2)
    assert second is not None
    recovery_apply.apply_batch(store.db, scope, second, report=lambda db, tally: None)
    complete(store)

    assert len(so_far) == 2
    rest = read(store, so_far[-1].cursor)
    assert [one.run_id for one in rest][2:] == [elsewhere.run_id]
    assert len(rest) == 3


def test_a_recovery_of_a_dead_service_holds_back_no_other(store: ServiceStore) -> None:
    store.create()
    store.restart()
    scope = store.open_report()
    batch = recovery_apply.next_batch(store.db, scope, after=0, rows=9)
    assert batch is not None
    store.db.execute("UPDATE instance SET lease_until = 0")
    other = ServiceStore(db=store.db, owner=instances.claim(store.db, boot("other"), now=store.now))
    other.count = iter(range(100, 200))
    elsewhere = other.create()
    other.recover()
    reports.close_abandoned(store.db)

    assert [one.run_id for one in read(store)] == [elsewhere.run_id]
    with pytest.raises(StorageBusy):  # it wakes up, but must commit nothing that readers would miss
        recovery_apply.apply_batch(store.db, scope, batch, report=written(store, scope))
    assert [one.run_id for one in read(store)] == [elsewhere.run_id]


def written(store: ServiceStore, scope: ApplyScope) -> recovery_apply.WriteProgress:
    """Return a function that writes a report's progress, as a recovery does."""
    report = reports.report_page(store.db, after=None, limit=9).rows[-1]
    return lambda db, tally: reports.write_report(db, scope.reconciliation_key, report)


def test_a_cursor_of_another_store_is_refused(store: ServiceStore) -> None:
    store.create()
    recover(store)
    (one,) = read(store)

    decision_feed.demand_valid(store.db, one.cursor)
    decision_feed.demand_valid(store.db, START)
    store.db.execute("UPDATE reconciliation SET reconciliation_id = 'restored'")
    with pytest.raises(WatchCursorInvalid):
        decision_feed.demand_valid(store.db, one.cursor)
    with pytest.raises(WatchCursorInvalid):
        decision_feed.demand_valid(store.db, FeedCursor(99, 1, one.cursor.stamp))


def test_a_reopening_is_no_decision_of_the_feed(store: ServiceStore) -> None:
    from runrecovery_service.storage import reopening

    run = store.waiting()
    store.set(run, session_verdict="INVALID")
    recover(store)
    reopening.reopen(
        store.db, run.run_id, handle=None, session_type_of=lambda _: "jsonl",
        wait_s_of=lambda _: 60.0, owner=store.owner, etag=None, receipt=None,
        due_in=store.due_in, steady=store.steady, now=store.tick(),
    )  # fmt: skip

    assert [one.recovery.recovery_reason for one in read(store)] == ["session_handle_lost"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (RecoveredFilter(states=frozenset({RecoveryState.FAILED_RECONCILED})), {"queued"}),
        (RecoveredFilter(reason="resumable_waiting_preserved"), {"waiting", "blue"}),
        (RecoveredFilter(engine="other"), {"waiting"}),
        (RecoveredFilter(labels={"team": "blue"}), {"blue", "queued"}),
        (RecoveredFilter(labels={"team": "blue", "no": "no"}), set()),
        (RecoveredFilter(reconciliation_id="nobody"), set()),
    ],
)
def test_a_filter_returns_only_the_decisions_that_it_names(
    store: ServiceStore, wanted: RecoveredFilter, expected: set[str]
) -> None:
    names = {
        store.waiting(engine="other", labels={}).run_id: "waiting",
        store.waiting().run_id: "blue",
        store.create().run_id: "queued",
    }
    recover(store)

    assert {names[one.run_id] for one in read(store, wanted=wanted)} == expected


def test_a_time_range_bounds_the_decision(store: ServiceStore) -> None:
    store.create()
    recover(store)
    (one,) = read(store)
    at = one.recovery.recovered_at

    bounds = [
        RecoveredFilter(after=at),
        RecoveredFilter(before=at),
        RecoveredFilter(after=at + timedelta(microseconds=1)),
        RecoveredFilter(before=at + timedelta(microseconds=1)),
    ]

    assert [len(read(store, wanted=wanted)) for wanted in bounds] == [1, 0, 0, 1]
