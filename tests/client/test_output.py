"""Reading output, through broken streams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import runrecovery as rr
from runrecovery._streams import OutputReader, Reconnection
from runrecovery.v1 import run_service_pb2
from support.scripted_server import Fail, ScriptedServer, Stream

if TYPE_CHECKING:
    from client.conftest import Caller, Connect


def _piece(
    offset: int, data: bytes, *, attempt: int = 2, truncated: bool = False
) -> run_service_pb2.StreamOutputResponse:
    return run_service_pb2.StreamOutputResponse(
        attempt=attempt, offset=offset, data=data, truncated=truncated
    )


def _reader(*, timeout_s: float | None = None, **seams: Any) -> OutputReader:
    return OutputReader(
        run_service_pb2.StreamOutputRequest(run_id="r"),
        Reconnection(reconnect_s=60, timeout_s=timeout_s, **seams),
        reconnect_s=60,
    )


async def test_resumes_by_offset_in_the_same_attempt_after_unavailable(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    gone = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="SHUTTING_DOWN")
    server.on(
        "StreamOutput",
        Stream([_piece(0, b"one "), _piece(4, b"two ")], then=gone),
        gone,
        Stream([_piece(8, b"three", truncated=True)]),
    )

    pieces = await caller.collect(
        "runs.output", "r", follow=True, channel=rr.OutputChannel.OUTPUT_CHANNEL_STDERR
    )

    assert b"".join(piece.data for piece in pieces) == b"one two three"
    assert pieces[-1].truncated
    asked = server.asked("StreamOutput")
    assert [(request.attempt, request.offset) for request in asked] == [(0, 0), (2, 8), (2, 8)]
    assert {(request.run_id, request.follow, request.channel) for request in asked} == {
        ("r", True, run_service_pb2.OUTPUT_CHANNEL_STDERR)
    }


@pytest.mark.parametrize("reason", ["SLOW_READER", "OVERLOADED"])
async def test_resumes_after_a_cut_and_a_full_server(
    reason: str,
    caller: Caller,
    server: ScriptedServer,
) -> None:
    cut = Fail(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason=reason)
    server.on("StreamOutput", Stream([_piece(0, b"one ")], then=cut), Stream([_piece(4, b"two")]))

    pieces = await caller.collect("runs.output", "r")

    assert b"".join(piece.data for piece in pieces) == b"one two"


async def test_starts_at_the_callers_offset(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("StreamOutput", Stream([_piece(5, b"tail", attempt=1)]))

    pieces = await caller.collect("runs.output", "r", attempt=1, offset=5)

    (request,) = server.asked("StreamOutput")
    assert [piece.data for piece in pieces] == [b"tail"]
    assert (request.attempt, request.offset, request.follow) == (1, 5, False)


async def test_does_not_resume_after_another_error(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    defect = Fail(code=grpc.StatusCode.INTERNAL, reason="INTERNAL")
    server.on("StreamOutput", Stream([_piece(0, b"x")], then=defect))

    with pytest.raises(rr.InternalError):
        await caller.collect("runs.output", "r")

    assert len(server.asked("StreamOutput")) == 1


async def test_raises_the_failure_of_an_outage_longer_than_reconnect_s(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("StreamOutput", Fail(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_UNAVAILABLE"))

    with pytest.raises(rr.Unavailable) as raised:
        await caller.collect("runs.output", "r", reconnect_s=0.3)

    assert raised.value.reason == "STORAGE_UNAVAILABLE"
    assert len(server.asked("StreamOutput")) > 1


async def test_waits_for_a_server_that_is_not_there_yet(
    connect: Connect, server: ScriptedServer, reserved: str
) -> None:
    server.on("StreamOutput", Stream([_piece(0, b"x")]))
    caller = connect(reserved)
    reading = asyncio.create_task(caller.collect("runs.output", "r"))
    with pytest.raises(rr.Unavailable):
        await caller.call("health.check")

    server.start(reserved)

    assert [piece.data for piece in await reading] == [b"x"]


async def test_ends_at_the_callers_deadline(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("StreamOutput", Stream([_piece(0, b"x")], hold=True))

    with pytest.raises(rr.DeadlineExceeded):
        await caller.collect("runs.output", "r", follow=True, timeout_s=0.3)


async def test_leaving_the_loop_ends_the_stream_on_the_server(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("StreamOutput", Stream([_piece(0, b"x")], hold=True))

    await caller.collect("runs.output", "r", follow=True, limit=1)

    assert await asyncio.to_thread(server.left.wait, 10)


def test_a_long_quiet_stream_gets_the_whole_time_to_reconnect_again() -> None:
    now = 0.0
    reader = _reader(clock=lambda: now)
    reader.open()
    reader.pause_s(rr.Unavailable("a first restart"))
    reader.open()

    now = 3600.0

    assert reader.pause_s(rr.Unavailable("a second restart")) <= 0.2


def test_the_time_to_reconnect_ends() -> None:
    now = 0.0
    reader = _reader(clock=lambda: now)
    reader.open()
    reader.pause_s(rr.Unavailable("gone"))
    now = 59.0
    reader.open()

    now = 61.0

    with pytest.raises(rr.Unavailable):
        reader.pause_s(rr.Unavailable("still gone"))


def test_progress_renews_the_time_to_reconnect() -> None:
    now = 0.0
    reader = _reader(clock=lambda: now)
    for now in (0.0, 50.0, 100.0, 150.0):  # noqa: B007 - the clock reads it
        reader.open()
        reader.accept(_piece(0, b"x"))
        assert reader.pause_s(rr.Unavailable("gone")) <= 0.2


def test_waits_as_long_as_the_service_asks_for() -> None:
    reader = _reader(uniform=min)
    hint = rr.ErrorDetails(code=grpc.StatusCode.UNAVAILABLE, retry_after_s=3.0)

    assert reader.pause_s(rr.Unavailable("gone", details=hint)) == 3.0


def test_does_not_pause_beyond_the_callers_deadline() -> None:
    reader = _reader(timeout_s=1)
    hint = rr.ErrorDetails(code=grpc.StatusCode.UNAVAILABLE, retry_after_s=3.0)

    with pytest.raises(rr.Unavailable):
        reader.pause_s(rr.Unavailable("gone", details=hint))
