"""The requests that the clients send: values, and every method of the contract."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import runrecovery as rr
from google.protobuf import json_format, message_factory
from hypothesis import given
from hypothesis import strategies as st
from runrecovery import _requests
from runrecovery._values import to_struct, to_timestamp, to_value
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2
from support.scripted_server import METHODS, ScriptedServer, Stream

if TYPE_CHECKING:
    from client.conftest import Caller

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


async def test_create_sends_every_argument(caller: Caller, server: ScriptedServer) -> None:
    server.on("CreateRun", run_service_pb2.CreateRunResponse(run=run_pb2.Run(run_id="mine")))

    run = await caller.call(
        "runs.create",
        engine="demo",
        input={"a": 1, "b": [None, {"c": True}]},
        run_id="mine",
        labels={"team": "x"},
        restart_policy=rr.RestartPolicy.RESTART_POLICY_REQUEUE,
        interactive_profile=(rr.InteractiveProfileKind.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS),
        session_timeout_s=90.5,
        require_user_reply=False,
        max_tokens=1000,
        max_cost_usd=0.5,
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
        "interactive_profile": {
            "kind": "INTERACTIVE_PROFILE_KIND_STICKY_PROCESS",
            "session_timeout": "90.500s",
            "require_user_reply": False,
        },
        "request_id": "0b0f6c5e-54c1-4bd3-9a3c-0a5f8e6f3a11",
        "max_tokens": "1000",
        "max_cost_usd": 0.5,
    }


async def test_create_leaves_out_absent_arguments(caller: Caller, server: ScriptedServer) -> None:
    server.on("CreateRun", run_service_pb2.CreateRunResponse())

    await caller.call("runs.create", engine="demo")

    (request,) = server.asked("CreateRun")
    assert {field.name for field, _ in request.ListFields()} == {"engine", "request_id"}


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300])
async def test_refuses_a_time_that_cannot_be_sent(
    seconds: float, caller: Caller, server: ScriptedServer
) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        await caller.call("runs.create", engine="demo", session_timeout_s=seconds)

    assert server.calls == []


@pytest.mark.parametrize(
    ("handle", "field", "value"),
    [(None, "keep_session", True), ("h", "session_handle", "h"), ("", "session_handle", "")],
)
async def test_reopens_with_the_kept_handle_unless_another_is_given(
    handle: str | None, field: str, value: object, caller: Caller, server: ScriptedServer
) -> None:
    server.on("ReopenRun", run_service_pb2.ReopenRunResponse(run=run_pb2.Run(run_id="r")))

    run = await caller.call("runs.reopen", "r", session_handle=handle, etag="e")

    (request,) = server.asked("ReopenRun")
    assert run.run_id == "r"
    assert (request.run_id, request.etag) == ("r", "e")
    assert request.WhichOneof("session") == field
    assert getattr(request, field) == value


def test_a_session_handle_is_in_no_text_of_a_call() -> None:
    call = _requests.reopen_run("r", session_handle="hush", etag=None, request_id=None)

    assert b"hush" in call.encode(call.request)
    assert "hush" not in repr(call)


async def test_returns_explanations(caller: Caller, server: ScriptedServer) -> None:
    explained = recovery_service_pb2.ExplainRecoveryResponse(
        explanations=[recovery_service_pb2.RecoveryExplanation(because="it was so")]
    )
    server.on("ExplainRecovery", explained)

    assert await caller.call("recovery.explain", "r") == explained
    assert server.asked("ExplainRecovery")[0].run_id == "r"


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
) -> None:
    for method in METHODS.values():
        answer = message_factory.GetMessageClass(method.output_type)()
        server.on(method.name, Stream([answer]) if method.server_streaming else answer)

    await caller.call("runs.create", engine="demo")
    await caller.call("runs.get", "r")
    await caller.call("runs.reply", "r", 1, "yes")
    await caller.call("runs.cancel", "r")
    await caller.call("runs.reopen", "r")
    await caller.collect("runs.list")
    await caller.collect("runs.watch", "r")
    await caller.collect("runs.interactions", "r")
    await caller.collect("runs.output", "r")
    await caller.call("recovery.info", "r")
    await caller.call("recovery.status")
    await caller.call("recovery.reconciliation", "x")
    await caller.collect("recovery.recovered")
    await caller.collect("recovery.reconciliations")
    await caller.collect("recovery.watch_recovered")
    await caller.call("recovery.explain", "r")
    await caller.call("recovery.plan")
    await caller.call("recovery.prune")
    await caller.call("recovery.webhooks")
    await caller.call("recovery.retry_webhook", "chat")
    await caller.call("recovery.instances")

    assert {name for name, _ in server.calls} == {method.name for method in METHODS.values()}


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

    pruned = recovery_service_pb2.PruneResponse(done=True)
    server.on("Prune", pruned)

    webhooks = [recovery_service_pb2.Webhook(name="chat", due=3)]
    server.on("ListWebhooks", recovery_service_pb2.ListWebhooksResponse(webhooks=webhooks))
    server.on("RetryWebhook", recovery_service_pb2.RetryWebhookResponse(revived=7))

    assert list(await caller.call("recovery.webhooks")) == webhooks
    assert await caller.call("recovery.retry_webhook", "chat") == 7
    assert await caller.call("recovery.prune", dry_run=True) == pruned
    assert await caller.call("recovery.info", "r") == info
    assert await caller.call("recovery.status") == status
    assert await caller.call("recovery.reconciliation", "x") == report
