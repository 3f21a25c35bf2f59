"""Iterators over pages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import pytest
import runrecovery as rr
from runrecovery._values import to_timestamp
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2
from support.scripted_server import Fail, ScriptedServer

if TYPE_CHECKING:
    from client.conftest import Caller, Connect
    from google.protobuf.message import Message


def _runs(*ids: str, then: str = "") -> run_service_pb2.ListRunsResponse:
    runs = [run_pb2.Run(run_id=run_id) for run_id in ids]
    return run_service_pb2.ListRunsResponse(runs=runs, next_page_token=then)


async def test_goes_through_all_pages_also_through_an_empty_one(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("ListRuns", _runs("a", "b", then="t1"), _runs(then="t2"), _runs("c"))

    rows = await caller.collect("runs.list")

    assert [run.run_id for run in rows] == ["a", "b", "c"]
    assert [request.page_token for request in server.asked("ListRuns")] == ["", "t1", "t2"]


async def test_repeats_the_filter_with_every_token(caller: Caller, server: ScriptedServer) -> None:
    server.on("ListRuns", _runs("a", then="t1"), _runs("b"))

    await caller.collect(
        "runs.list",
        statuses=iter([rr.RunStatus.RUN_STATUS_QUEUED]),
        engine="demo",
        labels={"team": "x"},
        created_after=datetime(2026, 11, 24, tzinfo=UTC),
        created_before=datetime(2026, 11, 25, tzinfo=UTC),
        view=rr.RunView.RUN_VIEW_BASIC,
        page_size=7,
    )

    first, second = server.asked("ListRuns")
    assert first.filter == run_service_pb2.RunFilter(
        statuses=[run_pb2.RUN_STATUS_QUEUED],
        engine="demo",
        labels={"team": "x"},
        created_after=to_timestamp(datetime(2026, 11, 24, tzinfo=UTC)),
        created_before=to_timestamp(datetime(2026, 11, 25, tzinfo=UTC)),
    )
    basic = run_pb2.RUN_VIEW_BASIC
    assert (second.filter, second.page_size, second.view) == (first.filter, 7, basic)


async def test_every_page_has_the_deadline_of_the_caller(
    caller: Caller, server: ScriptedServer
) -> None:
    left: list[float | None] = []

    def page(
        request: run_service_pb2.ListRunsRequest, context: grpc.ServicerContext
    ) -> run_service_pb2.ListRunsResponse:
        left.append(context.time_remaining())
        return _runs("a", then="" if request.page_token else "t1")

    server.on("ListRuns", page)

    await caller.collect("runs.list", timeout_s=330.0)

    assert [round(seconds or 0, -2) for seconds in left] == [300, 300]


async def test_asks_for_a_page_only_when_its_rows_are_wanted(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("ListRuns", _runs("a", "b", then="t1"), _runs("c"))

    rows = await caller.collect("runs.list", limit=2)

    assert [run.run_id for run in rows] == ["a", "b"]
    assert len(server.asked("ListRuns")) == 1


async def test_returns_the_rows_before_a_failed_page(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    invalid = Fail(code=grpc.StatusCode.INVALID_ARGUMENT, reason="PAGE_TOKEN_INVALID")
    server.on("ListRuns", _runs("a", then="t1"), invalid)

    assert len(await caller.collect("runs.list", limit=1)) == 1
    with pytest.raises(rr.PageTokenInvalid):
        await caller.collect("runs.list")


async def test_pages_through_interactions(caller: Caller, server: ScriptedServer) -> None:
    def page(number: int, token: str = "") -> run_service_pb2.ListInteractionsResponse:
        return run_service_pb2.ListInteractionsResponse(
            interactions=[run_pb2.Interaction(interaction_id=number)], next_page_token=token
        )

    server.on("ListInteractions", page(1, "t"), page(2))

    rows = await caller.collect("runs.interactions", "r")

    assert [row.interaction_id for row in rows] == [1, 2]
    assert {request.run_id for request in server.asked("ListInteractions")} == {"r"}


async def test_pages_through_reports(caller: Caller, server: ScriptedServer) -> None:
    def page(name: str, token: str = "") -> recovery_service_pb2.ListReconciliationsResponse:
        return recovery_service_pb2.ListReconciliationsResponse(
            reconciliations=[recovery_pb2.Reconciliation(reconciliation_id=name)],
            next_page_token=token,
        )

    server.on("ListReconciliations", page("x", "t"), page("y"))

    rows = await caller.collect("recovery.reconciliations")

    assert [row.reconciliation_id for row in rows] == ["x", "y"]


async def test_pages_through_recovered_runs_by_every_filter(
    caller: Caller, server: ScriptedServer
) -> None:
    page = recovery_service_pb2.ListRecoveredResponse(runs=[run_pb2.Run(run_id="a")])
    server.on("ListRecovered", page)
    after = datetime(2026, 11, 24, 12, 30, 15, 250_000, tzinfo=UTC)

    rows = await caller.collect(
        "recovery.recovered",
        recovery_states=[rr.RecoveryState.RECOVERY_STATE_FAILED_RECONCILED],
        recovery_reason="sticky_process_lost",
        engine="demo",
        labels={"team": "x"},
        recovered_after=after,
        reconciliation_id="x",
        view=rr.RunView.RUN_VIEW_BASIC,
    )

    (request,) = server.asked("ListRecovered")
    assert [run.run_id for run in rows] == ["a"]
    assert list(request.filter.recovery_states) == [run_pb2.RECOVERY_STATE_FAILED_RECONCILED]
    assert request.filter.recovered_after.ToDatetime(tzinfo=UTC) == after
    assert not request.filter.HasField("recovered_before")
    assert dict(request.filter.labels) == {"team": "x"}
    assert request.view == run_pb2.RUN_VIEW_BASIC
    assert (
        request.filter.recovery_reason,
        request.filter.engine,
        request.filter.reconciliation_id,
    ) == ("sticky_process_lost", "demo", "x")


async def test_a_plan_has_its_totals_at_once_and_its_decisions_page_by_page(
    caller: Caller, server: ScriptedServer
) -> None:
    def page(name: str, token: str = "", runs_total: int = 0) -> Message:
        return recovery_service_pb2.PlanRecoveryResponse(
            decisions=[recovery_service_pb2.PlannedDecision(run_id=name)],
            next_page_token=token,
            plan=recovery_service_pb2.RecoveryPlan(runs_total=runs_total) if runs_total else None,
        )

    server.on("PlanRecovery", page("a", "t", runs_total=2), page("b"))

    plan = await caller.call("recovery.plan", page_size=1)

    assert plan.totals.runs_total == 2
    assert len(server.asked("PlanRecovery")) == 1
    rows = await caller.rows(plan.decisions)
    assert [row.run_id for row in rows] == ["a", "b"]
    sent = [(request.page_size, request.page_token) for request in server.asked("PlanRecovery")]
    assert sent == [(1, ""), (1, "t")]


async def test_a_page_above_grpcs_own_limit_arrives(caller: Caller, server: ScriptedServer) -> None:
    big = run_pb2.Run(run_id="a")
    big.input["text"] = "x" * 6_000_000
    server.on("ListRuns", run_service_pb2.ListRunsResponse(runs=[big]))

    assert await caller.collect("runs.list") == [big]


async def test_a_page_above_the_callers_own_limit_is_refused(
    connect: Connect, server: ScriptedServer
) -> None:
    server.on("ListRuns", _runs(*(f"run-{number:04}" for number in range(1000))))
    caller = connect(server.start(), max_receive_bytes=1000)

    with pytest.raises(rr.ResourceExhausted):
        await caller.collect("runs.list")
