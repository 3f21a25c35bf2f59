"""`runrecovery recovery`: status, lists, watches, explanations, plans, reports."""

from __future__ import annotations

import re

import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2
from runrecovery_service.cli import prune
from runrecovery_service.cli.connection import ServiceConnection
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, Run, script_watch


def test_a_status_watch_ends_when_the_service_serves(run: Run, server: FixedAnswers) -> None:
    serving = recovery_service_pb2.GetRecoveryStatusResponse(
        state=recovery_pb2.SERVICE_STATE_SERVING, instance="default", epoch=3
    )
    server.answers["GetRecoveryStatus"] = [serving]

    ended = run("recovery", "status", "--watch", "--server", server.address)

    assert ended.code == ExitCode.OK
    assert "default, epoch 3" in ended.out


def test_a_list_of_recovered_runs_sends_every_filter(run: Run, server: FixedAnswers) -> None:
    server.answers["ListRecovered"] = [recovery_service_pb2.ListRecoveredResponse()]

    said = ["--state", "failed_reconciled", "--reason", "x", "--after", "2026-11-24T10:00:00"]
    said += ["--label", "a=1"]
    assert run("recovery", "list", *said, "--server", server.address).code == ExitCode.OK

    asked = recovery_service_pb2.ListRecoveredRequest.FromString(server.asked[0][1])
    request = asked.filter
    assert asked.view == run_pb2.RUN_VIEW_BASIC
    assert dict(request.labels) == {"a": "1"}
    assert list(request.recovery_states) == [run_pb2.RECOVERY_STATE_FAILED_RECONCILED]
    assert request.recovery_reason == "x"
    assert request.recovered_after.ToJsonString() == "2026-11-24T10:00:00Z"


def test_a_watch_of_decisions_sends_every_filter_and_prints_a_line_each(
    run: Run, server: FixedAnswers
) -> None:
    made = run_pb2.RecoveryInfo(
        recovery_state=run_pb2.RECOVERY_STATE_FAILED_RECONCILED,
        recovery_reason="rule_7",
        status_before=run_pb2.RUN_STATUS_RUNNING,
        status_after=run_pb2.RUN_STATUS_FAILED,
        error_code="GONE",
    )
    decision = recovery_service_pb2.RecoveredRun(run_id="r", recovery=made)
    script_watch(server)
    server.answers["WatchRecovered"] = [
        recovery_service_pb2.WatchRecoveredResponse(cursor="c0", bookmark=run_pb2.WatchBookmark()),
        recovery_service_pb2.WatchRecoveredResponse(cursor="c1", decision=decision),
    ]

    said = ["--after", "c0", "--state", "failed_reconciled", "--reason", "rule_7"]
    said += ["--engine", "e", "--label", "a=1"]
    ended = run("recovery", "watch", *said, "--server", server.address)

    request = recovery_service_pb2.WatchRecoveredRequest.FromString(server.asked[-1][1])
    assert ended.out == "-  r  RUNNING → FAILED  FAILED_RECONCILED  rule_7  GONE\n"
    assert request == recovery_service_pb2.WatchRecoveredRequest(
        filter=recovery_service_pb2.RecoveredFilter(
            recovery_states=[run_pb2.RECOVERY_STATE_FAILED_RECONCILED],
            recovery_reason="rule_7",
            engine="e",
            labels={"a": "1"},
        ),
        after_cursor="c0",
    )


def test_an_explanation_shows_the_decision_the_facts_and_the_processes(
    run: Run, server: FixedAnswers
) -> None:
    explanation = recovery_service_pb2.RecoveryExplanation(
        decision=run_pb2.RecoveryInfo(
            recovery_state=run_pb2.RECOVERY_STATE_FAILED_RECONCILED, recovery_reason="rule_7"
        ),
        because="its process was lost",
        facts=[
            recovery_service_pb2.RecoveryFact(name="HANDLE", held=True, source="the record"),
            recovery_service_pb2.RecoveryFact(name="CANCEL", source="no \x1b[2J cancel"),
        ],
        processes=[
            recovery_service_pb2.OrphanedProcess(
                pid=77,
                attempt=1,
                turn=2,
                evidence="cookie",
                signals=["SIGTERM", "SIGKILL"],
                ended=True,
                ended_by="shim",
            ),
            recovery_service_pb2.OrphanedProcess(pid=78, evidence="descent"),
        ],
    )
    server.answers["ExplainRecovery"] = [
        recovery_service_pb2.ExplainRecoveryResponse(explanations=[explanation])
    ]

    ended = run("recovery", "explain", "r", "--server", server.address)

    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "decision: FAILED_RECONCILED, rule_7" in lines
    assert "because: its process was lost" in lines
    assert "HANDLE yes the record" in lines
    assert r"CANCEL no no \x1b[2J cancel" in lines
    assert "77 1 2 cookie SIGTERM SIGKILL ended by shim" in lines
    assert "78 0 0 descent - not found dead" in lines


def test_an_explanation_of_a_run_without_decisions_says_so(run: Run, server: FixedAnswers) -> None:
    server.answers["ExplainRecovery"] = [recovery_service_pb2.ExplainRecoveryResponse()]

    ended = run("recovery", "explain", "r", "--server", server.address)

    assert ended.out == "no restart has decided about this run\n"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_plan_shows_its_totals_and_then_its_decisions(
    run: Run,
    server: FixedAnswers,
    as_json: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    planned = recovery_service_pb2.PlannedDecision(
        run_id="a", engine="e", recovery_reason="rule_7", unchanged=True
    )
    totals = recovery_service_pb2.RecoveryPlan(
        decisions=[recovery_pb2.DecisionCount(rule="rule_7", count=2)],
        runs_total=2,
        runs_unchanged=1,
        groups=[
            recovery_service_pb2.PlannedGroup(
                outcome=recovery_service_pb2.PLANNED_OUTCOME_KEPT_WAITING,
                runs=2,
                tokens=1200,
                running_time=Duration(seconds=90),
            )
        ],
    )
    server.answers["PlanRecovery"] = [
        recovery_service_pb2.PlanRecoveryResponse(decisions=[planned, planned], plan=totals)
    ]

    said = ["--limit", "1", *(["--json"] if as_json else [])]
    ended = run("recovery", "plan", *said, "--server", server.address)

    first, *_, last = ended.out.splitlines()
    if as_json:
        assert json_format.Parse(first, recovery_service_pb2.RecoveryPlan()) == totals
        assert json_format.Parse(last, recovery_service_pb2.PlannedDecision()) == planned
    else:
        assert " ".join(first.split()) == "runs: 2, 1 unchanged"
        assert last.split("\t")[:2] == ["a", "e"]
        assert "2 x rule_7" in ended.out
        assert "kept waiting: 2 runs, 1200 tokens, 90 s of running turns" in ended.out
        assert "--limit 0 shows all" in ended.err


def test_the_latest_report_is_shown_with_its_decisions_and_warnings(
    run: Run, server: FixedAnswers
) -> None:
    report = recovery_pb2.Reconciliation(
        reconciliation_id="id-7",
        state=recovery_pb2.RECONCILIATION_STATE_COMPLETED,
        decisions=[
            recovery_pb2.DecisionCount(
                rule="running_interrupted",
                recovery_state=run_pb2.RECOVERY_STATE_FAILED_RECONCILED,
                count=12,
            )
        ],
        warnings=["pid 7 \x1b[2J refused"],
        bindings=recovery_pb2.BindingCounts(trust_entries=101),
        trust_removals=[
            recovery_pb2.TrustRemoval(run_id="r", file="/c", folder="/w\x1b", outcome="removed"),
            recovery_pb2.TrustRemoval(file="/c", folder="/x", outcome="gone"),
        ],
    )
    page = recovery_service_pb2.ListReconciliationsResponse(reconciliations=[report])
    server.answers["ListReconciliations"] = [page]

    ended = run("recovery", "show", "--server", server.address)

    assert "id-7" in ended.out
    assert "12 x running_interrupted → FAILED_RECONCILED" in ended.out
    assert r"warning: pid 7 \x1b[2J refused" in ended.out
    assert "101 trust entries" in ended.out
    assert r"trust of /w\x1b in /c: removed (run r)" in ended.out
    assert "trust of /x in /c: gone\n" in ended.out


def test_a_service_without_a_report_is_not_found(run: Run, server: FixedAnswers) -> None:
    server.answers["ListReconciliations"] = [recovery_service_pb2.ListReconciliationsResponse()]

    assert run("recovery", "show", "--server", server.address).code == ExitCode.NOT_FOUND


def pruned(*counts: tuple[str, int, int], done: bool = True) -> recovery_service_pb2.PruneResponse:
    return recovery_service_pb2.PruneResponse(
        kinds=[
            recovery_service_pb2.PrunedKind(kind=kind, count=count, file_bytes=size)
            for kind, count, size in counts
        ],
        done=done,
    )


def test_a_dry_run_shows_what_would_be_removed(run: Run, server: FixedAnswers) -> None:
    server.answers["Prune"] = [pruned(("runs", 12, 4096), ("receipts", 3, 0))]

    ended = run("prune", "--dry-run", "--server", server.address)

    assert [recovery_service_pb2.PruneRequest.FromString(sent) for _, sent in server.asked] == [
        recovery_service_pb2.PruneRequest(dry_run=True)
    ]
    assert ended.out.splitlines() == [
        "would be removed:",
        "KIND      COUNT  FILE BYTES",
        "runs      12     4096",
        "receipts  3      0",
        "oldest ended run that is kept: none",
    ]


def test_a_dry_run_names_the_folders_of_unknown_runs(run: Run, server: FixedAnswers) -> None:
    answer = pruned(("runs", 1, 0))
    answer.unknown_folders = 2
    server.answers["Prune"] = [answer]

    ended = run("prune", "--dry-run", "--server", server.address)

    assert ended.out.splitlines()[-1] == "folders of unknown runs, which are never removed: 2"


def test_a_prune_without_retention_says_so(run: Run, server: FixedAnswers) -> None:
    server.answers["Prune"] = [pruned()]

    ended = run("prune", "--server", server.address)

    assert ended.out == "nothing is removed: the service has no [retention]\n"


def test_a_prune_calls_until_it_is_done_and_shows_the_sums() -> None:
    answers = iter([pruned(("runs", 5, 100), done=False), pruned(("runs", 2, 10))])

    class Recovery:
        def prune(self) -> recovery_service_pb2.PruneResponse:
            return next(answers)

    class Client:
        recovery = Recovery()

    service = ServiceConnection(client=Client(), timeout_s=1.0, as_json=False)  # type: ignore[arg-type]

    assert prune.remove_all(service) == pruned(("runs", 7, 110))


def test_webhooks_are_shown_with_their_waiting_deliveries(run: Run, server: FixedAnswers) -> None:
    failing = recovery_service_pb2.Webhook(
        name="chat", origin="https://chat.example", due=3, given_up=1, delivered=9, failed=4,
        last_failure="no answer in time",
    )  # fmt: skip
    failing.oldest_due_at.FromJsonString("2026-11-25T10:00:00Z")
    failing.failing_since.FromJsonString("2026-11-25T10:00:01Z")
    off = recovery_service_pb2.Webhook(name="off", origin="http://10.0.0.1:8080", disabled=True)
    server.answers["ListWebhooks"] = [
        recovery_service_pb2.ListWebhooksResponse(webhooks=[failing, off])
    ]

    ended = run("webhooks", "list", "--server", server.address)

    rows = [re.split("  +", line.strip()) for line in ended.out.splitlines()]
    assert rows == [
        ["NAME", "TO", "STATE", "DUE", "OLDEST DUE", "GIVEN UP", "DELIVERED", "FAILED",
         "LAST FAILURE"],
        ["chat", "https://chat.example", "failing", "3", "2026-11-25 10:00:00Z", "1", "9", "4",
         "no answer in time"],
        ["off", "http://10.0.0.1:8080", "disabled", "0", "-", "0", "0", "0", "-"],
    ]  # fmt: skip


def test_a_service_without_webhooks_says_so(run: Run, server: FixedAnswers) -> None:
    server.answers["ListWebhooks"] = [recovery_service_pb2.ListWebhooksResponse()]

    ended = run("webhooks", "list", "--server", server.address)

    assert ended.out == "the service has no [[webhooks]]\n"


def test_a_retry_says_how_many_had_been_given_up(run: Run, server: FixedAnswers) -> None:
    server.answers["RetryWebhook"] = [recovery_service_pb2.RetryWebhookResponse(revived=7)]

    ended = run("webhooks", "retry", "chat", "--server", server.address)

    assert ended.out == "tried at once; given up before: 7\n"
