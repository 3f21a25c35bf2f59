"""History, recovered runs and reports are read back in order, in pages, by filters."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
from runrecovery_service.domain.errors import ReconciliationNotFound, RunNotFound
from runrecovery_service.domain.reconciliation import ReconciliationState, RecoveredFilter
from runrecovery_service.domain.run import RecoveryState, RestartPolicy, Run
from runrecovery_service.storage import decisions, instances, reports
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot

EVERYTHING = RecoveredFilter()


def listed(store: ServiceStore, wanted: RecoveredFilter) -> set[str]:
    page = decisions.recovered_page(store.db, wanted, after=None, limit=100)
    return {run.run_id for run in page.rows}


def test_a_run_without_a_restart_has_no_history(store: ServiceStore) -> None:
    run = store.create()

    assert decisions.history(store.db, run.run_id) == ()
    assert (None, set()) == (run.recovery, listed(store, EVERYTHING))
    with pytest.raises(RunNotFound):
        decisions.history(store.db, "nobody")


def test_the_history_is_newest_first(store: ServiceStore) -> None:
    run = store.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    store.recover()
    store.take()
    store.recover()
    store.take()
    store.recover()

    history = decisions.history(store.db, run.run_id)

    assert [info.recovery_count for info in history] == [3, 2, 1]
    assert [info.epoch for info in history] == [4, 3, 2]
    assert [info.status_before for info in history] == ["RUNNING", "RUNNING", "QUEUED"]
    assert history[0] == store.get(run).recovery


def three_restarts(store: ServiceStore) -> tuple[Run, Run, Run]:
    waiting = store.waiting(engine="a")
    store.recover()
    failed = store.running(engine="b").run
    store.recover()
    requeued = store.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    store.recover()
    return waiting, failed, requeued


def test_recovered_runs_are_filtered(store: ServiceStore) -> None:
    waiting, failed, requeued = three_restarts(store)
    info = store.get(failed).recovery
    assert info is not None
    second = timedelta(seconds=1)

    def found(**wanted: object) -> set[str]:
        return listed(store, replace(EVERYTHING, **wanted))  # type: ignore[arg-type]

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


def test_recovered_runs_come_in_pages_newest_decision_first(store: ServiceStore) -> None:
    early = [store.waiting() for _ in range(4)]
    store.recover()
    late = [store.create() for _ in range(3)]
    store.recover()
    page = partial(decisions.recovered_page, store.db, EVERYTHING, limit=2)

    pages = [page(after=None)]
    while pages[-1].after is not None:
        pages.append(page(after=pages[-1].after))

    listed_ids = [run.run_id for part in pages for run in part.rows]
    assert [r.run_id for r in (*reversed(late), *reversed(early))] == listed_ids
    assert [len(part.rows) for part in pages] == [2, 2, 2, 1]


# -- reports -----------------------------------------------------------------------------------


def test_reports_come_in_pages_newest_first(store: ServiceStore) -> None:
    for _ in range(5):
        store.open_report()
    page = partial(reports.report_page, store.db, limit=2)

    first = page(after=None)
    store.open_report()
    second = page(after=first.after)
    third = page(after=second.after)

    ids = [row.reconciliation_id for part in (first, second, third) for row in part.rows]
    assert [f"report-{n}" for n in (5, 4, 3, 2, 1)] == ids
    assert third.after is None


def test_an_unknown_report_is_not_found(store: ServiceStore) -> None:
    with pytest.raises(ReconciliationNotFound):
        reports.get_report(store.db, "nobody")


def test_a_start_closes_reports_that_were_cut_off(store: ServiceStore) -> None:
    store.open_report()
    store.restart()
    store.open_report()

    newest, older = reports.report_page(store.db, after=None, limit=9).rows

    assert ReconciliationState.RUNNING is newest.state
    assert (older.state, older.finished_at is not None) == (ReconciliationState.FAILED, True)
    assert older.error is not None


def test_an_opened_report_closes_that_of_an_instance_that_is_not_alive(
    store: ServiceStore,
) -> None:
    """The feed of decisions ends at the first report that is RUNNING."""
    store.open_report()
    instances.resign(store.db, store.owner)
    store.owner = instances.claim(store.db, boot("other"), now=store.tick())
    store.open_report()

    newest, older = reports.report_page(store.db, after=None, limit=9).rows

    assert (newest.instance, newest.state) == ("other", ReconciliationState.RUNNING)
    assert (older.instance, older.state) == ("default", ReconciliationState.FAILED)


def complete(store: ServiceStore) -> None:
    with store.db.transaction():
        store.db.execute("UPDATE reconciliation SET state = 'COMPLETED' WHERE state = 'RUNNING'")


def test_unfinished_starts_are_counted_since_the_last_finished_one(store: ServiceStore) -> None:
    begun = store.now
    count = partial(reports.count_unfinished_starts, store.db, Owner("default", 99, "next"))
    assert count(begun) == 0
    store.open_report()
    complete(store)
    for _ in range(3):
        store.restart()
        store.open_report()
        store.open_report()  # a second try of the same start does not count
    assert count(begun) == 3
    assert count(store.now + timedelta(hours=1)) == 0
    # A SQLite store has one service, so that a new name continues the count of the old name.
    of_other = 3 if store.db.dialect.kind is DatabaseKind.SQLITE else 0
    assert reports.count_unfinished_starts(store.db, Owner("other", 1, "t"), begun) == of_other

    complete(store)

    assert count(begun) == 0


def test_the_message_of_a_recovered_run_says_why_it_failed(store: ServiceStore) -> None:
    run = store.running().run
    store.recover()

    error = store.get(run).error

    assert error is not None
    assert error.message == "The service restarted while the run was running."
