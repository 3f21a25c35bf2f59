"""History, recovered runs and reports are read back in order, in pages, by filters."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
from runrecovery_service.domain.errors import ReconciliationNotFound, RunNotFound
from runrecovery_service.domain.reconciliation import ReconciliationState, RecoveredFilter
from runrecovery_service.domain.run import RecoveryState, RestartPolicy, Run
from runrecovery_service.storage import decisions, reports
from runrecovery_service.storage.sql_dialects import DatabaseKind

from .conftest import World

EVERYTHING = RecoveredFilter()


def listed(world: World, wanted: RecoveredFilter) -> set[str]:
    page = decisions.recovered_page(world.db, wanted, after=None, limit=100)
    return {run.run_id for run in page.rows}


def test_a_run_that_met_no_restart_has_no_history(world: World) -> None:
    run = world.create()

    assert decisions.history(world.db, run.run_id) == ()
    assert (None, set()) == (run.recovery, listed(world, EVERYTHING))
    with pytest.raises(RunNotFound):
        decisions.history(world.db, "nobody")


def test_the_history_is_newest_first(world: World) -> None:
    run = world.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    world.recover()
    world.take()
    world.recover()
    world.take()
    world.recover()

    history = decisions.history(world.db, run.run_id)

    assert [info.recovery_count for info in history] == [3, 2, 1]
    assert [info.epoch for info in history] == [4, 3, 2]
    assert [info.status_before for info in history] == ["RUNNING", "RUNNING", "QUEUED"]
    assert history[0] == world.get(run).recovery


def three_restarts(world: World) -> tuple[Run, Run, Run]:
    waiting = world.waiting(engine="a")
    world.recover()
    failed = world.running(engine="b").run
    world.recover()
    requeued = world.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    world.recover()
    return waiting, failed, requeued


def test_recovered_runs_are_filtered(world: World) -> None:
    waiting, failed, requeued = three_restarts(world)
    info = world.get(failed).recovery
    assert info is not None
    second = timedelta(seconds=1)

    def found(**wanted: object) -> set[str]:
        return listed(world, replace(EVERYTHING, **wanted))  # type: ignore[arg-type]

    every = {waiting.run_id, failed.run_id, requeued.run_id}
    assert every == found()
    assert {waiting.run_id} == found(states=frozenset({RecoveryState.RECOVERED_WAITING}))
    assert {failed.run_id, requeued.run_id} == found(
        states=frozenset({RecoveryState.FAILED_RECONCILED, RecoveryState.RECOVERED_QUEUED})
    )
    assert {requeued.run_id} == found(reason="requeued")
    assert {failed.run_id} == found(engine="b")
    assert {failed.run_id} == found(reconciliation_id=info.reconciliation_id)
    assert set() == found(reconciliation_id="none")
    assert {failed.run_id, requeued.run_id} == found(after=info.recovered_at)
    assert {requeued.run_id} == found(after=info.recovered_at + second)
    assert {waiting.run_id} == found(before=info.recovered_at)
    assert {failed.run_id} == found(
        after=info.recovered_at, before=info.recovered_at + second, engine="b"
    )


def test_recovered_runs_come_in_pages_newest_decision_first(world: World) -> None:
    early = [world.waiting() for _ in range(4)]
    world.recover()
    late = [world.create() for _ in range(3)]
    world.recover()
    page = partial(decisions.recovered_page, world.db, EVERYTHING, limit=2)

    pages = [page(after=None)]
    while pages[-1].after is not None:
        pages.append(page(after=pages[-1].after))

    listed_ids = [run.run_id for part in pages for run in part.rows]
    assert [r.run_id for r in (*reversed(late), *reversed(early))] == listed_ids
    assert [len(part.rows) for part in pages] == [2, 2, 2, 1]


# -- reports -----------------------------------------------------------------------------------


def test_reports_come_in_pages_newest_first(world: World) -> None:
    for _ in range(5):
        world.begin()
    page = partial(reports.report_page, world.db, limit=2)

    first = page(after=None)
    world.begin()
    second = page(after=first.after)
    third = page(after=second.after)

    ids = [row.reconciliation_id for part in (first, second, third) for row in part.rows]
    assert [f"report-{n}" for n in (5, 4, 3, 2, 1)] == ids
    assert third.after is None


def test_a_report_that_is_not_there_is_not_found(world: World) -> None:
    with pytest.raises(ReconciliationNotFound):
        reports.get_report(world.db, "nobody")


def test_a_new_start_closes_the_reports_that_were_cut_off(world: World) -> None:
    world.begin()
    world.restart()
    world.begin()

    newest, older = reports.report_page(world.db, after=None, limit=9).rows

    assert ReconciliationState.RUNNING is newest.state
    assert (older.state, older.finished_at is not None) == (ReconciliationState.FAILED, True)
    assert older.error is not None


def complete(world: World) -> None:
    with world.db.transaction():
        world.db.execute("UPDATE reconciliation SET state = 'COMPLETED' WHERE state = 'RUNNING'")


def test_unfinished_starts_are_counted_up_to_the_last_that_finished(world: World) -> None:
    begun = world.now
    count = partial(reports.count_unfinished_starts, world.db, "default")
    assert count(begun) == 0
    world.begin()
    complete(world)
    for _ in range(3):
        world.restart()
        world.begin()
        world.begin()  # a second try of the same start is no further start
    assert count(begun) == 3
    assert count(world.now + timedelta(hours=1)) == 0
    # A SQLite store has one service: under another name, it goes on where that one stopped.
    of_other = 3 if world.db.dialect.kind is DatabaseKind.SQLITE else 0
    assert reports.count_unfinished_starts(world.db, "other", begun) == of_other

    complete(world)

    assert count(begun) == 0


def test_the_error_of_a_recovery_says_why(world: World) -> None:
    run = world.running().run
    world.recover()

    error = world.get(run).error

    assert error is not None
    assert error.message == "The service restarted while the run was running."
