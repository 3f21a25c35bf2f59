"""Decisions in one order that can be read on from any place of it."""

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

from .conftest import World, boot

EVERYTHING = RecoveredFilter()


def complete(world: World) -> None:
    world.db.execute("UPDATE reconciliation SET state = 'COMPLETED'")


def recover(world: World) -> None:
    world.recover()
    complete(world)


def read(
    world: World, place: FeedCursor = START, wanted: RecoveredFilter = EVERYTHING, *, limit: int = 2
) -> list[FeedDecision]:
    """Read to the end in small stretches; that each begins where the last ended is demanded."""
    found: list[FeedDecision] = []
    while True:
        stretch = decision_feed.decisions_after(world.db, place, wanted, limit=limit)
        found += stretch.decided
        assert stretch.upto >= place
        place = stretch.upto
        if not stretch.more:
            return found


def test_decisions_come_in_the_order_of_restarts_and_runs(world: World) -> None:
    runs = [world.waiting() for _ in range(5)]
    recover(world)
    for run in runs[:2]:
        world.reply(run)
    recover(world)

    told = [(one.run_id, one.recovery.recovery_reason) for one in read(world)]

    assert told == [
        *((run.run_id, "resumable_waiting_preserved") for run in runs),
        *((run.run_id, "accepted_reply_redriven") for run in runs[:2]),
    ]


def test_it_can_be_read_on_from_every_place(world: World) -> None:
    for _ in range(5):
        world.waiting()
    recover(world)
    every = read(world)

    for at, one in enumerate(every):
        assert read(world, one.cursor) == every[at + 1 :]


def test_the_end_is_behind_all_and_nothing_is_missed_from_it(world: World) -> None:
    world.waiting()
    recover(world)
    end = decision_feed.end_cursor(world.db)
    assert read(world, end) == []

    run = world.create()
    recover(world)

    assert [one.run_id for one in read(world, end)] == [run.run_id]


def test_a_recovery_at_work_is_told_as_far_as_it_is_and_bars_those_behind(world: World) -> None:
    if world.db.dialect.kind is DatabaseKind.SQLITE:
        pytest.skip("one service at a time")
    for _ in range(4):
        world.create()
    world.restart()
    scope = world.begin()
    first = recovery_apply.next_batch(world.db, scope, after=0, rows=2)
    assert first is not None
    recovery_apply.apply_batch(world.db, scope, first, report=lambda db, tally: None)
    # Another instance recovers meanwhile, and is through with it.
    other = World(db=world.db, owner=instances.claim(world.db, boot("other"), now=world.now))
    other.count = iter(range(100, 200))
    elsewhere = other.create()
    other.recover()
    world.db.execute("UPDATE reconciliation SET state = 'COMPLETED' WHERE instance = 'other'")

    so_far = read(world)
    second = recovery_apply.next_batch(world.db, scope, after=first.last, rows=2)
    assert second is not None
    recovery_apply.apply_batch(world.db, scope, second, report=lambda db, tally: None)
    complete(world)

    assert len(so_far) == 2
    rest = read(world, so_far[-1].cursor)
    assert [one.run_id for one in rest][2:] == [elsewhere.run_id]
    assert len(rest) == 3


def test_a_recovery_whose_service_is_dead_bars_nobody(world: World) -> None:
    world.create()
    world.restart()
    scope = world.begin()
    batch = recovery_apply.next_batch(world.db, scope, after=0, rows=9)
    assert batch is not None
    world.db.execute("UPDATE instance SET lease_until = 0")
    other = World(db=world.db, owner=instances.claim(world.db, boot("other"), now=world.now))
    other.count = iter(range(100, 200))
    elsewhere = other.create()
    other.recover()
    reports.close_abandoned(world.db)

    assert [one.run_id for one in read(world)] == [elsewhere.run_id]
    with pytest.raises(StorageBusy):  # it wakes up: nothing is committed behind who read on
        recovery_apply.apply_batch(world.db, scope, batch, report=written(world, scope))
    assert [one.run_id for one in read(world)] == [elsewhere.run_id]


def written(world: World, scope: ApplyScope) -> recovery_apply.WriteProgress:
    """What writes a report's progress, as a recovery does."""
    report = reports.report_page(world.db, after=None, limit=9).rows[-1]
    return lambda db, tally: reports.write_report(db, scope.reconciliation_key, report)


def test_a_place_of_another_store_is_refused(world: World) -> None:
    world.create()
    recover(world)
    (one,) = read(world)

    decision_feed.demand_valid(world.db, one.cursor)
    decision_feed.demand_valid(world.db, START)
    world.db.execute("UPDATE reconciliation SET reconciliation_id = 'restored'")
    with pytest.raises(WatchCursorInvalid):
        decision_feed.demand_valid(world.db, one.cursor)
    with pytest.raises(WatchCursorInvalid):
        decision_feed.demand_valid(world.db, FeedCursor(99, 1, one.cursor.stamp))


def test_what_a_caller_set_back_is_no_decision_of_a_restart(world: World) -> None:
    from runrecovery_service.storage import reopening

    run = world.waiting()
    world.set(run, session_verdict="INVALID")
    recover(world)
    reopening.reopen(
        world.db, run.run_id, handle=None, session_type=lambda _: "jsonl", owner=world.owner,
        etag=None, receipt=None, due_in=world.due_in, steady=world.steady, now=world.tick(),
    )  # fmt: skip

    assert [one.recovery.recovery_reason for one in read(world)] == ["session_handle_lost"]


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
def test_a_filter_lets_through_what_it_names(
    world: World, wanted: RecoveredFilter, expected: set[str]
) -> None:
    names = {
        world.waiting(engine="other", labels={}).run_id: "waiting",
        world.waiting().run_id: "blue",
        world.create().run_id: "queued",
    }
    recover(world)

    assert {names[one.run_id] for one in read(world, wanted=wanted)} == expected


def test_times_bound_the_decision(world: World) -> None:
    world.create()
    recover(world)
    (one,) = read(world)
    at = one.recovery.recovered_at

    bounds = [
        RecoveredFilter(after=at),
        RecoveredFilter(before=at),
        RecoveredFilter(after=at + timedelta(microseconds=1)),
        RecoveredFilter(before=at + timedelta(microseconds=1)),
    ]

    assert [len(read(world, wanted=wanted)) for wanted in bounds] == [1, 0, 0, 1]
