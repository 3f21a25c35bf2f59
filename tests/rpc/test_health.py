from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.method_handlers import health_handlers
from runrecovery_service.rpc.open_calls import OpenCalls

RUNS = "runrecovery.v1.RunService"
RECOVERY = "runrecovery.v1.RecoveryService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def health(gate: Gate) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((health_handlers(HealthServicer(gate), OpenCalls()),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


def asking(name: str) -> Any:
    return health_pb2.HealthCheckRequest(service=name)


async def statuses(health: Any) -> dict[str, int]:
    listed = (await health.List(health_pb2.HealthListRequest())).statuses
    checked = {name: (await health.Check(asking(name))).status for name in listed}
    assert {name: listed[name].status for name in listed} == checked
    return checked


async def test_only_liveness_and_recovery_serve_before_the_gate_opens(health: Any) -> None:
    assert await statuses(health) == {
        "": NOT_SERVING,
        RUNS: NOT_SERVING,
        RECOVERY: SERVING,
        "liveness": SERVING,
    }


async def test_every_name_serves_once_the_gate_is_open(gate: Gate, health: Any) -> None:
    gate.open()

    assert set((await statuses(health)).values()) == {SERVING}


@pytest.mark.parametrize("closing", ["drain", "storage", "address"])
async def test_only_liveness_serves_while_draining_or_without_storage_or_address(
    closing: str, gate: Gate, health: Any
) -> None:
    gate.open()
    if closing == "drain":
        gate.drain()
    elif closing == "storage":
        gate.set_storage_answers(answers=False)
    else:
        gate.set_listens(listens=False)

    assert await statuses(health) == {
        "": NOT_SERVING,
        RUNS: NOT_SERVING,
        RECOVERY: NOT_SERVING,
        "liveness": SERVING,
    }


async def test_failed_recovery_keeps_its_reads_serving(gate: Gate, health: Any) -> None:
    gate.set_recovery_failed()

    found = await statuses(health)
    assert (found[""], found[RECOVERY]) == (NOT_SERVING, SERVING)


async def test_unknown_name_is_not_found(health: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(asking("nobody"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_sends_every_change_and_ends_when_the_service_drains(
    gate: Gate, health: Any
) -> None:
    told = []
    steps = [gate.open, gate.set_recovering, gate.open, gate.drain]
    async for response in health.Watch(asking("")):
        told.append(response.status)
        if steps:
            steps.pop(0)()

    assert told == [NOT_SERVING, SERVING, NOT_SERVING, SERVING, NOT_SERVING]


async def test_watch_does_not_repeat_a_status(gate: Gate, health: Any) -> None:
    watch = health.Watch(asking(""))
    first = await anext(aiter(watch))
    gate.set_recovery_failed()
    gate.set_recovering()
    gate.open()

    assert [first.status, (await anext(aiter(watch))).status] == [NOT_SERVING, SERVING]
    gate.drain()
    assert [response.status async for response in watch] == [NOT_SERVING]


async def test_watch_of_an_unknown_name_stays_open_until_the_drain(gate: Gate, health: Any) -> None:
    watch = health.Watch(asking("nobody"))
    first = await anext(aiter(watch))
    gate.open()
    rest = asyncio.ensure_future(anext(aiter(watch), None))
    # A round trip on the same connection: the watch had its chance to end.
    await health.Check(asking(""))

    assert (first.status, rest.done()) == (UNKNOWN, False)
    gate.drain()
    assert await asyncio.wait_for(rest, 10) is None
