"""Calls of the API as a client without retries makes them, and their failures decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self, TypeAlias

import grpc
from google.protobuf.struct_pb2 import Struct, Value
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import recovery_service_pb2_grpc, run_pb2, run_service_pb2_grpc
from runrecovery.v1 import run_service_pb2 as pb

from support.waiting import until

CALL_TIMEOUT_S: Final = 30.0
NO_RETRY: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 1000),  # of a try that is not refused
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", 64 << 20),
)

ENDED: Final = (
    run_pb2.RUN_STATUS_SUCCEEDED,
    run_pb2.RUN_STATUS_FAILED,
    run_pb2.RUN_STATUS_CANCELED,
)

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """How a call failed, as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: Mapping[str, str]
    fields: tuple[str, ...]
    details: tuple[str, ...]
    retry_after_s: float | None
    pushback_ms: str | None
    resource: str


def refusal_of(error: grpc.RpcError) -> Refusal:
    """Decode the details of an error."""
    call: Any = error  # a failed call is an RpcError and a Call at once; the types do not say so
    trailers = dict(call.trailing_metadata() or ())
    status = status_pb2.Status()
    status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, resource = error_details_pb2.RetryInfo(), error_details_pb2.ResourceInfo()
    found = []
    for detail in status.details:
        found.append(detail.type_url.rpartition(".")[2])
        for message in (info, bad, retry, resource):
            detail.Unpack(message)
    has_retry = "RetryInfo" in found
    return Refusal(
        code=call.code(),
        message=call.details() or "",
        reason=info.reason,
        domain=info.domain,
        metadata=dict(info.metadata),
        fields=tuple(violation.field for violation in bad.field_violations),
        details=tuple(found),
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if has_retry else None,
        pushback_ms=trailers.get("grpc-retry-pushback-ms"),
        resource=resource.resource_name,
    )


def refused(call: Callable[[], object]) -> Refusal:
    """Return how the call failed; fail when it did not."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"the call was not refused: {answer}")


def struct(values: Mapping[str, Any]) -> Struct:
    """Return a Struct."""
    made = Struct()
    made.update(values)
    return made


def value(of: Any) -> Value:
    """Return a Value: None, a bool, a number, a text, a list or an object."""
    holder = Struct()
    holder.update({"v": of})
    return holder.fields["v"]


class _Details(NamedTuple):
    """What gRPC tells an interceptor about a call."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class WithMetadata(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the same metadata to every call of a channel."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    def _call(self, proceed: Any, details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), *self._metadata)
        return proceed(
            _Details(
                details.method, details.timeout, metadata, details.credentials,
                details.wait_for_ready, details.compression,
            ),
            request,
        )  # fmt: skip

    intercept_unary_unary: Any = _call
    intercept_unary_stream: Any = _call
    intercept_stream_stream: Any = _call


class Api:
    """A channel to one service and its stubs."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        options: tuple[tuple[str, Any], ...] = (),
    ) -> None:
        options = (*NO_RETRY, *options)
        if credentials is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, credentials, options=options)
        if token:
            metadata = (("authorization", f"Bearer {token}"),)
            channel = grpc.intercept_channel(channel, WithMetadata(metadata))
        self.channel = channel
        self.runs = run_service_pb2_grpc.RunServiceStub(self.channel)
        self.recovery = recovery_service_pb2_grpc.RecoveryServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def create(self, engine: str, given: Json | None = None, **fields: Any) -> run_pb2.Run:
        """Create a run."""
        request = pb.CreateRunRequest(engine=engine, input=struct(given or {}), **fields)
        return self.runs.CreateRun(request, timeout=self._timeout_s).run

    def get(self, run_id: str) -> run_pb2.Run:
        """Return a run."""
        return self.runs.GetRun(pb.GetRunRequest(run_id=run_id), timeout=self._timeout_s).run

    def reply(self, run_id: str, interaction_id: int, answer: Any, **more: Any) -> run_pb2.Run:
        """Answer a question."""
        request = pb.SubmitReplyRequest(
            run_id=run_id, interaction_id=interaction_id, response=value(answer), **more
        )
        return self.runs.SubmitReply(request, timeout=self._timeout_s).run

    def cancel(self, run_id: str, **more: Any) -> run_pb2.Run:
        """Cancel a run."""
        request = pb.CancelRunRequest(run_id=run_id, **more)
        return self.runs.CancelRun(request, timeout=self._timeout_s).run

    def interactions(self, run_id: str) -> list[run_pb2.Interaction]:
        """Return the questions of a run (at most 1000)."""
        request = pb.ListInteractionsRequest(run_id=run_id, page_size=1000)
        answer = self.runs.ListInteractions(request, timeout=self._timeout_s)
        return list(answer.interactions)

    def output(self, run_id: str, **more: Any) -> list[pb.StreamOutputResponse]:
        """Return the pieces of a run's output."""
        request = pb.StreamOutputRequest(run_id=run_id, **more)
        return list(self.runs.StreamOutput(request, timeout=self._timeout_s))

    def recovery_info(self, run_id: str) -> recovery_pb.GetRecoveryInfoResponse:
        """Return what restarts decided for a run."""
        request = recovery_pb.GetRecoveryInfoRequest(run_id=run_id)
        return self.recovery.GetRecoveryInfo(request, timeout=self._timeout_s)

    def status(self) -> recovery_pb.GetRecoveryStatusResponse:
        """Return what the service is doing."""
        request = recovery_pb.GetRecoveryStatusRequest()
        return self.recovery.GetRecoveryStatus(request, timeout=self._timeout_s)

    def recovered(self, **wanted: Any) -> list[run_pb2.Run]:
        """Return recovered runs (at most 1000)."""
        request = recovery_pb.ListRecoveredRequest(
            filter=recovery_pb.RecoveredFilter(**wanted), page_size=1000
        )
        return list(self.recovery.ListRecovered(request, timeout=self._timeout_s).runs)

    def health_of(self, name: str = "") -> str:
        """Return what health says of a name, as the word of the contract."""
        request = health_pb2.HealthCheckRequest(service=name)
        answer = self.health.Check(request, timeout=self._timeout_s)
        word: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return word

    def until_status(self, run_id: str, *statuses: str) -> run_pb2.Run:
        """Wait until a run is in one of these statuses and return it."""
        wanted = {run_pb2.RunStatus.Value(f"RUN_STATUS_{status}") for status in statuses}

        def look() -> run_pb2.Run | None:
            run = self.get(run_id)
            assert run.status in wanted or run.status not in ENDED, f"it ended: {run}"
            return run if run.status in wanted else None

        return until(look, f"run {run_id} is {' or '.join(statuses)}")  # type: ignore[return-value]

    def until_ended(self, run_id: str) -> run_pb2.Run:
        """Wait until a run is terminal and return it."""
        return self.until_status(run_id, "SUCCEEDED", "FAILED", "CANCELED")


def status_word(run: run_pb2.Run) -> str:
    """Return the status of a run without its prefix."""
    return run_pb2.RunStatus.Name(run.status).removeprefix("RUN_STATUS_")


def state_word(info: run_pb2.RecoveryInfo) -> str:
    """Return the recovery state without its prefix."""
    return run_pb2.RecoveryState.Name(info.recovery_state).removeprefix("RECOVERY_STATE_")
