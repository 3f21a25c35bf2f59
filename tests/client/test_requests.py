"""What is sent: values, and every method of the contract."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import runrecovery as rr
from google.protobuf import json_format, message_factory
from hypothesis import given
from hypothesis import strategies as st
from runrecovery._values import to_struct, to_timestamp, to_value
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from client.conftest import Caller, ScriptedServer, Stream
    from google.protobuf.descriptor import MethodDescriptor

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=json_values)
def test_a_json_value_arrives_as_it_was(value: Any) -> None:
    assert json_format.MessageToDict(to_value(value)) == value


@pytest.mark.parametrize("number", [2**53 + 1, -(2**60), math.nan, math.inf])
def test_refuses_a_number_that_would_arrive_as_another(number: float) -> None:
    with pytest.raises(ValueError, match="JSON number"):
        to_struct({"deep": [{"n": number}]})


@pytest.mark.parametrize("value", [{1: "x"}, {"x": b"bytes"}, {"x": {1, 2}}, {"x": object()}])
def test_refuses_what_is_not_json(value: Any) -> None:
    with pytest.raises(TypeError, match=r"JSON"):
        to_struct(value)


def test_refuses_a_time_without_a_zone() -> None:
    with pytest.raises(ValueError, match="zone"):
        to_timestamp(datetime(2026, 11, 24))  # noqa: DTZ001 - the point of the test


async def test_sends_everything_that_create_was_given(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("CreateRun", run_service_pb2.CreateRunResponse(run=run_pb2.Run(run_id="mine")))

    run = await caller.call(
        "runs.create",
        engine="demo",
        input={"a": 1, "b": [None, {"c": True}]},
        run_id="mine",
        labels={"team": "x"},
        restart_policy=rr.RestartPolicy.RESTART_POLICY_REQUEUE,
        interactive_profile=(rr.InteractiveProfileKind.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS),
        request_id="0b0f6c5e-54c1-4bd3-9a3c-0a5f8e6f3a11",
    )

    (request,) = server.asked("CreateRun")
    assert run.run_id == "mine"
    assert json_format.MessageToDict(request, preserving_proto_field_name=True) == {
        "run_id": "mine",
        "engine": "demo",
        "labels": {"team": "x"},
        "input": {"a": 1, "b": [None, {"c": True}]},
        "restart_policy": "RESTART_POLICY_REQUEUE",
        "interactive_profile": {"kind": "INTERACTIVE_PROFILE_KIND_STICKY_PROCESS"},
        "request_id": "0b0f6c5e-54c1-4bd3-9a3c-0a5f8e6f3a11",
    }


async def test_leaves_out_what_create_was_not_given(caller: Caller, server: ScriptedServer) -> None:
    server.on("CreateRun", run_service_pb2.CreateRunResponse())

    await caller.call("runs.create", engine="demo")

    (request,) = server.asked("CreateRun")
    assert {field.name for field, _ in request.ListFields()} == {"engine", "request_id"}


async def test_sends_null_as_a_reply_and_not_as_an_absent_one(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("SubmitReply", run_service_pb2.SubmitReplyResponse())

    await caller.call("runs.reply", "r", 3, None, etag="e")

    (request,) = server.asked("SubmitReply")
    assert (request.interaction_id, request.etag) == (3, "e")
    assert request.response.WhichOneof("kind") == "null_value"


async def test_reaches_every_method_of_the_contract(
    caller: Caller,
    server: ScriptedServer,
    stream: type[Stream],
    methods: Mapping[str, MethodDescriptor],
) -> None:
    for method in methods.values():
        answer = message_factory.GetMessageClass(method.output_type)()
        server.on(method.name, stream([answer]) if method.server_streaming else answer)

    await caller.call("runs.create", engine="demo")
    await caller.call("runs.get", "r")
    await caller.call("runs.reply", "r", 1, "yes")
    await caller.call("runs.cancel", "r")
    await caller.collect("runs.list")
    await caller.collect("runs.interactions", "r")
    await caller.collect("runs.output", "r")
    await caller.call("recovery.info", "r")
    await caller.call("recovery.status")
    await caller.call("recovery.reconciliation", "x")
    await caller.collect("recovery.recovered")
    await caller.collect("recovery.reconciliations")

    assert {name for name, _ in server.calls} == {method.name for method in methods.values()}


async def test_returns_the_recovery_messages(caller: Caller, server: ScriptedServer) -> None:
    info = recovery_service_pb2.GetRecoveryInfoResponse(
        recovery=run_pb2.RecoveryInfo(recovery_count=2),
        history=[run_pb2.RecoveryInfo(recovery_count=n) for n in (2, 1)],
    )
    status = recovery_service_pb2.GetRecoveryStatusResponse(
        state=recovery_pb2.SERVICE_STATE_RECOVERING, epoch=4
    )
    report = recovery_pb2.Reconciliation(reconciliation_id="x", runs_total=9)
    server.on("GetRecoveryInfo", info)
    server.on("GetRecoveryStatus", status)
    server.on(
        "GetReconciliation", recovery_service_pb2.GetReconciliationResponse(reconciliation=report)
    )

    assert await caller.call("recovery.info", "r") == info
    assert await caller.call("recovery.status") == status
    assert await caller.call("recovery.reconciliation", "x") == report
