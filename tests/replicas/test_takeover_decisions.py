"""A takeover decides on the runs of a dead instance, and on everything that belongs to them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from replicas.dead_instance import AGAIN, HOST_RETURN_S, RESUMES, Pair, crash, deliver, rules_of
from runrecovery_service.domain.reconciliation import Cause, Reconciliation, ReconciliationState
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.recovery import report_warnings
from runrecovery_service.storage import (
    dead_instances,
    decisions,
    launch_records,
    recovery_apply,
    reports,
    runs,
    takeover,
)
from storage.service_store import GONE, Crash, ServiceStore
from support.recovery import FakeLaunchEnder

# -- the decisions -------------------------------------------------------------------------------


def test_runs_that_need_no_session_move_to_the_successor_in_a_report_of_its_own(
    pair: Pair,
) -> None:
    pair.keep_history()
    pair.dead.running(**AGAIN)
    pair.dead.running()
    pair.dead.waiting(profile=Profile.STICKY_PROCESS)
    pair.dead.create(**AGAIN)
    pair.expire()

    report = pair.take_over()

    assert rules_of(pair) == [
        ("requeued", "b", "QUEUED"),
        ("running_interrupted", "b", "FAILED"),
        ("sticky_process_lost", "b", "FAILED"),
        ("requeued", "b", "QUEUED"),
    ]
    assert pair.dead.rows("SELECT DISTINCT owner_epoch FROM run") == [(pair.owner.epoch,)]
    assert (report.cause, report.instance, report.recovered_instance, report.state) == (
        Cause.TAKEOVER, "b", "a", ReconciliationState.COMPLETED,
    )  # fmt: skip
    assert reports.get_report(pair.db, report.reconciliation_id) == report
    assert dead_instances.find_dead(pair.db, pair.rules) == []
    assert pair.stale_writes() == []
    turn = pair.dead.take(owner=pair.owner)
    assert turn is not None
    assert turn.run.attempt == 2
    assert turn.run.recovery is not None
    assert turn.queued_at == turn.run.recovery.recovered_at


def test_runs_whose_session_is_elsewhere_wait_for_their_host_with_their_old_owner(
    pair: Pair,
) -> None:
    pair.keep_history()
    pair.dead.waiting()
    pair.dead.keep_session(pair.dead.running(**RESUMES))
    pair.dead.running(**RESUMES)
    pair.dead.reply(pair.dead.waiting())
    pair.expire()

    pair.take_over()

    assert rules_of(pair) == [
        ("waiting_for_its_host", "a", "WAITING_USER"),
        ("queued_for_its_host", "a", "QUEUED"),
        ("interrupted_before_session", "b", "QUEUED"),
        ("queued_for_its_host", "a", "QUEUED"),
    ]
    assert dead_instances.find_dead(pair.db, pair.rules) == []
    assert pair.dead.rows(
        "SELECT host_return_until - taken_over_at BETWEEN ? AND ?, takeover_done_at IS NOT NULL"
        " FROM instance WHERE name = 'a'",
        int(HOST_RETURN_S * 1e6) - 1_000_000,
        int(HOST_RETURN_S * 1e6) + 1_000_000,
    ) == [(True, True)]
    assert pair.stale_writes() == []


def test_nobody_launches_a_run_that_waits_for_its_host(pair: Pair) -> None:
    pair.dead.reply(pair.dead.waiting())
    pair.expire()
    pair.take_over()

    assert pair.dead.take(owner=pair.owner) is None


def test_the_host_that_returns_goes_on_with_the_runs_that_wait_for_it(pair: Pair) -> None:
    waiting, interrupted = pair.dead.waiting(), pair.dead.running(**RESUMES)
    pair.dead.keep_session(interrupted)
    pair.expire()
    pair.take_over()

    tally = pair.dead.recover()

    assert tally.decisions == {"resumable_waiting_preserved": 1, "interrupted_turn_resumed": 1}
    assert rules_of(pair) == [
        ("resumable_waiting_preserved", "a", "WAITING_USER"),
        ("interrupted_turn_resumed", "a", "QUEUED"),
    ]
    assert pair.dead.get(waiting).etag == waiting.etag
    turn = pair.dead.take()
    assert turn is not None
    assert turn.interruption is not None, "the turn is resumed, and not started over"
    assert pair.dead.rows(
        "SELECT taken_over_by, host_return_until FROM instance ORDER BY name"
    ) == [
        (None, None),
        (None, None),
    ]


def test_a_host_that_does_not_return_in_time_fails_its_runs_which_can_be_reopened(
    pair: Pair,
) -> None:
    run = pair.dead.waiting()
    pair.dead.reply(pair.dead.waiting())
    pair.expire()
    pair.take_over()
    pair.dead.db.execute("UPDATE instance SET host_return_until = 1 WHERE name = 'a'")
    assert dead_instances.find_dead(pair.db, pair.rules) == ["a"]

    report = pair.take_over()

    assert rules_of(pair) == [("host_did_not_return", "a", "FAILED")] * 2
    assert report.cause is Cause.TAKEOVER
    got = pair.dead.get(run)
    assert got.error is not None
    assert got.error.code == "SESSION_RESUME_FAILED"
    assert pair.dead.column(run, "retired_value") == "secret"
    assert dead_instances.find_dead(pair.db, pair.rules) == []


def test_with_shared_workspaces_every_run_goes_on_at_the_successor(pair: Pair) -> None:
    pair.keep_history()
    pair.shares_workspaces = True
    waiting = pair.dead.waiting()
    pair.dead.keep_session(pair.dead.running(**RESUMES))
    pair.dead.reply(pair.dead.waiting())
    pair.expire()

    pair.take_over()

    assert rules_of(pair) == [
        ("resumable_waiting_preserved", "b", "WAITING_USER"),
        ("interrupted_turn_resumed", "b", "QUEUED"),
        ("accepted_reply_redriven", "b", "QUEUED"),
    ]
    assert pair.dead.get(waiting).etag == waiting.etag
    assert pair.dead.rows("SELECT host_return_until FROM instance WHERE name = 'a'") == [(None,)]
    assert pair.stale_writes() == []


def test_a_cancel_through_a_third_instance_that_meets_a_takeover_reads_the_run_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The takeover keeps the version of a waiting run. Its owner and epoch have changed."""
    pair.shares_workspaces = True
    pair.keep_history()
    run, third, demand_etag = pair.dead.waiting(), pair.third(), runs.demand_etag
    pair.expire()
    taken: list[Reconciliation] = []

    def take_over() -> None:
        taken.append(pair.take_over())
        pair.db.close()

    def after_a_takeover(*given: Any) -> None:
        if not taken:
            with ThreadPoolExecutor(1) as other:
                other.submit(take_over).result()
        demand_etag(*given)

    monkeypatch.setattr(runs, "demand_etag", after_a_takeover)

    canceled = ServiceStore(db=third.db, owner=third.owner, now=pair.dead.now).cancel(run)

    assert (canceled.status, canceled.owner) == (RunStatus.CANCELED, "b")
    assert canceled.event_count == run.event_count + 2  # the decision and the cancel
    assert pair.dead.rows(
        "SELECT no FROM run_event UNION ALL SELECT sequence FROM recovery_event ORDER BY 1"
    ) == [(2,), (3,), (4,), (5,)]  # without that of the create, which the row of the run implies
    assert pair.stale_writes() == []


def test_runs_that_waited_for_their_host_go_on_once_workspaces_are_shared(pair: Pair) -> None:
    pair.dead.waiting()
    pair.expire()
    pair.take_over()
    pair.shares_workspaces = True
    assert dead_instances.find_dead(pair.db, pair.rules) == ["a"]

    pair.take_over()

    assert rules_of(pair) == [("resumable_waiting_preserved", "b", "WAITING_USER")]
    assert dead_instances.find_dead(pair.db, pair.rules) == []


def test_a_run_that_keeps_its_earlier_decision_still_changes_its_owner(pair: Pair) -> None:
    pair.shares_workspaces = True
    run = pair.dead.waiting()
    pair.dead.recover()
    pair.expire()

    report = pair.take_over()

    assert (report.runs_scanned, report.runs_unchanged) == (1, 1)
    assert rules_of(pair) == [("resumable_waiting_preserved", "b", "WAITING_USER")]
    assert pair.dead.reply(run, owner=pair.owner).status is RunStatus.QUEUED


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_runs_that_stay_with_their_owner_keep_no_later_page_from_its_decisions(
    pair: Pair, rows: int
) -> None:
    for _ in range(3):
        pair.dead.waiting()
    pair.dead.create(**AGAIN)
    pair.expire()

    report = pair.take_over(batch_rows=rows)

    assert report.runs_scanned == 4
    assert rules_of(pair) == [
        *[("waiting_for_its_host", "a", "WAITING_USER")] * 3,
        ("requeued", "b", "QUEUED"),
    ]


def test_a_damaged_run_is_quarantined_at_the_successor(pair: Pair) -> None:
    damaged = pair.dead.create()
    pair.dead.set(damaged, labels="{")
    pair.dead.create(**AGAIN)
    pair.expire()

    report = pair.take_over()

    assert report.quarantined == 1
    assert rules_of(pair) == [("record_damaged", "b", "QUEUED"), ("requeued", "b", "QUEUED")]
    assert dead_instances.find_dead(pair.db, pair.rules) == []


def test_deadlines_of_a_moved_run_are_those_of_the_successors_clock(pair: Pair) -> None:
    """The two hosts were booted at different times."""
    moved = pair.dead.running(**AGAIN, max_run_s=600.0).run
    stays = pair.dead.waiting(session_timeout_s=300.0, require_user_reply=False)
    pair.expire()
    wall = pair.dead.column(moved, "run_deadline_at")
    pair.dead.reboot(100)

    pair.take_over()

    due, clock = pair.dead.column(moved, "run_due_us"), pair.dead.column(moved, "due_clock")
    ahead_us = due - pair.dead.steady_us
    assert clock == "boot-1+"
    assert abs(ahead_us - (wall - int(pair.dead.now.timestamp() * 1e6))) < 30_000_000
    assert pair.dead.column(stays, "due_clock") == "boot-1"


# -- what belongs to runs ------------------------------------------------------------------------


def test_launches_on_another_host_stay_on_record_and_the_report_says_so(pair: Pair) -> None:
    pair.dead.running(**AGAIN)
    pair.expire()

    report = pair.take_over()

    assert pair.dead.rows("SELECT instance, state FROM process_lease") == [("a", "INTENT")]
    assert report.warnings == (report_warnings.launches_elsewhere(1),)
    assert pair.dead.take(owner=pair.owner) is not None


def test_launches_on_this_host_are_ended_before_any_run_is_decided(pair: Pair) -> None:
    run = pair.dead.running(**AGAIN).run
    pair.expire()
    taken = pair.begin()
    seen: list[object] = []

    def end(launches: Any) -> dict[int, Ending]:
        seen.append(pair.dead.get(run).status)
        return {one.key: Ending(found=1, ended=1, gone=True) for one in launches}

    report = pair.recover(taken, launches=FakeLaunchEnder(end), is_here=True)

    assert seen == [RunStatus.RUNNING]
    assert (report.orphans.found, report.orphans.ended, report.warnings) == (1, 1, ())
    assert pair.dead.rows("SELECT state FROM process_lease") == [("CLOSED",)]


def test_a_process_that_cannot_be_killed_is_swept_by_the_successor_and_holds_its_run_back(
    pair: Pair,
) -> None:
    pair.dead.running(**AGAIN)
    pair.expire()
    taken = pair.begin()
    pair.recover(
        taken,
        launches=FakeLaunchEnder(
            lambda launches: {one.key: Ending(found=1, ended=0, gone=False) for one in launches}
        ),
        is_here=True,
    )

    (stuck,) = launch_records.launches_to_sweep(
        pair.db, pair.owner, now=pair.dead.now, closed_within_s=60.0
    )
    assert stuck.unended
    assert pair.dead.take(owner=pair.owner) is None
    launch_records.record_late_end(pair.db, [(stuck, GONE)], now=pair.dead.now)
    assert pair.dead.take(owner=pair.owner) is not None


def test_deliveries_of_webhooks_go_to_the_successor_also_those_of_later_events(pair: Pair) -> None:
    run = pair.dead.waiting()
    deliver(pair, run, 1)
    pair.expire()
    pair.take_over()
    taken = takeover.take_deliveries(pair.db, pair.owner, stopping=lambda: False)
    deliver(pair, run, 2)

    later = takeover.take_deliveries(pair.db, pair.owner, stopping=lambda: False, rows=1)

    assert (taken, later) == (1, 1)
    assert pair.dead.rows("SELECT DISTINCT instance FROM webhook_delivery") == [("b",)]


def test_an_instance_that_has_only_deliveries_left_is_taken_over(pair: Pair) -> None:
    run = pair.dead.running().run
    pair.dead.db.execute("UPDATE run SET status = 'FAILED'")
    deliver(pair, run, 1)
    pair.expire()

    assert dead_instances.find_dead(pair.db, pair.rules) == ["a"]


def test_a_takeover_is_no_start_in_the_count_for_safe_mode(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.dead.create()
    pair.expire()
    monkeypatch.setattr(recovery_apply, "apply_batch", crash)
    for _ in range(3):
        with pytest.raises(Crash):
            pair.take_over()

    since = pair.dead.now.replace(year=2020)
    assert reports.count_unfinished_starts(pair.db, pair.owner, since) == 0


def test_a_decision_of_a_takeover_names_successor_and_facts(pair: Pair) -> None:
    run = pair.dead.waiting()
    pair.expire()
    pair.take_over()

    (info,) = decisions.history(pair.db, run.run_id)

    assert (info.recovery_reason, info.instance) == ("waiting_for_its_host", "b")
