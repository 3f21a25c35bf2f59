"""A planned stop makes the decisions of the next start, which then has nothing to decide."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from runrecovery_service.domain.reconciliation import (
    Cause,
    Containment,
    ContainmentLevel,
    Reconciliation,
    ReconciliationState,
    TrustClearing,
    TrustRemoval,
)
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.recovery import reconcile
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.last_output import CompletesOutput
from runrecovery_service.recovery.reconcile import (
    Leftovers,
    RecordRemovals,
    Recovery,
    RecoveryLimits,
)
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import (
    decisions,
    instances,
    launch_records,
    recovery_apply,
    reports,
    use_case,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.recovery_apply import Batch, Tally
from runrecovery_service.storage.recovery_scope import ApplyScope
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import (
    DECIDED,
    REASONS,
    Crash,
    CrashingDatabase,
    ServiceStore,
    boot,
    one_of_each,
    reasons,
)
from support.recovery import ClearTrust, FakeLaunchEnder, FakeTrustCleaner, clear_nothing

PROVED = Containment(level=ContainmentLevel.WATERMARK, detail="found")


def shut_down(store: ServiceStore, **named: Any) -> Tally:
    """Decide on every run as a planned stop does."""
    return store.apply_recovery(cause=Cause.SHUTDOWN, **named)


def fill(store: ServiceStore) -> ServiceStore:
    """Add runs of many kinds, and a damaged one."""
    made = one_of_each(store)
    store.set(made[-1], input="{")
    return store


# -- the decisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_stop_decides_the_runs_of_its_own_epoch(store: ServiceStore, rows: int) -> None:
    made = one_of_each(store)

    tally = shut_down(store, rows=rows)

    assert reasons(store, made) == REASONS
    assert (tally.scanned, tally.unchanged, tally.slots) == (10, 0, 4)
    assert [info.epoch for run in made if (info := store.get(run).recovery)] == [1] * 10


def test_a_stop_decides_exactly_what_the_next_start_would(
    new_store: Callable[[], ServiceStore],
) -> None:
    planned, killed = fill(new_store()), fill(new_store())

    shut_down(planned)
    killed.recover()

    assert planned.decided() == killed.decided()


def test_a_start_does_not_decide_runs_of_its_own_epoch(store: ServiceStore) -> None:
    one_of_each(store)
    before = store.dump(*DECIDED)

    assert store.apply_recovery() == Tally()
    assert store.dump(*DECIDED) == before


def test_the_next_start_finds_every_run_unchanged(store: ServiceStore) -> None:
    made = one_of_each(store)
    shut_down(store)
    before, recoveries = store.decided(), [store.get(run).recovery for run in made]

    tally = store.recover()

    # Two queued for another turn, and one that waits; everything else has ended.
    assert (tally.scanned, tally.unchanged, tally.decisions) == (3, 3, {})
    assert store.decided() == before
    assert [store.get(run).recovery for run in made] == recoveries
    assert store.rows("SELECT DISTINCT owner_epoch FROM run WHERE ended_at IS NULL") == [
        (store.owner.epoch,)
    ]


def test_runs_that_a_stop_kept_continue_after_the_next_start(store: ServiceStore) -> None:
    made = one_of_each(store)
    shut_down(store)
    store.recover()

    taken = [store.take(), store.take(), store.take()]

    assert [turn.run.run_id if turn else None for turn in taken] == [
        made[8].run_id, made[0].run_id, None
    ]  # fmt: skip
    assert store.reply(made[1]).status is RunStatus.QUEUED


def test_a_second_pass_of_a_stop_changes_nothing(store: ServiceStore) -> None:
    one_of_each(store)
    shut_down(store)
    before = store.dump(*DECIDED)

    tally = shut_down(store)

    assert (tally.scanned, tally.unchanged, tally.decisions) == (3, 3, {})
    assert store.dump(*DECIDED) == before


def test_a_stop_counts_every_run_once(store: ServiceStore) -> None:
    kept = [store.waiting() for _ in range(3)]
    store.recover()
    one_of_each(store)
    live = "status NOT IN ('SUCCEEDED', 'FAILED', 'CANCELED')"
    ((count,),) = store.rows(f"SELECT count(*) FROM run WHERE {live}")  # noqa: S608 - our own words

    tally = shut_down(store)

    assert (tally.unchanged, tally.scanned) == (len(kept), count)
    assert sum(tally.decisions.values()) == count - len(kept)


def test_a_stop_leaves_other_instances_alone(store: ServiceStore) -> None:
    other = instances.claim(store.db, boot("other"), now=store.now)
    store.create(owner=other)
    before = store.dump(*DECIDED)

    assert shut_down(store) == Tally()
    assert store.dump(*DECIDED) == before


def test_a_stop_of_a_superseded_epoch_finds_no_run(store: ServiceStore) -> None:
    one_of_each(store)
    old = store.scope(cause=Cause.SHUTDOWN)
    store.recover()
    before = store.dump(*DECIDED)

    assert recovery_apply.next_batch(store.db, old, after=0, rows=100) is None
    assert recovery_apply.count_runs(store.db, old) == 0
    assert store.dump(*DECIDED) == before


def test_a_stop_that_is_cut_off_at_any_statement_is_completed_by_the_next_start(
    new_store: Callable[[], ServiceStore],
) -> None:
    undisturbed = fill(new_store())
    undisturbed.recover(rows=4)
    expected = undisturbed.decided()
    cuts = 0
    for at in range(0, 200, 3):
        store = fill(new_store())
        seed, store.db = store.db, CrashingDatabase(store.db, at=at)
        try:
            shut_down(store, rows=4)
        except Crash:
            cuts += 1
        else:
            break
        finally:
            store.db = seed

        store.recover(rows=4)

        assert store.decided() == expected
        assert store.rows("SELECT 1 FROM recovery_event GROUP BY run HAVING count(*) > 1") == []

    assert 5 < cuts < 60


# -- the whole reconciliation ------------------------------------------------------------------


def one_process_ended(leases: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
    """Return an ending in which one process of each launch was found and ended."""
    return {lease.key: Ending(found=1, ended=1, gone=True) for lease in leases}


def make_recovery(
    store: ServiceStore,
    cause: Cause,
    *,
    sweep: Callable[[Sequence[LaunchRecord]], Mapping[int, Ending]] = one_process_ended,
    clear_trust: ClearTrust = clear_nothing,
    limits: RecoveryLimits | None = None,
    outputs: CompletesOutput | None = None,
) -> Recovery:
    return Recovery(
        owner=store.owner,
        cause=cause,
        clock=store.ticking_clock,
        limits=limits or limits_of(3),
        stop=StopSignal(),
        leftovers=Leftovers(
            sessions=BulkSessionCheck(checks={}, workspace=lambda key, attempt: Path("/nowhere")),
            launches=FakeLaunchEnder(sweep),
            trust=FakeTrustCleaner(clear_trust),
            outputs=outputs,
        ),
    )


def limits_of(safe_mode_after: int, *, batch_rows: int = 4) -> RecoveryLimits:
    return RecoveryLimits(
        batch_rows=batch_rows,
        batch_s=1.0,
        safe_mode_after=safe_mode_after,
        safe_mode_window_s=3600.0,
        reopen_window_s=60.0,
    )


def recovered(store: ServiceStore, cause: Cause, **changes: Any) -> Reconciliation:
    """Reconcile as a start or a planned stop does; return the report."""
    probe: Future[Containment] = Future()
    probe.set_result(PROVED)
    status = RecoveryStatus(None if cause is Cause.SHUTDOWN else probe)
    return make_recovery(store, cause, **changes).run(store.db, status)


def test_a_start_forgets_adopted_deliveries_of_webhooks_that_are_not_configured(
    store: ServiceStore,
) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("nothing is adopted there")
    every = WebhookFilter(name="kept", events=frozenset(WebhookEvent))
    store.db.webhooks = (every, replace(every, name="renamed"))
    store.cancel(store.create())
    store.db.webhooks = (every,)
    store.owner = instances.claim(store.db, boot("other"), now=store.tick())
    with structlog.testing.capture_logs() as logs:
        recovered(store, Cause.STARTUP)

    assert store.rows("SELECT webhook, instance FROM webhook_delivery") == [("kept", "other")]
    (forgotten,) = [line for line in logs if line["event"] == "webhook.forgotten"]
    assert (forgotten["log_level"], forgotten["webhook"], forgotten["deliveries"]) == (
        "warning",
        "renamed",
        1,
    )


def fail_to_sweep(leases: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
    raise Crash


def test_the_report_of_a_stop_has_its_cause_and_no_containment(store: ServiceStore) -> None:
    one_of_each(store)
    stop = recovered(store, Cause.SHUTDOWN)
    store.restart()
    start = recovered(store, Cause.STARTUP)

    newest, older = reports.report_page(store.db, after=None, limit=9).rows

    assert (newest, older) == (start, stop)
    assert (stop.cause, start.cause) == (Cause.SHUTDOWN, Cause.STARTUP)
    assert (stop.containment, start.containment) == (None, PROVED)
    assert (stop.epoch, start.epoch) == (1, 2)
    assert {stop.state, start.state} == {ReconciliationState.COMPLETED}
    assert (stop.runs_scanned, stop.runs_total, stop.runs_unchanged) == (10, 10, 0)
    assert (start.runs_scanned, start.runs_total, start.runs_unchanged) == (3, 3, 3)
    assert start.decisions == ()


def test_the_report_of_a_stop_counts_the_processes_that_it_ended(store: ServiceStore) -> None:
    turn = store.running()
    stop = recovered(store, Cause.SHUTDOWN)
    (decision,) = decisions.history(store.db, turn.run.run_id)
    store.restart()
    start = recovered(store, Cause.STARTUP)

    assert (stop.orphans.found, stop.orphans.ended) == (1, 1)
    assert (start.orphans.found, start.orphans.ended) == (0, 0)
    assert decision.processes_ended == 1
    assert decisions.history(store.db, turn.run.run_id) == (decision,)
    assert launch_records.unclosed_launches(store.db, store.owner, before=store.owner.epoch) == []


def test_the_next_start_reports_what_a_stop_ended_before_it_was_cut_off(
    store: ServiceStore,
) -> None:
    turn = store.running()
    cut = make_recovery(store, Cause.SHUTDOWN)
    seed, store.db = store.db, CrashingDatabase(store.db, at=9)
    with pytest.raises(Crash):
        cut.run(store.db, RecoveryStatus())
    store.db = seed
    assert store.rows("SELECT state, processes_ended FROM process_lease") == [("CLOSED", 1)]
    assert store.get(turn.run).status is RunStatus.RUNNING
    store.restart()

    recovered(store, Cause.STARTUP)

    (decision,) = decisions.history(store.db, turn.run.run_id)
    assert (decision.recovery_reason, decision.processes_ended) == ("running_interrupted", 1)


@dataclass
class Outputs:
    """Completes output, or fails; records the runs whose output it was to complete."""

    fails: bool
    runs: list[str] = field(default_factory=list)

    def has_rest(self, _: LaunchRecord) -> bool:
        return True

    def complete(self, turn: OpenTurn) -> None:
        self.runs.append(turn.run_id)
        if self.fails:
            raise Crash


def test_output_that_a_start_could_not_complete_is_completed_by_the_next_start(
    store: ServiceStore,
) -> None:
    """No start completes the output of a launch that is recorded as closed."""
    turn = store.running()
    run_id = turn.run.run_id
    launch_records.record_gated(store.db, turn.launch, owner=store.owner, pid=7, start_ticks=9)
    asked = [Outputs(fails=True), Outputs(fails=False)]
    store.restart()
    with pytest.raises(Crash):
        recovered(store, Cause.STARTUP, outputs=asked[0])
    store.restart()

    recovered(store, Cause.STARTUP, outputs=asked[1])

    assert [one.runs for one in asked] == [[run_id], [run_id]]


def test_a_stop_that_fails_is_reported_and_the_next_start_decides(store: ServiceStore) -> None:
    made = one_of_each(store)

    with pytest.raises(Crash):
        recovered(store, Cause.SHUTDOWN, sweep=fail_to_sweep)
    store.restart()
    start = recovered(store, Cause.STARTUP)

    failed = reports.report_page(store.db, after=None, limit=9).rows[1]
    assert (failed.cause, failed.state, failed.error) == (
        Cause.SHUTDOWN, ReconciliationState.FAILED, "Crash",
    )  # fmt: skip
    assert (start.runs_scanned, start.runs_unchanged) == (10, 0)
    assert reasons(store, made) == REASONS


def test_failed_stops_do_not_lead_to_safe_mode(store: ServiceStore) -> None:
    one_of_each(store)
    begun = store.now
    recovered(store, Cause.STARTUP)
    for _ in range(5):
        with pytest.raises(Crash):
            recovered(store, Cause.SHUTDOWN, sweep=fail_to_sweep)
        store.restart()

    count = reports.count_unfinished_starts(store.db, store.owner, begun - timedelta(hours=1))
    start = recovered(store, Cause.STARTUP)

    assert (count, start.safe_mode) == (0, False)


def test_safe_mode_begins_after_the_configured_number_of_unfinished_starts(
    store: ServiceStore,
) -> None:
    one_of_each(store)
    for safe_mode_after in (3, 3, 0, 4, 4):
        store.restart()
        with pytest.raises(Crash):
            recovered(store, Cause.STARTUP, sweep=fail_to_sweep, limits=limits_of(safe_mode_after))

    made = reports.report_page(store.db, after=None, limit=9).rows

    assert [report.safe_mode for report in reversed(made)] == [False, False, False, False, True]


def test_a_recovery_logs_decisions_up_to_a_limit(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "DECISIONS_LOGGED", 3)
    one_of_each(store)
    store.restart()

    with structlog.testing.capture_logs() as events:
        report = recovered(store, Cause.STARTUP, limits=limits_of(3, batch_rows=2))

    logged = [event for event in events if event["event"] == "recovery.run_decided"]
    assert (report.runs_scanned, len(logged)) == (10, 3)


def test_a_start_does_not_count_its_own_failed_try_towards_safe_mode(store: ServiceStore) -> None:
    one_of_each(store)
    store.restart()
    with pytest.raises(Crash):
        recovered(store, Cause.STARTUP, sweep=fail_to_sweep, limits=limits_of(1))

    assert not recovered(store, Cause.STARTUP, limits=limits_of(1)).safe_mode


def test_the_report_of_a_failed_recovery_counts_the_committed_part_of_a_split_batch(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database refuses the batch of four as a whole, and is busy at its second half."""
    for _ in range(4):
        store.create()
    store.restart()
    apply_range = recovery_apply._apply_range
    busy = sqlite3.OperationalError("database is locked")
    busy.sqlite_errorcode = sqlite3.SQLITE_BUSY
    errors = iter([sqlite3.IntegrityError("refused"), None, busy])

    def fail_at_times(*args: Any) -> Tally:
        if (error := next(errors)) is not None:
            raise error
        return apply_range(*args)

    monkeypatch.setattr(recovery_apply, "_apply_range", fail_at_times)

    with pytest.raises(sqlite3.OperationalError):
        recovered(store, Cause.STARTUP)

    failed = reports.report_page(store.db, after=None, limit=1).rows[0]
    assert (failed.state, failed.runs_scanned) == (ReconciliationState.FAILED, 2)
    assert store.rows("SELECT count(*) FROM run WHERE recovery_count = 1") == [(2,)]


def test_the_report_of_a_start_counts_a_run_that_the_database_refuses(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [store.create() for _ in range(3)][1]
    store.restart()
    apply_range = recovery_apply._apply_range

    def refuse(db: Database, scope: ApplyScope, batch: Batch) -> Tally:
        if batch.first <= refused.key <= batch.last:
            raise sqlite3.IntegrityError("refused")
        return apply_range(db, scope, batch)

    monkeypatch.setattr(recovery_apply, "_apply_range", refuse)

    report = recovered(store, Cause.STARTUP)

    assert (report.runs_scanned, report.quarantined) == (3, 1)
    assert {one.rule: one.count for one in report.decisions} == {
        "queued_interrupted": 2,
        "record_damaged": 1,
    }


def test_a_completed_stop_does_not_reset_the_count_of_failed_starts(store: ServiceStore) -> None:
    one_of_each(store)
    begun = store.now
    for _ in range(3):
        store.restart()
        with pytest.raises(Crash):
            recovered(store, Cause.STARTUP, sweep=fail_to_sweep)
    recovered(store, Cause.SHUTDOWN)
    store.restart()

    count = reports.count_unfinished_starts(store.db, store.owner, begun - timedelta(hours=1))

    assert count == 3
    assert recovered(store, Cause.STARTUP).safe_mode
    assert not recovered(store, Cause.SHUTDOWN).safe_mode


def test_a_turn_that_ends_before_the_stop_decides_is_left_as_it_ended(store: ServiceStore) -> None:
    turn = store.running()
    ended = store.end(turn, Succeeded({"x": 1}))

    report = recovered(store, Cause.SHUTDOWN)

    assert (report.runs_total, report.orphans.found) == (0, 0)
    assert store.get(turn.run) == ended


# -- trust entries -----------------------------------------------------------------------------


OUTCOMES = ("removed", "restored", "gone") * 50


def removal(at: int) -> TrustRemoval:
    return TrustRemoval(run_id=f"r{at}", file="/f", folder=f"/w/{at}", outcome=OUTCOMES[at])


@pytest.mark.parametrize("cause", Cause)
def test_removed_trust_entries_are_in_the_report(store: ServiceStore, cause: Cause) -> None:
    taken = tuple(map(removal, range(150)))
    done = TrustClearing(removals=taken, failures=("/g: not_parsable: at line 1",))

    def clear(db: Database, record: RecordRemovals, is_over: Callable[[], bool]) -> TrustClearing:
        record(db, taken[:70])
        record(db, taken[70:])
        return done

    recovered(store, cause, clear_trust=clear)  # there is nothing else to do

    ((stored),) = reports.report_page(store.db, after=None, limit=9).rows
    assert stored.state is ReconciliationState.COMPLETED
    assert stored.bindings.trust_entries == 100
    assert stored.trust_removals == taken[:100]
    assert stored.warnings == ("trust entries stay: /g: not_parsable: at line 1",)
    assert "trust" in [phase.name for phase in stored.phases]


def test_a_recovery_completes_when_trust_entries_cannot_be_removed(store: ServiceStore) -> None:
    def fail(*_: object) -> TrustClearing:
        raise MemoryError

    report = recovered(store, Cause.STARTUP, clear_trust=fail)

    assert report.state is ReconciliationState.COMPLETED
    assert report.warnings == ("trust entries stay: MemoryError",)


class Killed(BaseException):
    """The service is killed here."""


def test_trust_entries_removed_before_a_kill_are_in_the_report_of_the_killed_start(
    store: ServiceStore,
) -> None:
    def clear(db: Database, record: RecordRemovals, is_over: Callable[[], bool]) -> TrustClearing:
        with db.transaction():
            record(db, (removal(0),))
        raise Killed

    with pytest.raises(Killed):
        recovered(store, Cause.STARTUP, clear_trust=clear)
    recovered(store, Cause.STARTUP)

    _, cut_off = reports.report_page(store.db, after=None, limit=9).rows
    assert (cut_off.trust_removals, cut_off.bindings.trust_entries) == ((removal(0),), 1)


@pytest.mark.parametrize("seconds", [0.0, reconcile.TRUST_S])
def test_the_removal_of_trust_entries_gets_the_time_that_is_left(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(reconcile, "TRUST_S", seconds)
    asked = []

    def clear(db: Database, record: RecordRemovals, is_over: Callable[[], bool]) -> TrustClearing:
        asked.append(is_over())
        return TrustClearing()

    recovered(store, Cause.STARTUP, clear_trust=clear)

    assert asked == [seconds == 0]


def test_a_page_of_reports_is_bounded_by_their_size(store: ServiceStore) -> None:
    for _ in range(12):
        recovered(store, Cause.STARTUP)
    long = "/" + "w" * 900
    text = json.dumps([[f"r{at}", long, f"{long}{at}", "removed"] for at in range(100)])
    with store.db.transaction():
        store.db.execute("UPDATE reconciliation SET trust_removals = ?", (text,))

    pages, after = [], None
    while True:
        page = reports.report_page(store.db, after=after, limit=1000)
        pages.append(page.rows)
        if (after := page.after) is None:
            break

    assert {len(page) for page in pages[:-1]} == {use_case.PAGE_CHARS // len(text)}
    ids = [report.reconciliation_id for page in pages for report in page]
    assert len(set(ids)) == len(ids) == 12
    with store.db.transaction():
        longer = json.dumps(json.loads(text) * 5)  # more than a page may have
        store.db.execute("UPDATE reconciliation SET trust_removals = ?", (longer,))
    assert len(reports.report_page(store.db, after=None, limit=1000).rows) == 1
