"""Waiting for the service and for runs."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import grpc
import pytest
import runrecovery as rr
from hypothesis import given
from hypothesis import strategies as st
from runrecovery._waiting import Pacer
from runrecovery.v1 import run_pb2, run_service_pb2
from support.scripted_server import Fail, ScriptedServer

if TYPE_CHECKING:
    from client.conftest import Caller, Connect


def _run(status: run_pb2.RunStatus.ValueType) -> run_service_pb2.GetRunResponse:
    return run_service_pb2.GetRunResponse(run=run_pb2.Run(run_id="r", status=status))


QUEUED = _run(run_pb2.RUN_STATUS_QUEUED)
RUNNING = _run(run_pb2.RUN_STATUS_RUNNING)
WAITING = _run(run_pb2.RUN_STATUS_WAITING_USER)


async def test_is_ready_once_the_service_says_serving(
    caller: Caller, server: ScriptedServer
) -> None:
    server.set_health("", serving=False)
    ready = asyncio.create_task(caller.call("wait_until_ready", 20))
    assert await caller.call("health.check") is rr.ServingStatus.NOT_SERVING
    assert not ready.done()

    server.set_health("", serving=True)

    await ready


async def test_waits_for_a_server_that_starts_later(
    connect: Connect, server: ScriptedServer, reserved: str
) -> None:
    caller = connect(reserved)
    ready = asyncio.create_task(caller.call("wait_until_ready", 20))
    with pytest.raises(rr.Unavailable):
        await caller.call("health.check")

    server.start(reserved)

    await ready


async def test_a_timeout_of_wait_ready_has_the_last_status(
    caller: Caller, server: ScriptedServer
) -> None:
    server.set_health("", serving=False)

    with pytest.raises(rr.DeadlineExceeded, match="NOT_SERVING") as raised:
        await caller.call("wait_until_ready", 0.3)

    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_timeout_without_a_server_has_the_last_failure(
    connect: Connect, reserved: str
) -> None:
    with pytest.raises(rr.DeadlineExceeded) as raised:
        await connect(reserved).call("wait_until_ready", 0.3)

    assert isinstance(raised.value.__cause__, rr.Unavailable | rr.DeadlineExceeded)


async def test_does_not_wait_for_a_name_that_does_not_exist(caller: Caller) -> None:
    with pytest.raises(rr.NotFound):
        await caller.call("wait_until_ready", 20, service="nothing")


@pytest.mark.parametrize(
    "status",
    [run_pb2.RUN_STATUS_SUCCEEDED, run_pb2.RUN_STATUS_FAILED, run_pb2.RUN_STATUS_CANCELED],
    ids=run_pb2.RunStatus.Name,
)
async def test_returns_a_run_once_it_has_ended(
    status: run_pb2.RunStatus.ValueType, caller: Caller, server: ScriptedServer
) -> None:
    server.on("GetRun", QUEUED, WAITING, RUNNING, _run(status))

    run = await caller.call("wait_for_run", "r", timeout_s=20)

    assert run.status == status
    assert len(server.asked("GetRun")) == 4


async def test_returns_a_waiting_run_when_asked_to(caller: Caller, server: ScriptedServer) -> None:
    server.on("GetRun", RUNNING, WAITING)

    run = await caller.call("wait_for_run", "r", timeout_s=20, or_waiting=True)

    assert run.status == run_pb2.RUN_STATUS_WAITING_USER


async def test_waits_through_a_restart_of_the_service(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    recovering = Fail(
        code=grpc.StatusCode.UNAVAILABLE, reason="RECONCILIATION_IN_PROGRESS", pushback_ms="-1"
    )
    ended = _run(run_pb2.RUN_STATUS_FAILED)
    server.on("GetRun", RUNNING, recovering, recovering, ended)

    run = await caller.call("wait_for_run", "r", timeout_s=None)

    assert run == ended.run


async def test_waits_through_a_call_that_took_too_long(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on(
        "GetRun", Fail(code=grpc.StatusCode.DEADLINE_EXCEEDED), _run(run_pb2.RUN_STATUS_SUCCEEDED)
    )

    ended = await caller.call("wait_for_run", "r", timeout_s=20)

    assert ended.status == run_pb2.RUN_STATUS_SUCCEEDED


async def test_a_timeout_of_a_wait_for_a_run_has_the_last_status(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("GetRun", RUNNING)

    with pytest.raises(rr.DeadlineExceeded, match="RUN_STATUS_RUNNING"):
        await caller.call("wait_for_run", "r", timeout_s=0.3)


async def test_does_not_wait_for_a_run_that_does_not_exist(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("GetRun", Fail(code=grpc.StatusCode.NOT_FOUND, reason="RUN_NOT_FOUND"))

    with pytest.raises(rr.RunNotFound):
        await caller.call("wait_for_run", "r", timeout_s=20)


async def test_does_not_wait_for_a_quarantined_run(caller: Caller, server: ScriptedServer) -> None:
    recovery = run_pb2.RecoveryInfo(recovery_state=run_pb2.RECOVERY_STATE_QUARANTINED)
    run = run_pb2.Run(run_id="r", status=run_pb2.RUN_STATUS_RUNNING, recovery=recovery)
    server.on("GetRun", run_service_pb2.GetRunResponse(run=run))

    with pytest.raises(rr.RunQuarantined):
        await caller.call("wait_for_run", "r", timeout_s=20)


@given(
    first_s=st.floats(0.01, 10),
    longest_s=st.floats(10, 100),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=80),
)
def test_pauses_lie_under_a_ceiling_that_doubles_up_to_the_longest(
    first_s: float, longest_s: float, shares: list[float]
) -> None:
    draws = iter(shares)
    pacer = Pacer(
        first_s=first_s,
        longest_s=longest_s,
        within_s=None,
        uniform=lambda low, high: low + next(draws) * (high - low),
    )

    pauses = [pacer.pause_s() for _ in shares]

    ceilings = [min(longest_s, first_s * 2**number) for number in range(len(shares))]
    assert pauses == pytest.approx(
        [share * ceiling for share, ceiling in zip(shares, ceilings, strict=True)]
    )


def test_the_last_pause_ends_at_the_limit_and_no_other_follows() -> None:
    clock = itertools.chain([100.0, 107.0], itertools.repeat(110.0))
    pacer = Pacer(first_s=60, longest_s=60, within_s=10, clock=lambda: next(clock), uniform=max)

    assert [pacer.pause_s(), pacer.pause_s()] == [3.0, None]
