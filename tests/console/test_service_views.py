"""Reports, plans, instances and lists of runs as their pages show them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.json_format import ParseDict
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2
from runrecovery_service.console.instance_view import instance_view
from runrecovery_service.console.live import instances_version, service_version
from runrecovery_service.console.moments import duration_text, moment_of
from runrecovery_service.console.plan_view import plan_view
from runrecovery_service.console.reports import report_view, service_view
from runrecovery_service.console.run_list import RunFilter, row_of
from runrecovery_service.console.run_view import decision_views, run_view
from runrecovery_service.console.waiting import version_of

NOW = datetime(2026, 11, 30, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0002, "< 1 ms"),
        (0.34, "340 ms"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (185, "3 min 5 s"),
        (7200, "2 h"),
        (187_300, "2 d 4 h"),
        (-5, "0 ms"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration_text(timedelta(seconds=seconds)) == text


def test_a_time_is_shown_in_utc_and_exactly() -> None:
    shown = moment_of(datetime(2026, 11, 30, 9, 5, 7, 123_456, tzinfo=UTC))

    assert (shown.iso, shown.utc, shown.exact) == (
        "2026-11-30T09:05:07.123Z",
        "2026-11-30 09:05:07 UTC",
        "2026-11-30 09:05:07.123 UTC",
    )


def test_a_report_has_its_phases_as_parts_and_its_rules_as_shares() -> None:
    report = ParseDict(
        {
            "state": "RECONCILIATION_STATE_COMPLETED",
            "trigger": "RECONCILIATION_TRIGGER_STARTUP",
            "started_at": "2026-11-30T10:00:00Z",
            "finished_at": "2026-11-30T10:00:02.500Z",
            "phases": [{"name": "orphans", "duration": "2s"}, {"name": "new", "duration": "0.5s"}],
            "decisions": [
                {
                    "rule": "requeued",
                    "recovery_state": "RECOVERY_STATE_RECOVERED_QUEUED",
                    "count": 4,
                },
                {"rule": "running_interrupted", "recovery_state": 3, "count": 1},
            ],
            "orphans": {"found": 1, "ended": 1, "refused": 2},
            "bindings": {"slots": 1, "trust_entries": 2},
        },
        recovery_pb2.Reconciliation(),
    )

    shown = report_view(report)

    assert (shown.row.trigger, shown.row.took, shown.row.decided) == ("Start", "2.5 s", 5)
    assert [part.text for part in shown.bar] == ["kill orphans: 2.0 s", "new: 500 ms"]
    assert [(rule.rule, rule.outcome.text, rule.width) for rule in shown.rules] == [
        ("requeued", "queued again", 100),
        ("running_interrupted", "failed", 25),
    ]
    assert shown.orphans == (
        "1 process outlived the service: 1 ended.",
        "2 could not be ended: see the warnings.",
    )
    assert shown.released == ("1 slot", "2 trust entries")


def test_a_recovery_under_way_is_shown_as_progress() -> None:
    status = ParseDict(
        {
            "state": "SERVICE_STATE_RECOVERING",
            "reconciliation": {
                "state": "RECONCILIATION_STATE_RUNNING",
                "runs_scanned": 5,
                "runs_total": 9,
            },
        },
        recovery_service_pb2.GetRecoveryStatusResponse(),
    )

    shown = service_view(status)

    assert shown.progress is not None
    assert (shown.state.text, shown.progress.scanned, shown.progress.total) == ("recovering", 5, 9)


def group(outcome: str, runs: int, tokens: int = 0, seconds: int = 0) -> dict[str, object]:
    """Return a group of a plan as JSON."""
    return {
        "outcome": f"PLANNED_OUTCOME_{outcome}",
        "runs": runs,
        "tokens": tokens,
        "running_time": f"{seconds}s",
    }


@pytest.mark.parametrize(
    ("groups", "headline", "tone"),
    [
        ([], "A restart now would cost nothing: no run is unfinished.", "good"),
        (
            [group("KEPT_WAITING", 1), group("RESUMED", 2, 900, 5)],
            "A restart now would lose no work: 3 unfinished runs would go on.",
            "good",
        ),
        (
            [group("KEPT_WAITING", 5), group("FAILED", 1, 1200, 65)],
            "A restart now would cost 1 run its work: 1,200 tokens and 1 min 5 s of process time.",
            "bad",
        ),
        (
            [group("RESTARTED", 2), group("FAILED", 1), group("CANCELED", 4)],
            "A restart now would cost 3 runs their work.",
            "bad",
        ),
    ],
)
def test_the_plan_says_in_one_sentence_what_a_restart_costs(
    groups: list[dict[str, object]], headline: str, tone: str
) -> None:
    total = sum(int(str(each["runs"])) for each in groups)
    plan = ParseDict({"groups": groups, "runs_total": total}, recovery_service_pb2.RecoveryPlan())

    shown = plan_view(plan)

    assert (shown.headline, shown.tone) == (headline, tone)


def test_an_instance_is_alive_stopped_or_dead() -> None:
    alive = recovery_service_pb2.Instance(name="a", alive=True, max_running=4, slots_held=1)
    stopped = ParseDict({"stopped_at": "2026-11-30T09:00:00Z"}, recovery_service_pb2.Instance())
    dead = ParseDict(
        {"taken_over_by": "a", "host_return_until": "2026-11-30T11:00:00Z"},
        recovery_service_pb2.Instance(),
    )

    shown = [instance_view(each, NOW) for each in (alive, stopped, dead)]

    assert [each.state.text for each in shown] == ["alive", "stopped", "dead"]
    assert [part.tone for part in shown[0].slots] == ["busy", "free"]
    assert shown[2].takeover == "being taken over by a"
    assert shown[2].host_return_until is not None


def test_a_filter_becomes_a_request_and_an_address() -> None:
    wanted = RunFilter.of({"status": "waiting", "engine": " coder ", "label": "a=b, c=d=e"})

    request = wanted.request("t1")

    assert list(request.filter.statuses) == [run_pb2.RUN_STATUS_WAITING_USER]
    assert (request.filter.engine, dict(request.filter.labels)) == ("coder", {"a": "b", "c": "d=e"})
    assert [request.page_token] == ["t1"]
    assert wanted.address(page="t&") == (
        "/runs?status=waiting&engine=coder&label=a%3Db%2C+c%3Dd%3De&page=t%26"
    )


def test_a_filter_by_time_is_in_utc_and_stays_in_the_address() -> None:
    wanted = RunFilter.of({"after": "2026-11-30T09:05", "before": "2026-12-01T00:00"})

    request = wanted.request("")

    assert request.filter.created_after.ToJsonString() == "2026-11-30T09:05:00Z"
    assert request.filter.created_before.ToJsonString() == "2026-12-01T00:00:00Z"
    assert wanted.address() == "/runs?after=2026-11-30T09%3A05&before=2026-12-01T00%3A00"
    assert not wanted.is_empty
    half = RunFilter.of({"before": "2026-12-01T00:00"}).request("").filter
    assert not half.HasField("created_after")


@pytest.mark.parametrize(
    "query",
    [
        {"status": "<x>"},
        {"after": "yesterday"},
        {"after": "2026-13-01T00:00"},
        {"before": "2026-11-30"},
        {"before": "2026-11-30T09:05+01:00"},
        {"before": "+10000-01-01T00:0"},
        {"before": "0000-01-01T00:00"},
    ],
)
def test_an_unknown_status_and_what_is_not_a_time_filter_nothing(query: dict[str, str]) -> None:
    wanted = RunFilter.of(query)

    assert wanted.is_empty
    assert wanted.request("") == RunFilter().request("")


def test_a_quarantined_run_is_shown_as_such() -> None:
    run = run_pb2.Run(run_id="r")

    assert row_of(run).status.text == "quarantined"
    assert not run_view(run, NOW).can_cancel


def test_a_page_shows_the_latest_20_decisions() -> None:
    explanations = [
        recovery_service_pb2.RecoveryExplanation(because=f"reason {number}") for number in range(21)
    ]

    shown = decision_views(explanations)

    assert [each.because for each in shown] == [f"reason {number}" for number in range(20)]


@pytest.mark.parametrize(("until", "can"), [("10:00:01", True), ("09:59:59", False)])
def test_a_failed_run_can_be_reopened_while_its_time_lasts(until: str, *, can: bool) -> None:
    run = ParseDict(
        {"status": "RUN_STATUS_FAILED", "reopenable_until": f"2026-11-30T{until}Z"}, run_pb2.Run()
    )

    assert run_view(run, NOW).can_reopen is can


def test_a_page_of_instances_is_loaded_again_for_a_change_but_not_for_a_renewed_lease() -> None:
    def version(**changes: object) -> str:
        told = {"name": "a", "epoch": 3, "leaseUntil": "2026-11-30T10:00:00Z"} | changes
        return instances_version([ParseDict(told, recovery_service_pb2.Instance())])

    assert version(leaseUntil="2026-11-30T10:00:10Z") == version()
    assert len({version(), version(epoch=4), version(name="b"), instances_version([])}) == 4


def test_a_page_of_the_service_is_loaded_again_for_a_new_state_and_for_each_progress() -> None:
    def version(**changes: object) -> str:
        report = {"reconciliationId": "r", "runsScanned": changes.pop("scanned", 1)}
        told = {"instance": "a", "epoch": 3, "reconciliation": report} | changes
        status = recovery_service_pb2.GetRecoveryStatusResponse()
        return service_version(ParseDict(told, status))

    assert version() == version()
    others = (version(state="SERVICE_STATE_SERVING"), version(scanned=2), version(epoch=4))
    assert len({version(), *others}) == 4


def test_a_list_of_runs_is_loaded_again_for_a_changed_run_and_for_another_one() -> None:
    one = run_pb2.Run(run_id="a", etag="1")
    decided = run_pb2.Run(run_id="a", etag="1", recovery=run_pb2.RecoveryInfo(recovery_count=1))

    assert version_of([one]) == version_of([run_pb2.Run(run_id="a", etag="1")])
    lists = [[], [one], [run_pb2.Run(run_id="a", etag="2")], [decided], [one, one]]
    assert len({version_of(runs) for runs in lists}) == len(lists)
