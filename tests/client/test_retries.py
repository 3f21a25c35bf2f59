"""When the clients retry a call, and how."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import runrecovery as rr
from runrecovery.v1 import recovery_service_pb2, run_pb2, run_service_pb2
from support.scripted_server import Fail, ScriptedServer

if TYPE_CHECKING:
    from client.conftest import Caller, Connect

RUN = run_pb2.Run(run_id="r", status=run_pb2.RUN_STATUS_QUEUED)
MUTATIONS = [
    ("CreateRun", "runs.create", (), {"engine": "demo"}, run_service_pb2.CreateRunResponse),
    ("SubmitReply", "runs.reply", ("r", 1, "yes"), {}, run_service_pb2.SubmitReplyResponse),
    ("CancelRun", "runs.cancel", ("r",), {}, run_service_pb2.CancelRunResponse),
    ("ReopenRun", "runs.reopen", ("r",), {}, run_service_pb2.ReopenRunResponse),
]


@pytest.mark.parametrize(
    ("method", "name", "args", "kwargs", "response"), MUTATIONS, ids=[row[0] for row in MUTATIONS]
)
async def test_sends_the_same_request_id_again_after_unavailable(
    method: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    response: type[Any],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    busy = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_BUSY", pushback_ms="1")
    server.on(method, busy, busy, response(run=RUN))

    run = await caller.call(name, *args, **kwargs)

    sent = [request.request_id for request in server.asked(method)]
    assert run == RUN
    assert len(sent) == 3
    assert sent == [str(uuid.UUID(sent[0]))] * 3


@pytest.mark.parametrize(
    ("method", "name", "args", "kwargs", "response"), MUTATIONS, ids=[row[0] for row in MUTATIONS]
)
async def test_sends_the_same_request_id_again_after_a_cancel_by_the_server(
    method: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    response: type[Any],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    stopping = Fail(code=grpc.StatusCode.CANCELLED, pushback_ms="1")
    server.on(method, stopping, stopping, response(run=RUN))

    run = await caller.call(name, *args, **kwargs)

    sent = [request.request_id for request in server.asked(method)]
    assert run == RUN
    assert len(sent) == 3
    assert sent == [str(uuid.UUID(sent[0]))] * 3


@pytest.mark.parametrize(
    ("method", "name", "args", "kwargs", "response"), MUTATIONS, ids=[row[0] for row in MUTATIONS]
)
async def test_two_calls_have_two_request_ids_and_a_given_one_is_kept(
    method: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    response: type[Any],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on(method, response(run=RUN))
    own = "0b0f6c5e-54c1-4bd3-9a3c-0a5f8e6f3a11"

    await caller.call(name, *args, **kwargs)
    await caller.call(name, *args, **kwargs)
    await caller.call(name, *args, **kwargs, request_id=own)

    first, second, third = (request.request_id for request in server.asked(method))
    assert first != second
    assert third == own


async def test_gives_up_after_five_attempts(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on(
        "GetRun",
        Fail(code=grpc.StatusCode.UNAVAILABLE, reason="SHUTTING_DOWN", pushback_ms="1"),
    )

    with pytest.raises(rr.ShuttingDown):
        await caller.call("runs.get", "r")

    assert len(server.asked("GetRun")) == 5


async def test_a_negative_pushback_forbids_a_retry(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("GetRun", Fail(code=grpc.StatusCode.UNAVAILABLE, pushback_ms="-1"))

    with pytest.raises(rr.Unavailable):
        await caller.call("runs.get", "r")

    assert len(server.asked("GetRun")) == 1


async def test_retries_calls_of_the_recovery_service_too(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    busy = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_BUSY", pushback_ms="1")
    server.on("GetRecoveryStatus", busy, recovery_service_pb2.GetRecoveryStatusResponse())

    await caller.call("recovery.status")

    assert len(server.asked("GetRecoveryStatus")) == 2


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNKNOWN,
    ],
    ids=str,
)
async def test_does_not_retry_another_code(
    code: grpc.StatusCode,
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("CreateRun", Fail(code=code, pushback_ms="1"))

    with pytest.raises(rr.RunRecoveryClientError):
        await caller.call("runs.create", engine="demo")

    assert len(server.asked("CreateRun")) == 1


async def test_retries_the_largest_request_that_the_service_accepts(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    busy = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_BUSY", pushback_ms="1")
    server.on("CreateRun", busy, run_service_pb2.CreateRunResponse(run=RUN))

    await caller.call("runs.create", engine="demo", input={"text": "x" * 1_000_000})

    assert len(server.asked("CreateRun")) == 2


async def test_a_call_before_the_server_starts_succeeds_once_it_has_started(
    connect: Connect, server: ScriptedServer, reserved: str
) -> None:
    server.on("CreateRun", run_service_pb2.CreateRunResponse(run=RUN))
    # Retries alone would also bridge a short absence, but not a longer one.
    caller = connect(reserved, options=[("grpc.enable_retries", 0)])
    with pytest.raises(rr.Unavailable):
        await caller.call("health.check")  # so the first connection has been refused

    waiting = asyncio.create_task(caller.call("runs.create", engine="demo"))
    with pytest.raises(rr.Unavailable):
        await caller.call("health.check")
    server.start(reserved)

    assert await waiting == RUN


async def test_a_call_without_a_server_fails_within_its_deadline(
    connect: Connect, reserved: str
) -> None:
    caller = connect(reserved, timeout_s=0.3)

    with pytest.raises(rr.DeadlineExceeded):
        await caller.call("runs.get", "r")


async def test_a_server_that_came_back_is_found_again(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("GetRun", run_service_pb2.GetRunResponse(run=RUN))
    target = caller.target
    await caller.call("runs.get", "r")

    server.stop()
    server.start(target)

    assert await caller.call("runs.get", "r") == RUN


async def test_a_call_ends_at_its_deadline(caller: Caller, server: ScriptedServer) -> None:
    def never(request: object, context: grpc.ServicerContext) -> run_service_pb2.GetRunResponse:
        server.release.wait(30)
        return run_service_pb2.GetRunResponse(run=RUN)

    server.on("GetRun", never)

    with pytest.raises(rr.DeadlineExceeded) as raised:
        await caller.call("runs.get", "r", timeout_s=0.2)

    assert isinstance(raised.value.__cause__, grpc.RpcError)


async def test_the_default_deadline_of_a_client_is_sent(
    connect: Connect, server: ScriptedServer
) -> None:
    left: list[float | None] = []

    def note(request: object, context: grpc.ServicerContext) -> run_service_pb2.GetRunResponse:
        left.append(context.time_remaining())
        return run_service_pb2.GetRunResponse(run=RUN)

    server.on("GetRun", note)
    target = server.start()

    await connect(target).call("runs.get", "r")
    await connect(target, timeout_s=77.0).call("runs.get", "r")
    await connect(target).call("runs.get", "r", timeout_s=33.0)

    assert [round(seconds or 0, -1) for seconds in left] == [10, 80, 30]
