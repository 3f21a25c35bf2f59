"""The report of a recovery grows in the store, batch by batch."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from runrecovery_service.domain.errors import StorageBusy
from runrecovery_service.domain.reconciliation import (
    BindingCounts,
    Cause,
    Containment,
    ContainmentLevel,
    DecisionCount,
    OrphanCounts,
    Reconciliation,
    ReconciliationState,
    TrustRemoval,
)
from runrecovery_service.domain.run import RecoveryState
from runrecovery_service.recovery.batch_size import next_batch_rows
from runrecovery_service.recovery.report import ReportBuilder
from runrecovery_service.storage import reports
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery_apply import DAMAGED_NAMED, Tally
from support.clock import FakeClock

START = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
def builder(database: Database) -> ReportBuilder:
    builder = ReportBuilder(
        owner=Owner("default", 3, "t"),
        reconciliation_id="r",
        cause=Cause.STARTUP,
        safe_mode=True,
        clock=FakeClock(wall=START, tick_s=1.0),
    )
    builder.open(database)
    return builder


def stored(db: Database) -> Reconciliation:
    return reports.get_report(db, "r")


def test_an_opened_report_is_running_and_empty(database: Database, builder: ReportBuilder) -> None:
    report = stored(database)

    assert (
        report.state, report.started_at, report.finished_at
    ) == (ReconciliationState.RUNNING, START, None)  # fmt: skip
    assert (
        report.instance, report.epoch, report.safe_mode, report.decisions
    ) == ("default", 3, True, ())  # fmt: skip


def test_a_batch_is_written_before_it_is_added_to_the_tally(
    database: Database, builder: ReportBuilder
) -> None:
    builder.tally = Tally(scanned=2, decisions={"requeued": 2})

    builder.write(database, Tally(scanned=3, decisions={"requeued": 1, "cancel_completed": 2}))

    assert stored(database).runs_scanned == 5
    assert (
        DecisionCount(
            rule="cancel_completed", recovery_state=RecoveryState.CANCELED_RECONCILED, count=2
        ),
        DecisionCount(rule="requeued", recovery_state=RecoveryState.RECOVERED_QUEUED, count=3),
    ) == stored(database).decisions
    assert builder.tally.scanned == 2


def test_a_completed_report_is_read_back_as_it_was_returned(
    database: Database, builder: ReportBuilder
) -> None:
    builder.runs_total = 9
    builder.tally = Tally(
        scanned=9, unchanged=1, quarantined=1, sessions=2, questions=3, slots=4,
        damaged=(("r1", "d"),), decisions={"record_damaged": 1},
    )  # fmt: skip
    builder.orphans = OrphanCounts(found=5, ended=4, already_gone=2, refused=1)
    builder.warnings.append("w")
    builder.containment = Containment(level=ContainmentLevel.COOKIE, detail="no watermark")
    with builder.phase("converge"):
        pass

    report = builder.complete(database)

    assert report == stored(database)
    assert (report.state, report.warnings) == (
        ReconciliationState.COMPLETED, ("w", "run r1 is quarantined: d")
    )  # fmt: skip
    assert BindingCounts(sessions=2, pending_interactions=3, slots=4) == report.bindings
    assert [phase.name for phase in report.phases] == ["converge"]


def test_a_failed_report_says_why(database: Database, builder: ReportBuilder) -> None:
    report = builder.fail(database, "StorageFull")

    assert report == stored(database)
    assert (report.state, report.error) == (ReconciliationState.FAILED, "StorageFull")


def test_warnings_are_stored_up_to_a_limit(database: Database, builder: ReportBuilder) -> None:
    builder.warnings.extend(str(n) for n in range(1000))

    builder.write(database)

    assert len(stored(database).warnings) == reports.WARNINGS_LIMIT


def test_tallies_add_up() -> None:
    one = Tally(
        scanned=1, unchanged=2, quarantined=3, sessions=4, questions=5, slots=6,
        decisions={"a": 1, "b": 2}, damaged=(("r1", "x"),) * 60,
    )  # fmt: skip

    both = one + replace(one, decisions={"b": 3, "c": 4})

    assert (
        both.scanned, both.unchanged, both.quarantined, both.sessions, both.questions, both.slots
    ) == (2, 4, 6, 8, 10, 12)  # fmt: skip
    assert both.decisions == {"a": 1, "b": 5, "c": 4}
    assert len(both.damaged) == DAMAGED_NAMED
    assert one == one + Tally()


@pytest.mark.parametrize(
    ("rows", "seconds", "becomes"),
    [
        (20_000, 1.5, 10_000),  # slow: half
        (20_000, 0.5, 20_000),
        (10_000, 0.1, 20_000),  # quick: double
        (20_000, 0.1, 20_000),  # never above the limit
        (600, 9.0, 500),  # never below the smallest
    ],
)
def test_the_batch_size_follows_the_time_of_the_last_batch(
    rows: int, seconds: float, becomes: int
) -> None:
    assert becomes == next_batch_rows(rows, seconds, most=20_000, batch_s=1.0)


def test_a_limit_below_the_smallest_batch_is_kept() -> None:
    assert next_batch_rows(10, 9.0, most=10, batch_s=1.0) == 10


def test_a_removal_that_could_not_be_recorded_is_not_in_the_report(
    database: Database, builder: ReportBuilder
) -> None:
    first, second = (
        TrustRemoval(run_id="r", file="/f", folder=folder, outcome="removed")
        for folder in ("/one", "/two")
    )
    builder.record_removals(database, (first,))
    database.execute("UPDATE reconciliation SET state = 'FAILED'")
    with pytest.raises(StorageBusy):  # another start has closed it
        builder.record_removals(database, (second,))
    database.execute("UPDATE reconciliation SET state = 'RUNNING'")

    assert builder.complete(database).trust_removals == (first,)
