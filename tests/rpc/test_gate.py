"""The gate, and the method wrapper that checks it, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as run_pb
from runrecovery.v1.recovery_service_pb2_grpc import RecoveryServiceStub
from runrecovery.v1.run_service_pb2_grpc import RunServiceStub
from runrecovery_service.domain.errors import (
    ReconciliationInProgress,
    RunNotFound,
    RunRecoveryError,
    ShuttingDown,
)
from runrecovery_service.rpc.gate import Access, Gate, ServiceState
from runrecovery_service.rpc.method_handlers import (
    RECOVERY_SERVICE,
    RUN_SERVICE,
    access_of,
    contract_methods,
    grpc_handlers,
)
from runrecovery_service.rpc.method_wrapper import MethodWrapper

# -- the gate ----------------------------------------------------------------------------------


def gate_that(*steps: Callable[[Gate], None]) -> Gate:
    gate = Gate()
    for step in steps:
        step(gate)
    return gate


@pytest.mark.parametrize(
    ("steps", "refusals"),
    [
        ((), {Access.READ: ReconciliationInProgress, Access.MUTATION: ReconciliationInProgress}),
        (
            (Gate.set_recovery_failed,),
            {Access.READ: ReconciliationInProgress, Access.MUTATION: ReconciliationInProgress},
        ),
        (
            (Gate.set_recovery_failed, Gate.set_recovering),
            {Access.READ: ReconciliationInProgress, Access.MUTATION: ReconciliationInProgress},
        ),
        ((Gate.open,), {}),
        ((Gate.open, Gate.drain), {Access.MUTATION: ShuttingDown}),
        (
            (Gate.open, Gate.drain, Gate.close),
            {Access.READ: ShuttingDown, Access.MUTATION: ShuttingDown},
        ),
        ((Gate.drain,), {Access.READ: ShuttingDown, Access.MUTATION: ShuttingDown}),
        ((Gate.drain, Gate.open), {Access.READ: ShuttingDown, Access.MUTATION: ShuttingDown}),
    ],
    ids=[
        "new",
        "failed",
        "retried",
        "open",
        "drained",
        "closed",
        "drained-early",
        "opened-too-late",
    ],
)
def test_the_state_of_the_gate_decides_which_calls_pass(
    steps: tuple[Callable[[Gate], None], ...], refusals: dict[Access, type[RunRecoveryError]]
) -> None:
    gate = gate_that(*steps)

    met = {}
    for access in Access:
        try:
            gate.check_access(access)
        except RunRecoveryError as error:
            met[access] = type(error)
    assert met == refusals


def test_draining_is_final() -> None:
    gate = gate_that(Gate.open, Gate.drain)

    for later in (gate.open, gate.set_recovering, gate.set_recovery_failed):
        later()
        assert gate.state is ServiceState.DRAINING


async def test_waiting_ends_with_a_change_or_the_timeout() -> None:
    gate = Gate()
    change = gate.change

    await gate.wait(change, timeout_s=0.01)
    assert not change.is_set()
    gate.open()
    await gate.wait(change, timeout_s=60)
    assert change.is_set()
    assert not gate.change.is_set()


def test_a_change_to_the_same_state_is_not_announced() -> None:
    gate = gate_that(Gate.open)
    change = gate.change

    gate.open()
    gate.set_storage_answers(answers=True)
    assert not change.is_set()
    gate.set_storage_answers(answers=False)
    assert change.is_set()


def test_every_method_of_the_contract_has_an_access_rule() -> None:
    access = {
        method.name: access_of(method)
        for service in (RUN_SERVICE, RECOVERY_SERVICE)
        for method in service.methods
    }

    assert {name for name, when in access.items() if when is Access.ALWAYS} == {
        "GetRecoveryStatus",
        "GetInstances",
        "ListReconciliations",
        "GetReconciliation",
    }
    assert {name for name, when in access.items() if when is Access.MUTATION} == {
        "CreateRun",
        "SubmitReply",
        "CancelRun",
        "ReopenRun",
        "Prune",
        "RetryWebhook",
    }


# -- the wrapper ---------------------------------------------------------------------------------


class FakeRuns:
    """A RunService whose methods answer, fail or wait as a test says."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()
        self.left = asyncio.Event()

    async def get_run(self, _request: run_pb.GetRunRequest) -> run_pb.GetRunResponse:
        self.entered.set()
        if self.error is not None:
            raise self.error
        return run_pb.GetRunResponse()

    async def list_runs(self, _request: run_pb.ListRunsRequest) -> run_pb.ListRunsResponse:
        self.entered.set()
        try:
            await self.leave.wait()
        finally:
            self.left.set()
        return run_pb.ListRunsResponse()

    async def stream_output(
        self, _request: run_pb.StreamOutputRequest
    ) -> AsyncGenerator[run_pb.StreamOutputResponse, None]:
        yield run_pb.StreamOutputResponse(data=b"first")
        if self.error is not None:
            raise self.error

    async def cancel_run(self, _request: run_pb.CancelRunRequest) -> run_pb.CancelRunResponse:
        return run_pb.CancelRunResponse()

    create_run = submit_reply = list_interactions = reopen_run = cancel_run
    watch_run = stream_output


class FakeRecovery:
    async def get_recovery_status(
        self, _request: recovery_pb.GetRecoveryStatusRequest
    ) -> recovery_pb.GetRecoveryStatusResponse:
        return recovery_pb.GetRecoveryStatusResponse()

    get_recovery_info = list_recovered = list_reconciliations = get_reconciliation = (
        get_recovery_status
    )
    watch_recovered = explain_recovery = plan_recovery = prune = get_recovery_status
    list_webhooks = retry_webhook = get_instances = get_recovery_status


@asynccontextmanager
async def serving(
    gate: Gate, runs: FakeRuns, *, max_calls: int = 100
) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    wrapper = MethodWrapper(gate, max_calls=max_calls, max_streams=10, stall_s=60)
    server.add_generic_rpc_handlers(
        (
            grpc_handlers(contract_methods(RUN_SERVICE, runs, wrapper)),
            grpc_handlers(contract_methods(RECOVERY_SERVICE, FakeRecovery(), wrapper)),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=(("grpc.enable_retries", 0),)
    ) as channel:
        yield channel
    await server.stop(None)


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    found = {}
    for detail in status_pb2.Status.FromString(packed).details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        detail.Unpack(found[name])
    return found


async def test_closed_gate_refuses_with_a_retry_hint_and_status_still_answers() -> None:
    async with serving(Gate(), FakeRuns()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await RunServiceStub(channel).GetRun(run_pb.GetRunRequest())
        await RecoveryServiceStub(channel).GetRecoveryStatus(recovery_pb.GetRecoveryStatusRequest())

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value)["ErrorInfo"].reason == "RECONCILIATION_IN_PROGRESS"
    assert details_of(caught.value)["RetryInfo"].retry_delay.seconds == 1
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


async def test_draining_service_answers_reads_and_refuses_changes() -> None:
    async with serving(gate_that(Gate.open, Gate.drain), FakeRuns()) as channel:
        await RunServiceStub(channel).GetRun(run_pb.GetRunRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await RunServiceStub(channel).CancelRun(run_pb.CancelRunRequest())

    assert details_of(caught.value)["ErrorInfo"].reason == "SHUTTING_DOWN"


async def test_domain_error_becomes_its_status() -> None:
    runs = FakeRuns()
    runs.error = RunNotFound("r1")
    async with serving(gate_that(Gate.open), runs) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await RunServiceStub(channel).GetRun(run_pb.GetRunRequest(run_id="r1"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details_of(caught.value)["ResourceInfo"].resource_name == "r1"


async def test_a_defect_is_logged_with_its_id_and_only_the_id_is_sent() -> None:
    runs = FakeRuns()
    runs.error = ValueError("SELECT secret FROM /etc/passwd")
    with structlog.testing.capture_logs() as logs:
        async with serving(gate_that(Gate.open), runs) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await RunServiceStub(channel).GetRun(run_pb.GetRunRequest())

    error_id = details_of(caught.value)["ErrorInfo"].metadata["error_id"]
    (line,) = logs
    assert (line["event"], line["error_id"]) == ("rpc.internal_error", error_id)
    assert line["method"] == "runrecovery.v1.RunService.GetRun"
    assert line["exc_info"] is runs.error
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(caught.value)
    assert "secret" not in repr(caught.value.trailing_metadata())


async def test_a_failed_stream_delivers_its_messages_and_then_its_error() -> None:
    runs = FakeRuns()
    runs.error = ShuttingDown()
    async with serving(gate_that(Gate.open), runs) as channel:
        stream = RunServiceStub(channel).StreamOutput(run_pb.StreamOutputRequest())
        first = await anext(aiter(stream))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stream))

    assert first.data == b"first"
    assert details_of(caught.value)["ErrorInfo"].reason == "SHUTTING_DOWN"


async def test_stream_is_refused_while_the_gate_is_closed() -> None:
    async with serving(Gate(), FakeRuns()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(RunServiceStub(channel).StreamOutput(run_pb.StreamOutputRequest())))

    assert details_of(caught.value)["ErrorInfo"].reason == "RECONCILIATION_IN_PROGRESS"


async def test_a_malformed_request_is_an_invalid_argument() -> None:
    async with serving(gate_that(Gate.open), FakeRuns()) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/runrecovery.v1.RunService/GetRun"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a\xff")

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details_of(caught.value)["BadRequest"].field_violations
    assert violation.field == "GetRunRequest"
    assert violation.description == "not a valid message of this type"
    assert caught.value.details() == "GetRunRequest: not a valid message of this type"


async def test_call_over_the_limit_is_refused_and_status_still_answers() -> None:
    runs = FakeRuns()
    async with serving(gate_that(Gate.open), runs, max_calls=1) as channel:
        waiting = RunServiceStub(channel).ListRuns(run_pb.ListRunsRequest())
        await runs.entered.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await RunServiceStub(channel).GetRun(run_pb.GetRunRequest())
        await RecoveryServiceStub(channel).GetRecoveryStatus(recovery_pb.GetRecoveryStatusRequest())
        runs.leave.set()
        await waiting
        await RunServiceStub(channel).GetRun(run_pb.GetRunRequest())

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details_of(caught.value)["ErrorInfo"].reason == "OVERLOADED"


async def test_a_wait_that_is_cancelled_together_with_its_change_ends_as_cancelled() -> None:
    gate = Gate()
    waiting = asyncio.create_task(gate.wait(gate.change, timeout_s=60))
    for _ in range(3):  # until it waits
        await asyncio.sleep(0)

    gate.set_listens(listens=False)
    waiting.cancel()
    await asyncio.wait({waiting})

    assert waiting.cancelled()


async def test_a_cancelled_call_no_longer_counts_against_the_limit() -> None:
    runs = FakeRuns()
    async with serving(gate_that(Gate.open), runs, max_calls=1) as channel:
        waiting = RunServiceStub(channel).ListRuns(run_pb.ListRunsRequest())
        await runs.entered.wait()
        waiting.cancel()
        await asyncio.wait_for(runs.left.wait(), 10)
        await RunServiceStub(channel).GetRun(run_pb.GetRunRequest())
