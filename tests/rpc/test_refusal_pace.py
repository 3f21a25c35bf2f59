"""Refusals that wait: how long, how many, and what a stop, a cancel and a deadline do to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.message import Message
from runrecovery.v1 import run_service_pb2
from runrecovery_service.domain.errors import (
    EngineNotAllowed,
    Overloaded,
    RunNotFound,
)
from runrecovery_service.domain.role import Role
from runrecovery_service.rpc.callers import CallerGuard, CallerTable
from runrecovery_service.rpc.gate import Access, Gate
from runrecovery_service.rpc.method_wrapper import Method, MethodWrapper
from runrecovery_service.rpc.refusal_pace import Rate, RefusalPace
from runrecovery_service.rpc.server import GrpcServer
from support.callers import credentials, token_of
from support.waiting import until_async

FOR_EVER_S = 3600.0
GET = "/runrecovery.v1.RunService/GetRun"


def slow_pace(*, max_waiting: int = 100) -> RefusalPace:
    """Return a pace that lets one refusal through, and the next one after an hour."""
    return RefusalPace(max_waiting=max_waiting, per_s=1e-9, max_wait_s=FOR_EVER_S)


async def settled(*waits: Awaitable[None]) -> list[asyncio.Task[None]]:
    """Start waits in this order, and return their tasks once each has ended or waits."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def done(tasks: list[asyncio.Task[None]]) -> list[bool]:
    return [task.done() for task in tasks]


# -- rates ---------------------------------------------------------------------------------------


def test_events_at_one_time_are_spaced_evenly_and_the_first_is_not_delayed() -> None:
    rate = Rate(4)

    assert [rate.take(10.0, within_s=9) for _ in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert rate.take(10.5, within_s=9) == 0.5
    assert rate.take(12.0, within_s=9) == 0.0


def test_a_burst_comes_at_once_and_is_earned_again_by_quiet_time() -> None:
    rate = Rate(2, burst=3)

    assert [rate.take(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, None]
    assert [rate.take(10.5) for _ in range(2)] == [0.0, None]
    assert [rate.take(99.0) for _ in range(4)] == [0.0, 0.0, 0.0, None]


def test_events_that_would_come_too_late_delay_no_later_one() -> None:
    rate = Rate(1)
    rate.take(10.0)

    assert [rate.take(10.0) for _ in range(1000)] == [None] * 1000
    assert rate.take(11.0) == 0.0


# -- waits ---------------------------------------------------------------------------------------


async def test_the_first_refusal_of_each_caller_is_answered_at_once_and_the_second_waits() -> None:
    pace = slow_pace()

    tasks = await settled(pace.wait("a"), pace.wait("a"), pace.wait("b"), pace.wait("b"))

    assert done(tasks) == [True, False, True, False]
    pace.end()
    await asyncio.wait_for(asyncio.gather(*tasks), 20)


async def test_refusals_that_wait_are_bounded_for_each_caller_and_in_all() -> None:
    pace = slow_pace(max_waiting=2)

    of_a = await settled(*(pace.wait("a") for _ in range(5)))
    of_b = await settled(*(pace.wait("b") for _ in range(5)))
    of_c = await settled(*(pace.wait("c") for _ in range(5)))

    assert done(of_a) == [True, False, False, True, True]
    assert done(of_b) == [True, False, False, True, True]
    assert done(of_c) == [True] * 5  # two of each of two callers wait, so there is no room
    assert pace.waiting == 4
    pace.end()
    await asyncio.wait_for(asyncio.gather(*of_a, *of_b), 20)


async def test_a_refusal_whose_call_is_cancelled_makes_room_for_another() -> None:
    pace = slow_pace(max_waiting=1)
    _, waiting, beyond = await settled(pace.wait("a"), pace.wait("a"), pace.wait("a"))
    assert (waiting.done(), beyond.done()) == (False, True)

    waiting.cancel()
    (_,) = await asyncio.gather(waiting, return_exceptions=True)
    (next_one,) = await settled(pace.wait("a"))

    assert not next_one.done()
    pace.end()
    await asyncio.wait_for(next_one, 20)


async def test_a_stop_answers_the_refusals_that_wait_and_later_ones_at_once() -> None:
    pace = slow_pace()
    tasks = await settled(*(pace.wait("") for _ in range(50)))
    assert done(tasks) == [True] + [False] * 49

    pace.end()
    later = await settled(*(pace.wait("") for _ in range(50)))

    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert done(later) == [True] * 50
    assert pace.waiting == 0


# -- calls ---------------------------------------------------------------------------------------


Respond = Callable[[Message], Awaitable[Message]]


@asynccontextmanager
async def serving(
    guard: CallerGuard, respond: Respond, *, max_calls: int = 100
) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    """Serve GetRun by a function."""
    gate = Gate()
    gate.open()
    wrapper = MethodWrapper(gate, max_calls=max_calls, max_streams=1, stall_s=60, guard=guard)
    described = run_service_pb2.DESCRIPTOR.services_by_name["RunService"].methods_by_name["GetRun"]
    method = Method(
        name=described.full_name,
        role=Role.VIEWER,
        access=Access.READ,
        request=message_factory.GetMessageClass(described.input_type),
    )
    handler: Any = grpc.unary_unary_rpc_method_handler(cast("Any", wrapper.unary(method, respond)))

    def build() -> grpc.aio.Server:
        built = grpc.aio.server()
        built.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(described.containing_service.full_name, {
                "GetRun": handler
            }),)
        )  # fmt: skip
        return built

    server = GrpcServer(build, wrapper.calls, guard=guard)
    port = await server.bind("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=(("grpc.enable_retries", 0),)
        ) as channel:
            yield server, channel
    finally:
        await server.stop(grace_s=0)


def call(channel: grpc.aio.Channel, caller: str, *, timeout_s: float | None = None) -> Any:
    """Begin a call of a caller."""
    invoke: Any = channel.unary_unary(GET)
    metadata = (("authorization", f"Bearer {token_of(caller)}"),)
    return invoke(b"", metadata=metadata, timeout=timeout_s)


async def not_found(_: Message) -> Message:
    raise RunNotFound("r")


async def test_a_stop_of_the_server_answers_waiting_refusals_with_their_status() -> None:
    pace = slow_pace()
    guard = CallerGuard(CallerTable([credentials("a")]), pace=pace)
    async with serving(guard, not_found) as (server, channel):
        calls = [call(channel, "wrong") for _ in range(10)]

        async def nine_wait() -> bool:
            return pace.waiting == 9

        await until_async(nine_wait, "nine refusals wait")
        async with asyncio.timeout(60):
            await server.stop(grace_s=FOR_EVER_S)
            codes = {await one.code() for one in calls}

    assert codes == {grpc.StatusCode.UNAUTHENTICATED}


async def test_a_deadline_ends_the_wait_of_a_refusal() -> None:
    pace = slow_pace()
    guard = CallerGuard(CallerTable([credentials("a")]), pace=pace)
    async with serving(guard, not_found) as (_, channel):
        assert await call(channel, "wrong").code() is grpc.StatusCode.UNAUTHENTICATED
        late = call(channel, "wrong", timeout_s=0.3)
        assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        async def none_waits() -> bool:
            return pace.waiting == 0

        await until_async(none_waits, "no refusal waits any more")


@pytest.mark.parametrize(
    ("error", "waiting"),
    [
        (EngineNotAllowed("a", "e"), 1),
        (Overloaded(), 1),
        (RunNotFound("r"), 0),
    ],
)
async def test_a_refusal_that_waits_takes_no_slot(error: Exception, waiting: int) -> None:
    pace = slow_pace()
    guard = CallerGuard(CallerTable([credentials("a", max_calls=1)]), pace=pace)
    failures = [error, error, RunNotFound("r")]

    async def respond(_: Message) -> Message:
        raise failures.pop(0)

    async with serving(guard, respond, max_calls=1) as (_, channel):
        await call(channel, "a").code()
        second = call(channel, "a")

        async def is_seen() -> bool:
            return len(failures) == 1 and (second.done() or pace.waiting == 1)

        await until_async(is_seen, "the second call was refused, or its refusal waits")
        assert await call(channel, "a").code() is grpc.StatusCode.NOT_FOUND
        assert pace.waiting == waiting


async def test_a_caller_beyond_its_rate_is_refused_until_time_or_a_reload_allows_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [1000.0]
    guard = CallerGuard(
        CallerTable([credentials("a", max_calls_per_s=2), credentials("b")]),
        pace=RefusalPace(max_waiting=0),
    )

    async with serving(guard, not_found) as (_, channel):
        # Only rates ask the guard's clock: the time of the loop goes on.
        monkeypatch.setattr(guard, "now_s", lambda: now_s[0])
        codes = [await call(channel, "a").code() for _ in range(4)]
        refused = call(channel, "a")
        message = await refused.details()
        others = [await call(channel, "b").code() for _ in range(4)]
        now_s[0] += 0.5
        codes += [await call(channel, "a").code() for _ in range(2)]
        guard.replace_table(CallerTable([credentials("a", max_calls_per_s=3)]))
        after_reload = [await call(channel, "a").code() for _ in range(4)]

    answered, full = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED
    assert codes == [answered, answered, full, full, answered, full]
    assert message == "caller 'a' has reached its limit of calls in a second; retry later"
    assert others == [answered] * 4
    assert after_reload == [answered, answered, answered, full]


async def test_refusals_of_one_caller_delay_those_of_no_other() -> None:
    pace = slow_pace()
    guard = CallerGuard(CallerTable([credentials("a"), credentials("b")]), pace=pace)

    async def deny(_: Message) -> Message:
        raise EngineNotAllowed("", "e")

    async def one_waits() -> bool:
        return pace.waiting == 1

    async with serving(guard, deny) as (_, channel):
        assert await call(channel, "a").code() is grpc.StatusCode.PERMISSION_DENIED
        waiting = call(channel, "a")
        await until_async(one_waits, "the second refusal waits")
        async with asyncio.timeout(60):
            codes = [await call(channel, name).code() for name in ("b", "wrong")]

        assert codes == [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED]
        assert not waiting.done()
