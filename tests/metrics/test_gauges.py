"""Gauges show the service as it is at one moment."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from runrecovery_service.domain.reconciliation import (
    BindingCounts,
    Cause,
    DecisionCount,
    OrphanCounts,
    Phase,
    Reconciliation,
    ReconciliationState,
)
from runrecovery_service.domain.run import RecoveryState, RunStatus
from runrecovery_service.domain.usage import Usage
from runrecovery_service.metrics.gauges import Present, families_of
from runrecovery_service.rpc.gate import ServiceState
from runrecovery_service.storage.run_counts import RunCount
from runrecovery_service.storage.usage import EngineUsage
from runrecovery_service.storage.webhook_deliveries import Backlog

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
PRESENT = Present(
    version="1",
    instance="here",
    epoch=3,
    now=NOW,
    state=ServiceState.SERVING,
    is_healthy=True,
    is_disk_low=False,
    engines=("a", "b"),
    engines_in_use={"a": 2, "gone": 1},
    slots=4,
    lease_left_s=12.5,
    open_streams={"Watch": 1},
    webhooks_failing_since={},
    report=None,
    removed={"runs": 2, "reports": 0},
    runs=None,
    usage=[],
    backlogs=None,
    counted_at=None,
)
REPORT = Reconciliation(
    reconciliation_id="r",
    instance="here",
    epoch=3,
    cause=Cause.STARTUP,
    state=ReconciliationState.COMPLETED,
    started_at=NOW,
    finished_at=NOW + timedelta(seconds=2),
    phases=(Phase(name="orphans", duration_s=0.5), Phase(name="converge", duration_s=1.25)),
    decisions=(
        DecisionCount(
            rule="running_interrupted", recovery_state=RecoveryState.FAILED_RECONCILED, count=7
        ),
    ),
    orphans=OrphanCounts(found=3, ended=2, already_gone=5, refused=1),
    bindings=BindingCounts(),
    quarantined=1,
    warnings=("one", "two"),
    runs_scanned=7,
    runs_total=7,
    runs_unchanged=0,
    safe_mode=True,
    containment=None,
    error=None,
)


def shown(present: Present) -> dict[str, dict[tuple[str, ...], float]]:
    return {
        family.name: {labels: number for labels, (number,) in family.numbers.items()}
        for family in families_of(present)
    }


def test_the_service_itself_is_shown_before_the_store_has_answered() -> None:
    found = {name: numbers for name, numbers in shown(PRESENT).items() if numbers}

    assert found == {
        "runrecovery_info": {("1", "here"): 1},
        "runrecovery_epoch": {(): 3},
        "runrecovery_state": {
            ("RECOVERING",): 0, ("RECOVERY_FAILED",): 0, ("SERVING",): 1, ("DRAINING",): 0
        },
        "runrecovery_healthy": {(): 1},
        "runrecovery_disk_low": {(): 0},
        "runrecovery_slots": {(): 4},
        "runrecovery_slots_used": {("a",): 2, ("b",): 0, ("gone",): 1},
        "runrecovery_lease_left_seconds": {(): 12.5},
        "runrecovery_streams_open": {("Watch",): 1},
        "runrecovery_retention_removed_total": {("runs",): 2, ("reports",): 0},
    }  # fmt: skip


def test_runs_are_shown_with_zeros_and_ages_grow_while_the_store_is_silent() -> None:
    runs = [
        RunCount(status=RunStatus.QUEUED, engine="a", runs=3, oldest_since=NOW),
        RunCount(status=RunStatus.WAITING_USER, engine="gone", runs=1, oldest_since=NOW),
        RunCount(status=RunStatus.RUNNING, engine="a", runs=2, oldest_since=None),
    ]
    later = NOW + timedelta(seconds=90)

    found = shown(replace(PRESENT, runs=runs, counted_at=NOW, now=later))

    assert found["runrecovery_runs"] == {
        ("a", "QUEUED"): 3, ("a", "RUNNING"): 2, ("a", "WAITING_USER"): 0,
        ("b", "QUEUED"): 0, ("b", "RUNNING"): 0, ("b", "WAITING_USER"): 0,
        ("gone", "WAITING_USER"): 1,
    }  # fmt: skip
    assert found["runrecovery_queue_oldest_seconds"] == {("a",): 90, ("b",): 0}
    assert found["runrecovery_wait_oldest_seconds"] == {("a",): 0, ("b",): 0, ("gone",): 90}
    assert found["runrecovery_runs_age_seconds"] == {(): 90}


def test_a_webhook_shows_how_long_it_fails_and_0_while_it_works() -> None:
    since = {
        "chat": NOW - timedelta(seconds=90),
        "works": None,
        "ahead": NOW + timedelta(seconds=5),
    }

    found = shown(replace(PRESENT, webhooks_failing_since=since))

    assert found["runrecovery_webhook_failing_seconds"] == {
        ("chat",): 90, ("works",): 0, ("ahead",): 0
    }  # fmt: skip


def test_waiting_deliveries_of_a_webhook_are_shown_with_zeros_once_the_store_has_answered() -> None:
    since = {"late": None, "works": None, "given-up": None}
    backlogs = {
        "late": Backlog(due=3, oldest_at=NOW - timedelta(seconds=90), given_up=1),
        "given-up": Backlog(due=0, oldest_at=None, given_up=2),
        "removed": Backlog(due=7, oldest_at=NOW),
    }

    silent = shown(replace(PRESENT, webhooks_failing_since=since))
    found = shown(replace(PRESENT, webhooks_failing_since=since, backlogs=backlogs))

    assert silent["runrecovery_webhook_due"] == {}
    assert found["runrecovery_webhook_due"] == {("late",): 3, ("works",): 0, ("given-up",): 0}
    assert found["runrecovery_webhook_oldest_seconds"] == {
        ("late",): 90, ("works",): 0, ("given-up",): 0
    }  # fmt: skip


def test_no_age_is_negative_when_the_wall_clock_is_set_back() -> None:
    runs = [RunCount(status=RunStatus.QUEUED, engine="a", runs=1, oldest_since=NOW)]

    found = shown(replace(PRESENT, runs=runs, counted_at=NOW, now=NOW - timedelta(seconds=60)))

    assert found["runrecovery_queue_oldest_seconds"][("a",)] == 0
    assert found["runrecovery_runs_age_seconds"] == {(): 0}


def test_the_report_of_the_start_is_shown_with_every_rule() -> None:
    found = shown(replace(PRESENT, report=REPORT))

    assert found["runrecovery_recovery_duration_seconds"] == {(): 2}
    assert found["runrecovery_recovery_phase_seconds"] == {("orphans",): 0.5, ("converge",): 1.25}
    assert found["runrecovery_recovery_decisions"][("running_interrupted",)] == 7
    assert found["runrecovery_recovery_decisions"][("record_damaged",)] == 0
    assert sum(found["runrecovery_recovery_decisions"].values()) == 7
    assert found["runrecovery_recovery_orphans"] == {
        ("ended",): 2, ("already_gone",): 5, ("refused",): 1
    }  # fmt: skip
    assert found["runrecovery_recovery_quarantined"] == {(): 1}
    assert found["runrecovery_recovery_warnings"] == {(): 2}
    assert found["runrecovery_safe_mode"] == {(): 1}


def test_usage_is_shown_by_engine_and_model_and_cost_where_it_was_reported() -> None:
    used = [
        EngineUsage(
            engine="a",
            turns=2,
            usage=Usage(
                input_tokens=100,
                cached_input_tokens=70,
                cache_write_input_tokens=10,
                output_tokens=9,
                reasoning_output_tokens=3,
                cost_nanos=1_500_000_000,
                model="m",
            ),
        ),
        EngineUsage(engine="b", turns=1, usage=Usage(input_tokens=5)),
    ]

    found = shown(replace(PRESENT, usage=used))

    assert found["runrecovery_usage_turns_total"] == {("a", "m"): 2, ("b", ""): 1}
    assert found["runrecovery_usage_tokens_total"] == {
        ("a", "m", "input"): 100, ("a", "m", "output"): 9,
        ("b", "", "input"): 5, ("b", "", "output"): 0,
    }  # fmt: skip
    assert found["runrecovery_usage_part_tokens_total"] == {
        ("a", "m", "cached_input"): 70,
        ("a", "m", "cache_write_input"): 10,
        ("a", "m", "reasoning_output"): 3,
        ("b", "", "cached_input"): 0,
        ("b", "", "cache_write_input"): 0,
        ("b", "", "reasoning_output"): 0,
    }
    assert found["runrecovery_usage_cost_usd_total"] == {("a", "m"): 1.5}
