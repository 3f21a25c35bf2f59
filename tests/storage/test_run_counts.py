"""Unfinished runs are counted by engine and status, with the oldest of each."""

from __future__ import annotations

from datetime import UTC, datetime

from runrecovery_service.domain.run import RunError, RunStatus
from runrecovery_service.domain.turn import Failed
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.run_counts import RunCount, count_unfinished
from storage.service_store import ServiceStore


def at(second: int) -> datetime:
    return datetime(2026, 11, 24, 12, 0, second, tzinfo=UTC)


def test_runs_are_counted_by_status_and_engine_with_the_oldest(store: ServiceStore) -> None:
    store.waiting()  # created at second 1, taken at 2, its session recorded at 3, asked at 4
    store.waiting()
    store.running(engine="other")
    store.end(store.running(), Failed(RunError(code="X", message="")))
    store.create()  # at second 14
    store.create()

    assert count_unfinished(store.db, store.owner) == [
        RunCount(status=RunStatus.QUEUED, engine="demo", runs=2, oldest_since=at(14)),
        RunCount(status=RunStatus.WAITING_USER, engine="demo", runs=2, oldest_since=at(4)),
        RunCount(status=RunStatus.RUNNING, engine="other", runs=1, oldest_since=None),
    ]


def test_runs_of_other_instances_and_quarantined_or_damaged_ones_are_not_counted(
    store: ServiceStore,
) -> None:
    store.set(store.create(), recovery_state="QUARANTINED")
    store.set(store.create(), status="NONSENSE")
    store.set(store.create(), owner="other")

    assert count_unfinished(store.db, store.owner) == []
    assert [one.runs for one in count_unfinished(store.db, Owner("other", 1, "t"))] == [1]
