"""A planned stop decides what its next start would, and leaves that nothing to decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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
from runrecovery_service.process.ending import Ending
from runrecovery_service.recovery import reconcile
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.reconcile import RecordRemovals, Recovery, RecoveryLimits
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
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.recovery_apply import Tally
from support.recovery import ClearTrust, FakeLaunchEnder, FakeTrustCleaner, clear_nothing

from .conftest import (
    DECIDED,
    REASONS,
    CutDatabase,
    PowerCut,
    World,
    boot,
    one_of_each,
    reasons,
)

PROVED = Containment(level=ContainmentLevel.WATERMARK, detail="found")
# What a stop and a start decide in the same way, but at different times and in different reports.
STABLE = {
    "recovered_at", "ended_at", "updated_at", "owner_epoch", "reconciliation", "quarantined_at",
    "reopenable_until", "reopen_due_us", "facts", "id",
}  # fmt: skip


def shut_down(world: World, **named: Any) -> Tally:
    """Decide on everything as a planned stop does."""
    return world.converge(cause=Cause.SHUTDOWN, **named)


def outcome(world: World) -> str:
    """What was decided, without the times and epochs."""
    dump = world.dump(*DECIDED)
    for row in (row for rows in dump.values() for row in rows):
        for name in STABLE:
            row.pop(name, None)
    return json.dumps({name: sorted(map(str, rows)) for name, rows in dump.items()})


@pytest.fixture
def new_world(new_database_url: Callable[[], str], tmp_path: Path) -> Iterator[Callable[[], World]]:
    """Make stores that all begin alike."""
    opened: list[Database] = []

    def make() -> World:
        place = tmp_path / str(len(opened))
        place.mkdir()
        opened.append(open_database(new_database_url(), place))
        world = World(db=opened[-1], owner=instances.claim(opened[-1], boot(), now=World.now))
        made = one_of_each(world)
        world.set(made[-1], input="{")
        return world

    yield make
    for db in opened:
        db.close()


# -- the decisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_stop_decides_on_the_runs_of_its_own_epoch(world: World, rows: int) -> None:
    made = one_of_each(world)

    tally = shut_down(world, rows=rows)

    assert reasons(world, made) == REASONS
    assert (tally.scanned, tally.unchanged, tally.slots) == (10, 0, 4)
    assert [info.epoch for run in made if (info := world.get(run).recovery)] == [1] * 10


def test_a_stop_decides_exactly_what_the_next_start_would(
    new_world: Callable[[], World],
) -> None:
    planned, killed = new_world(), new_world()

    shut_down(planned)
    killed.recover()

    assert outcome(planned) == outcome(killed)


def test_a_start_does_not_decide_on_its_own_epoch(world: World) -> None:
    one_of_each(world)
    before = world.dump(*DECIDED)

    assert world.converge() == Tally()
    assert world.dump(*DECIDED) == before


def test_the_next_start_finds_every_run_unchanged(world: World) -> None:
    made = one_of_each(world)
    shut_down(world)
    before, told = outcome(world), [world.get(run).recovery for run in made]

    tally = world.recover()

    # Two queued for another turn, and one that waits; everything else has ended.
    assert (tally.scanned, tally.unchanged, tally.decisions) == (3, 3, {})
    assert outcome(world) == before
    assert [world.get(run).recovery for run in made] == told
    assert world.rows("SELECT DISTINCT owner_epoch FROM run WHERE ended_at IS NULL") == [
        (world.owner.epoch,)
    ]


def test_what_a_stop_left_goes_on_after_the_next_start(world: World) -> None:
    made = one_of_each(world)
    shut_down(world)
    world.recover()

    taken = [world.take(), world.take(), world.take()]

    assert [turn.run.run_id if turn else None for turn in taken] == [
        made[8].run_id, made[0].run_id, None
    ]  # fmt: skip
    assert world.reply(made[1]).status is RunStatus.QUEUED


def test_a_stop_that_decides_again_finds_nothing_to_change(world: World) -> None:
    one_of_each(world)
    shut_down(world)
    before = world.dump(*DECIDED)

    tally = shut_down(world)

    assert (tally.scanned, tally.unchanged, tally.decisions) == (3, 3, {})
    assert world.dump(*DECIDED) == before


def test_a_stop_counts_every_run_once(world: World) -> None:
    kept = [world.waiting() for _ in range(3)]
    world.recover()
    one_of_each(world)
    live = "status NOT IN ('SUCCEEDED', 'FAILED', 'CANCELED')"
    ((count,),) = world.rows(f"SELECT count(*) FROM run WHERE {live}")  # noqa: S608 - our own words

    tally = shut_down(world)

    assert (tally.unchanged, tally.scanned) == (len(kept), count)
    assert sum(tally.decisions.values()) == count - len(kept)


def test_a_stop_leaves_other_instances_alone(world: World) -> None:
    other = instances.claim(world.db, boot("other"), now=world.now)
    world.create(owner=other)
    before = world.dump(*DECIDED)

    assert shut_down(world) == Tally()
    assert world.dump(*DECIDED) == before


def test_nobody_writes_a_run_after_a_newer_epoch_in_the_name_of_a_stop(world: World) -> None:
    one_of_each(world)
    old = world.scope(cause=Cause.SHUTDOWN)
    world.recover()
    before = world.dump(*DECIDED)

    assert recovery_apply.next_batch(world.db, old, after=0, rows=100) is None
    assert recovery_apply.count_runs(world.db, old) == 0
    assert world.dump(*DECIDED) == before


def test_a_stop_that_is_cut_off_anywhere_is_completed_by_the_next_start(
    new_world: Callable[[], World],
) -> None:
    calm = new_world()
    calm.recover(rows=4)
    expected = outcome(calm)
    cuts = 0
    for at in range(0, 200, 3):
        world = new_world()
        seed, world.db = world.db, CutDatabase(world.db, at=at)
        try:
            shut_down(world, rows=4)
        except PowerCut:
            cuts += 1
        else:
            break
        finally:
            world.db = seed

        world.recover(rows=4)

        assert outcome(world) == expected
        assert world.rows("SELECT 1 FROM recovery_event GROUP BY run HAVING count(*) > 1") == []

    assert 5 < cuts < 60


# -- the whole of it ---------------------------------------------------------------------------


def nobody_found(leases: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
    """A sweep that finds one process of each launch."""
    return {lease.key: Ending(found=1, ended=1, gone=True) for lease in leases}


def make_recovery(
    world: World,
    cause: Cause,
    *,
    sweep: Callable[[Sequence[LaunchRecord]], Mapping[int, Ending]] = nobody_found,
    clear_trust: ClearTrust = clear_nothing,
    limits: RecoveryLimits | None = None,
) -> Recovery:
    return Recovery(
        owner=world.owner,
        cause=cause,
        clock=world.ticking_clock,
        limits=limits or limits_of(3),
        stop=StopSignal(),
        sessions=BulkSessionCheck(checks={}, workspace=lambda key, attempt: Path("/nowhere")),
        launches=FakeLaunchEnder(sweep),
        trust=FakeTrustCleaner(clear_trust),
    )


def limits_of(safe_mode_after: int, *, batch_rows: int = 4) -> RecoveryLimits:
    return RecoveryLimits(
        batch_rows=batch_rows,
        batch_s=1.0,
        safe_mode_after=safe_mode_after,
        safe_mode_window_s=3600.0,
        reopen_window_s=60.0,
    )


def recovered(world: World, cause: Cause, **changes: Any) -> Reconciliation:
    """Do all that a start, or a planned stop, does."""
    probe: Future[Containment] = Future()
    probe.set_result(PROVED)
    status = RecoveryStatus(None if cause is Cause.SHUTDOWN else probe)
    return make_recovery(world, cause, **changes).run(world.db, status)


def fail_to_sweep(leases: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
    raise PowerCut


def test_the_report_of_a_stop_says_so_and_proves_nothing(world: World) -> None:
    one_of_each(world)
    stop = recovered(world, Cause.SHUTDOWN)
    world.restart()
    start = recovered(world, Cause.STARTUP)

    newest, older = reports.report_page(world.db, after=None, limit=9).rows

    assert (newest, older) == (start, stop)
    assert (stop.cause, start.cause) == (Cause.SHUTDOWN, Cause.STARTUP)
    assert (stop.containment, start.containment) == (None, PROVED)
    assert (stop.epoch, start.epoch) == (1, 2)
    assert {stop.state, start.state} == {ReconciliationState.COMPLETED}
    assert (stop.runs_scanned, stop.runs_total, stop.runs_unchanged) == (10, 10, 0)
    assert (start.runs_scanned, start.runs_total, start.runs_unchanged) == (3, 3, 3)
    assert start.decisions == ()


def test_the_stop_accounts_for_the_processes_that_it_ended(world: World) -> None:
    turn = world.running()
    stop = recovered(world, Cause.SHUTDOWN)
    (told,) = decisions.history(world.db, turn.run.run_id)
    world.restart()
    start = recovered(world, Cause.STARTUP)

    assert (stop.orphans.found, stop.orphans.ended) == (1, 1)
    assert (start.orphans.found, start.orphans.ended) == (0, 0)
    assert told.processes_ended == 1
    assert decisions.history(world.db, turn.run.run_id) == (told,)
    assert launch_records.unclosed_launches(world.db, world.owner, before=world.owner.epoch) == []


def test_what_a_stop_ended_before_it_was_cut_off_is_told_by_the_next_start(world: World) -> None:
    turn = world.running()
    cut = make_recovery(world, Cause.SHUTDOWN)
    seed, world.db = world.db, CutDatabase(world.db, at=9)
    with pytest.raises(PowerCut):
        cut.run(world.db, RecoveryStatus())
    world.db = seed
    assert world.rows("SELECT state, processes_ended FROM process_lease") == [("CLOSED", 1)]
    assert world.get(turn.run).status is RunStatus.RUNNING
    world.restart()

    recovered(world, Cause.STARTUP)

    (told,) = decisions.history(world.db, turn.run.run_id)
    assert (told.recovery_reason, told.processes_ended) == ("running_interrupted", 1)


def test_a_stop_that_could_not_decide_says_so_and_the_next_start_does(world: World) -> None:
    made = one_of_each(world)

    with pytest.raises(PowerCut):
        recovered(world, Cause.SHUTDOWN, sweep=fail_to_sweep)
    world.restart()
    start = recovered(world, Cause.STARTUP)

    failed = reports.report_page(world.db, after=None, limit=9).rows[1]
    assert (failed.cause, failed.state, failed.error) == (
        Cause.SHUTDOWN, ReconciliationState.FAILED, "PowerCut",
    )  # fmt: skip
    assert (start.runs_scanned, start.runs_unchanged) == (10, 0)
    assert reasons(world, made) == REASONS


def test_stops_that_failed_lead_to_no_safe_mode(world: World) -> None:
    one_of_each(world)
    begun = world.now
    recovered(world, Cause.STARTUP)
    for _ in range(5):
        with pytest.raises(PowerCut):
            recovered(world, Cause.SHUTDOWN, sweep=fail_to_sweep)
        world.restart()

    count = reports.count_unfinished_starts(world.db, "default", begun - timedelta(hours=1))
    start = recovered(world, Cause.STARTUP)

    assert (count, start.safe_mode) == (0, False)


def test_safe_mode_begins_after_as_many_unfinished_starts_as_configured_and_0_is_never(
    world: World,
) -> None:
    one_of_each(world)
    for safe_mode_after in (3, 3, 0, 4, 4):
        world.restart()
        with pytest.raises(PowerCut):
            recovered(world, Cause.STARTUP, sweep=fail_to_sweep, limits=limits_of(safe_mode_after))

    made = reports.report_page(world.db, after=None, limit=9).rows

    assert [report.safe_mode for report in reversed(made)] == [False, False, False, False, True]


def test_a_recovery_logs_so_many_decisions_and_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "DECISIONS_LOGGED", 3)
    one_of_each(world)
    world.restart()

    with structlog.testing.capture_logs() as told:
        report = recovered(world, Cause.STARTUP, limits=limits_of(3, batch_rows=2))

    logged = [event for event in told if event["event"] == "recovery.run_decided"]
    assert (report.runs_scanned, len(logged)) == (10, 3)


def test_a_stop_that_completed_ends_no_row_of_failed_starts(world: World) -> None:
    one_of_each(world)
    begun = world.now
    for _ in range(3):
        world.restart()
        with pytest.raises(PowerCut):
            recovered(world, Cause.STARTUP, sweep=fail_to_sweep)
    recovered(world, Cause.SHUTDOWN)
    world.restart()

    count = reports.count_unfinished_starts(world.db, "default", begun - timedelta(hours=1))

    assert count == 3
    assert recovered(world, Cause.STARTUP).safe_mode
    assert not recovered(world, Cause.SHUTDOWN).safe_mode


def test_a_turn_that_ends_before_the_stop_decides_is_left_as_it_ended(world: World) -> None:
    turn = world.running()
    ended = world.end(turn, Succeeded({"x": 1}))

    report = recovered(world, Cause.SHUTDOWN)

    assert (report.runs_total, report.orphans.found) == (0, 0)
    assert world.get(turn.run) == ended


# -- trust entries -----------------------------------------------------------------------------


OUTCOMES = ("removed", "restored", "gone") * 50


def removal(at: int) -> TrustRemoval:
    return TrustRemoval(run_id=f"r{at}", file="/f", folder=f"/w/{at}", outcome=OUTCOMES[at])


@pytest.mark.parametrize("cause", Cause)
def test_what_was_taken_out_of_the_files_of_clis_is_in_the_report(
    world: World, cause: Cause
) -> None:
    taken = tuple(map(removal, range(150)))
    done = TrustClearing(removals=taken, failures=("/g: not_parsable: at line 1",))

    def clear(db: Database, told: RecordRemovals, enough: Callable[[], bool]) -> TrustClearing:
        told(db, taken[:70])
        told(db, taken[70:])
        return done

    recovered(world, cause, clear_trust=clear)  # nothing else was there to do

    ((stored),) = reports.report_page(world.db, after=None, limit=9).rows
    assert stored.state is ReconciliationState.COMPLETED
    assert stored.bindings.trust_entries == 100
    assert stored.trust_removals == taken[:100]
    assert stored.warnings == ("trust entries stay: /g: not_parsable: at line 1",)
    assert "trust" in [phase.name for phase in stored.phases]


def test_a_recovery_survives_whatever_fails_about_trust_entries(world: World) -> None:
    def fail(*_: object) -> TrustClearing:
        raise MemoryError

    report = recovered(world, Cause.STARTUP, clear_trust=fail)

    assert report.state is ReconciliationState.COMPLETED
    assert report.warnings == ("trust entries stay: MemoryError",)


class Killed(BaseException):
    """The process is gone, at once."""


def test_what_was_taken_out_is_in_the_report_of_a_start_that_was_killed_after_it(
    world: World,
) -> None:
    def clear(db: Database, told: RecordRemovals, enough: Callable[[], bool]) -> TrustClearing:
        with db.transaction():
            told(db, (removal(0),))
        raise Killed

    with pytest.raises(Killed):
        recovered(world, Cause.STARTUP, clear_trust=clear)
    recovered(world, Cause.STARTUP)

    _, cut_off = reports.report_page(world.db, after=None, limit=9).rows
    assert (cut_off.trust_removals, cut_off.bindings.trust_entries) == ((removal(0),), 1)


@pytest.mark.parametrize("seconds", [0.0, reconcile.TRUST_S])
def test_files_of_clis_get_no_more_time_than_there_is(
    world: World, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(reconcile, "TRUST_S", seconds)
    asked = []

    def clear(db: Database, told: RecordRemovals, enough: Callable[[], bool]) -> TrustClearing:
        asked.append(enough())
        return TrustClearing()

    recovered(world, Cause.STARTUP, clear_trust=clear)

    assert asked == [seconds == 0]


def test_a_page_of_reports_is_bounded_by_what_they_hold(world: World) -> None:
    for _ in range(12):
        recovered(world, Cause.STARTUP)
    long = "/" + "w" * 900
    text = json.dumps([[f"r{at}", long, f"{long}{at}", "removed"] for at in range(100)])
    with world.db.transaction():
        world.db.execute("UPDATE reconciliation SET trust_removals = ?", (text,))

    pages, after = [], None
    while True:
        page = reports.report_page(world.db, after=after, limit=1000)
        pages.append(page.rows)
        if (after := page.after) is None:
            break

    assert {len(page) for page in pages[:-1]} == {use_case.PAGE_CHARS // len(text)}
    ids = [report.reconciliation_id for page in pages for report in page]
    assert len(set(ids)) == len(ids) == 12
    with world.db.transaction():
        longer = json.dumps(json.loads(text) * 5)  # more than a page may hold
        world.db.execute("UPDATE reconciliation SET trust_removals = ?", (longer,))
    assert len(reports.report_page(world.db, after=None, limit=1000).rows) == 1
