"""Streams are counted with the code that their caller got, even if gRPC does not report it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import cast

import grpc
import pytest
from runrecovery_service.metric_counters import Meters
from runrecovery_service.rpc.call_meter import CallMeter, Context


class Sent:
    """The context of a call to which gRPC has sent a code, or None."""

    def __init__(self, code: grpc.StatusCode | int | None) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode | int | None:
        return self._code


@pytest.mark.parametrize(
    ("sent", "error", "counted"),
    [
        (None, None, "OK"),
        (0, None, "OK"),
        (None, asyncio.CancelledError, "CANCELLED"),
        (0, asyncio.CancelledError, "CANCELLED"),
        (grpc.StatusCode.NOT_FOUND, grpc.aio.AbortError, "NOT_FOUND"),
        (14, grpc.aio.AbortError, "UNAVAILABLE"),
    ],
)
async def test_a_stream_is_counted_with_its_code(
    sent: grpc.StatusCode | int | None, error: type[BaseException] | None, counted: str
) -> None:
    async def respond(_: bytes, __: Context) -> None:
        if error is not None:
            raise error

    meters = Meters()
    meter = CallMeter(meters)
    call = meter.stream("s.Watch", respond)
    with suppress(asyncio.CancelledError, grpc.aio.AbortError):
        await call(b"", cast("Context", Sent(sent)))

    assert meters.calls.values == {("s.Watch", counted): 1}
    assert meter.open_streams == {"s.Watch": 0}


@pytest.mark.parametrize(
    ("sent", "is_timed"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, False),
        (grpc.StatusCode.PERMISSION_DENIED, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False),
        (grpc.StatusCode.NOT_FOUND, True),
    ],
)
async def test_refusals_that_may_wait_on_purpose_are_counted_and_not_timed(
    sent: grpc.StatusCode, *, is_timed: bool
) -> None:
    async def respond(_: bytes, __: Context) -> bytes:
        raise grpc.aio.AbortError

    meters = Meters()
    call = CallMeter(meters).unary("s.Get", respond)
    with suppress(grpc.aio.AbortError):
        await call(b"", cast("Context", Sent(sent)))

    assert meters.calls.values == {("s.Get", "OK"): 0, ("s.Get", sent.name): 1}
    assert (("s.Get",) in meters.call_seconds.series) is is_timed
