"""Calls of the contract inside the process, as pages make them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.domain.errors import RunNotFound
from runrecovery_service.http.calls import CallFailed, CallOrigin, ContractCalls
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.method_handlers import RUN_SERVICE, contract_methods
from runrecovery_service.rpc.method_wrapper import MethodWrapper
from runrecovery_service.rpc.server_setup import Contract
from support.waiting import until_async

GET_RUN = "runrecovery.v1.RunService/GetRun"
WATCH_RUN = "runrecovery.v1.RunService/WatchRun"
ANYBODY = CallOrigin(authorization=None, peer="a test")


class Runs:
    """Answers GetRun and WatchRun; every other method is nobody's."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.open = 0
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return None

    async def get_run(self, request: pb.GetRunRequest) -> pb.GetRunResponse:
        if not request.run_id:
            await self.may_end.wait()
        if request.run_id == "nobody":
            raise RunNotFound("nobody")
        return pb.GetRunResponse(run=run_pb2.Run(run_id=request.run_id))

    async def watch_run(
        self, request: pb.WatchRunRequest
    ) -> AsyncGenerator[pb.WatchRunResponse, None]:
        self.open += 1
        try:
            for number in range(request.after_sequence):
                self.sent += 1
                yield pb.WatchRunResponse(sequence=number)
            if request.run_id == "nobody":
                raise RunNotFound("nobody")
            if request.run_id == "waits":
                await self.may_end.wait()
        finally:
            self.open -= 1


@pytest.fixture
def runs() -> Runs:
    return Runs()


def contract(runs: Runs, *, stall_s: float = 60.0) -> Contract:
    gate = Gate()
    gate.open()
    wrapper = MethodWrapper(gate, max_calls=2, max_streams=2, stall_s=stall_s)
    methods = contract_methods(RUN_SERVICE, runs, wrapper)
    return Contract(methods={method.path: method for method in methods}, calls=wrapper.calls)


def watched(calls: ContractCalls, run_id: str, count: int) -> AsyncGenerator[Any, None]:
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=count)
    return calls.stream(WATCH_RUN, request, ANYBODY)


async def test_a_response_is_returned_as_its_message(runs: Runs) -> None:
    found = await ContractCalls(contract(runs)).unary(
        GET_RUN, pb.GetRunRequest(run_id="r"), ANYBODY
    )

    assert found == pb.GetRunResponse(run=run_pb2.Run(run_id="r"))


async def test_a_failure_has_code_message_and_details(runs: Runs) -> None:
    calls = ContractCalls(contract(runs))

    with pytest.raises(CallFailed) as caught:
        await calls.unary(GET_RUN, pb.GetRunRequest(run_id="nobody"), ANYBODY)

    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.message == "no run has the id 'nobody'; retention may have removed it"
    info, resource = caught.value.details
    assert (info.reason, resource.resource_name) == ("RUN_NOT_FOUND", "nobody")


async def test_calls_count_against_the_limits_of_grpc_until_they_end(runs: Runs) -> None:
    shared = contract(runs)
    calls = ContractCalls(shared)
    slow = [
        asyncio.create_task(calls.unary(GET_RUN, pb.GetRunRequest(), ANYBODY)) for _ in range(2)
    ]
    await asyncio.sleep(0)

    with pytest.raises(CallFailed, match="RESOURCE_EXHAUSTED"):
        await calls.unary(GET_RUN, pb.GetRunRequest(run_id="r"), ANYBODY)
    slow[0].cancel()
    await asyncio.wait({slow[0]})
    await calls.unary(GET_RUN, pb.GetRunRequest(run_id="r"), ANYBODY)
    runs.may_end.set()
    await slow[1]
    await shared.calls.wait_until_none()


async def test_a_stream_yields_every_response_and_ends(runs: Runs) -> None:
    async with aclosing(watched(ContractCalls(contract(runs)), "r", 5)) as responses:
        assert [response.sequence async for response in responses] == [0, 1, 2, 3, 4]
    assert runs.open == 0


async def test_a_stream_raises_its_failure_behind_its_last_response(runs: Runs) -> None:
    responses = watched(ContractCalls(contract(runs)), "nobody", 3)

    assert [(await anext(responses)).sequence for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CallFailed, match="NOT_FOUND"):
        await anext(responses)


@pytest.mark.parametrize(("run_id", "count"), [("waits", 1), ("r", 100)])
async def test_a_stream_that_is_closed_ends_its_handler(
    runs: Runs, run_id: str, count: int
) -> None:
    shared = contract(runs)
    responses = watched(ContractCalls(shared), run_id, count)
    await anext(responses)

    await responses.aclose()

    assert runs.open == 0
    await shared.calls.wait_until_none()


async def test_a_stream_is_read_ahead_by_little(runs: Runs) -> None:
    async with aclosing(watched(ContractCalls(contract(runs)), "r", 1000)) as responses:
        await anext(responses)
        for _ in range(10):
            await asyncio.sleep(0)

        assert runs.sent < 5


async def test_a_stream_whose_reader_takes_nothing_is_ended(runs: Runs) -> None:
    responses = watched(ContractCalls(contract(runs, stall_s=0.05)), "r", 1000)
    await anext(responses)

    async def is_closed() -> bool:
        return runs.open == 0

    await until_async(is_closed, "the handler has ended")

    await anext(responses)  # was sent already
    with pytest.raises(CallFailed, match="RESOURCE_EXHAUSTED"):
        await anext(responses)
