"""Calls are counted by their method and the code that their caller gets."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from runrecovery_service.meters import Meters
from runrecovery_service.rpc.call_meter import CallMeter


class Context:
    """What grpc.aio gives to a handler: the code that was sent, as a number."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        self._code = code

    def code(self) -> int:
        return int(self._code.value[0])


async def end(meter: CallMeter, context: Any, error: BaseException | None) -> None:
    async def respond(_payload: bytes, _context: object) -> bytes:
        if error is not None:
            raise error
        return b""

    await meter.unary("M", respond)(b"", context)


async def test_each_end_of_a_call_has_its_code() -> None:
    meters = Meters()
    meter = CallMeter(meters)
    not_found = Context(grpc.StatusCode.NOT_FOUND)

    await end(meter, Context(), None)
    with pytest.raises(RuntimeError):
        await end(meter, not_found, RuntimeError("aborted"))
    with pytest.raises(asyncio.CancelledError):
        await end(meter, Context(), asyncio.CancelledError())

    assert meters.calls.values == {("M", "OK"): 1, ("M", "NOT_FOUND"): 1, ("M", "CANCELLED"): 1}
    assert sum(meters.call_seconds.series[("M",)][:-1]) == 3


async def test_a_stream_is_open_until_it_ends_and_a_refused_one_has_its_code() -> None:
    meters = Meters()
    meter, leave = CallMeter(meters), asyncio.Event()

    async def respond(_payload: bytes, _context: object) -> None:
        await leave.wait()

    handler: Any = meter.stream("S", respond)
    before = dict(meter.open_streams)
    context: Any = Context(grpc.StatusCode.RESOURCE_EXHAUSTED)
    task: asyncio.Task[None] = asyncio.create_task(handler(b"", context))
    await asyncio.sleep(0)
    during = dict(meter.open_streams)
    leave.set()
    await task

    assert (before, during, dict(meter.open_streams)) == ({"S": 0}, {"S": 1}, {"S": 0})
    assert meters.calls.values == {("S", "RESOURCE_EXHAUSTED"): 1}
    assert meters.call_seconds.series == {}


async def test_a_method_shows_zero_before_its_first_call() -> None:
    meters = Meters()

    async def respond(_payload: bytes, _context: object) -> bytes:
        return b""

    CallMeter(meters).unary("M", respond)

    assert meters.calls.values == {("M", "OK"): 0}
