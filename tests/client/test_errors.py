"""The error class that a failed call raises, and the attributes of the error."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import grpc
import pytest
import runrecovery as rr
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from runrecovery import errors
from runrecovery._failures import BY_REASON, from_rpc_error, read_details
from runrecovery.v1 import errors_pb2
from support.scripted_server import Fail, ScriptedServer

if TYPE_CHECKING:
    from client.conftest import Caller

CODES = {
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RunAlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    errors.EtagMismatch: grpc.StatusCode.ABORTED,
    errors.OutputOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.WatchHistoryPruned: grpc.StatusCode.OUT_OF_RANGE,
    errors.WatchSequenceUnknown: grpc.StatusCode.OUT_OF_RANGE,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}


def _code_of(kind: type[rr.RunRecoveryClientError]) -> grpc.StatusCode:
    found = [code for base, code in CODES.items() if issubclass(kind, base)]
    return found[0] if found else grpc.StatusCode.FAILED_PRECONDITION


def test_every_reason_of_the_contract_has_a_class() -> None:
    of_the_contract = {
        name.removeprefix("ERROR_REASON_")
        for name, number in errors_pb2.ErrorReason.items()
        if number
    }

    assert of_the_contract == set(BY_REASON)


@pytest.mark.parametrize(("reason", "kind"), BY_REASON.items(), ids=str)
async def test_raises_the_class_of_the_reason_and_keeps_the_grpc_error(
    reason: str,
    kind: type[rr.RunRecoveryClientError],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    code = _code_of(kind)
    server.on("GetRun", Fail(code=code, reason=reason, pushback_ms="-1"))

    with pytest.raises(rr.RunRecoveryClientError) as raised:
        await caller.call("runs.get", "r")

    assert type(raised.value) is kind
    assert (raised.value.code, raised.value.reason) == (code, reason)
    assert str(raised.value) == "scripted failure"
    assert isinstance(raised.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, rr.NotFound),
        (grpc.StatusCode.INVALID_ARGUMENT, rr.InvalidRequest),
        (grpc.StatusCode.UNAVAILABLE, rr.Unavailable),
        (grpc.StatusCode.CANCELLED, rr.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, rr.ResourceExhausted),
        (grpc.StatusCode.DEADLINE_EXCEEDED, rr.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, rr.InternalError),
        (grpc.StatusCode.FAILED_PRECONDITION, rr.UnrecognizedError),
        (grpc.StatusCode.UNAUTHENTICATED, rr.Unauthenticated),
    ],
    ids=str,
)
async def test_raises_the_class_of_the_code_without_details(
    code: grpc.StatusCode,
    kind: type[rr.RunRecoveryClientError],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("GetRun", Fail(code=code, pushback_ms="-1"))

    with pytest.raises(rr.RunRecoveryClientError) as raised:
        await caller.call("runs.get", "r")

    assert (type(raised.value), raised.value.reason) == (kind, "")


async def test_raises_the_class_of_the_code_for_an_unknown_reason(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("GetRun", Fail(code=grpc.StatusCode.NOT_FOUND, reason="PLANET_NOT_FOUND"))

    with pytest.raises(rr.NotFound) as raised:
        await caller.call("runs.get", "r")

    assert (type(raised.value), raised.value.reason) == (rr.NotFound, "PLANET_NOT_FOUND")


async def test_ignores_a_reason_of_another_domain(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    foreign = Fail(
        code=grpc.StatusCode.NOT_FOUND,
        reason="RUN_NOT_FOUND",
        domain="mesh",
        metadata={"secret": "x"},
    )
    server.on("GetRun", foreign)

    with pytest.raises(rr.NotFound) as raised:
        await caller.call("runs.get", "r")

    assert type(raised.value) is rr.NotFound
    assert (raised.value.reason, dict(raised.value.metadata)) == ("", {})


async def test_survives_a_damaged_details_trailer(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("GetRun", Fail(code=grpc.StatusCode.NOT_FOUND, trailer=b"\xff\xff\xff"))

    with pytest.raises(rr.NotFound):
        await caller.call("runs.get", "r")


async def test_names_every_bad_field(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="run_id", description="too long")
    bad.field_violations.add(field="labels", description="too many")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    server.on("CreateRun", Fail(code=invalid, reason="INVALID_FIELD", more=[bad]))

    with pytest.raises(rr.InvalidRequest) as raised:
        await caller.call("runs.create", engine="demo")

    assert raised.value.violations == (
        rr.FieldViolation("run_id", "too long"),
        rr.FieldViolation("labels", "too many"),
    )


async def test_unknown_engine_has_the_names_of_the_known_engines(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    metadata = {"known_engines": "demo, reviewer"}
    server.on(
        "CreateRun",
        Fail(code=grpc.StatusCode.INVALID_ARGUMENT, reason="UNKNOWN_ENGINE", metadata=metadata),
    )

    with pytest.raises(rr.UnknownEngine) as raised:
        await caller.call("runs.create", engine="dmeo")

    assert raised.value.known_engines == ("demo", "reviewer")


async def test_an_etag_mismatch_has_the_current_etag(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    mismatch = Fail(
        code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH", metadata={"current_etag": "e2"}
    )
    server.on("CancelRun", mismatch)

    with pytest.raises(rr.EtagMismatch) as raised:
        await caller.call("runs.cancel", "r", etag="e1")

    assert raised.value.current_etag == "e2"
    assert server.asked("CancelRun")[0].etag == "e1"


async def test_not_found_has_the_name_of_the_resource(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    resource = error_details_pb2.ResourceInfo(resource_type="run", resource_name="r9")
    server.on(
        "GetRun", Fail(code=grpc.StatusCode.NOT_FOUND, reason="RUN_NOT_FOUND", more=[resource])
    )

    with pytest.raises(rr.RunNotFound) as raised:
        await caller.call("runs.get", "r9")

    assert raised.value.resource_name == "r9"


async def test_a_retryable_error_has_its_delay(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    retry = error_details_pb2.RetryInfo(
        retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)
    )
    server.on(
        "GetRun",
        Fail(
            code=grpc.StatusCode.UNAVAILABLE,
            reason="RECONCILIATION_IN_PROGRESS",
            more=[retry],
            pushback_ms="-1",
        ),
    )

    with pytest.raises(rr.RecoveryInProgress) as raised:
        await caller.call("runs.get", "r")

    assert raised.value.retry_after_s == 1.5


def test_the_delay_is_the_pushback_without_retry_info() -> None:
    details = read_details(grpc.StatusCode.UNAVAILABLE, {"grpc-retry-pushback-ms": "250"})

    assert details.retry_after_s == 0.25


async def test_an_internal_error_has_its_id(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    defect = Fail(code=grpc.StatusCode.INTERNAL, reason="INTERNAL", metadata={"error_id": "e-77"})
    server.on("GetRun", defect)

    with pytest.raises(rr.InternalError) as raised:
        await caller.call("runs.get", "r")

    assert raised.value.error_id == "e-77"


async def test_maps_errors_of_streams_too(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    beyond = Fail(code=grpc.StatusCode.OUT_OF_RANGE, reason="OUTPUT_OUT_OF_RANGE")
    server.on("StreamOutput", beyond)

    with pytest.raises(rr.OutputOutOfRange):
        await caller.collect("runs.output", "r", offset=10**9)


async def test_names_a_method_that_the_server_does_not_have(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("GetRecoveryStatus", Fail(code=grpc.StatusCode.UNIMPLEMENTED))

    with pytest.raises(rr.UnrecognizedError) as raised:
        await caller.call("recovery.status")

    assert raised.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_an_error_can_be_pickled() -> None:
    details = rr.ErrorDetails(code=grpc.StatusCode.ABORTED, metadata={"current_etag": "e2"})
    error = rr.EtagMismatch("changed", details=details)

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes

    assert (type(copy), str(copy), copy.details) == (rr.EtagMismatch, "changed", details)


def test_an_error_without_any_trailer_has_a_text() -> None:
    class Bare(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> None:
            return None

        def trailing_metadata(self) -> None:  # type: ignore[override]
            return None

    error = from_rpc_error(Bare())

    assert (type(error), str(error)) == (rr.Unavailable, "UNAVAILABLE")
