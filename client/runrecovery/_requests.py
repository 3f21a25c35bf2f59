"""Every call of the contract as a value: path, request, and decoder of the response.

Both clients send these values, so requests and responses are defined once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, Protocol, TypeAlias, TypeVar

from google.protobuf import wrappers_pb2
from google.protobuf.message import Message

from runrecovery._values import JsonValue, to_duration, to_struct, to_timestamp, to_value
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2

_RUNS = "/runrecovery.v1.RunService/"
_RECOVERY = "/runrecovery.v1.RecoveryService/"

ResultT_co = TypeVar("ResultT_co", covariant=True)
DecisionsT_co = TypeVar("DecisionsT_co", covariant=True)
RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[ResultT_co]):
    """One call, ready to send.

    Attributes:
        path: `/package.Service/Method`.
        request: the message to send.
        decode: converts the bytes of the response into the result.
        wait_for_ready: whether to wait until the deadline for a server that does not run yet.
    """

    path: str
    request: Message = field(repr=False)  # may contain a session handle, a secret
    decode: Callable[[bytes], ResultT_co]
    wait_for_ready: bool = True

    def encode(self, request: Message) -> bytes:
        """Return the bytes of the request."""
        return request.SerializeToString()


@dataclass(frozen=True, slots=True)
class Page(Generic[RowT]):
    """Rows, and the token of the next page. The token is empty exactly on the last page."""

    rows: Sequence[RowT]
    next_token: str


@dataclass(frozen=True, slots=True)
class PlanPage(Page[recovery_service_pb2.PlannedDecision]):
    """A page of the plan; the first page has the totals."""

    totals: recovery_service_pb2.RecoveryPlan


@dataclass(frozen=True, slots=True)
class Plan(Generic[DecisionsT_co]):
    """The decisions that a restart would make now.

    Attributes:
        totals: the numbers of the whole plan.
        decisions: an iterator over the decisions in their order, which fetches pages as needed.
            It can be used once.
    """

    totals: recovery_service_pb2.RecoveryPlan
    decisions: DecisionsT_co


Listing: TypeAlias = Callable[[str], Call[Page[RowT]]]
"""Returns the call for the page of a token; the empty token means the first page."""


class ServingStatus(StrEnum):
    """The status of a health check, as in grpc.health.v1."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


def create_run(
    *,
    engine: str,
    input: Mapping[str, JsonValue] | None,  # noqa: A002 - the contract's name
    run_id: str | None,
    labels: Mapping[str, str] | None,
    restart_policy: run_pb2.RestartPolicy.ValueType,
    interactive_profile: run_pb2.InteractiveProfileKind.ValueType,
    session_timeout_s: float | None,
    require_user_reply: bool | None,
    max_tokens: int | None,
    max_cost_usd: float | None,
    request_id: str | None,
) -> Call[run_pb2.Run]:
    profile = run_pb2.InteractiveProfile(
        kind=interactive_profile,
        session_timeout=to_duration(session_timeout_s),
        require_user_reply=require_user_reply,
    )
    request = run_service_pb2.CreateRunRequest(
        run_id=run_id or "",
        engine=engine,
        labels=labels or {},
        input=None if input is None else to_struct(input),
        restart_policy=restart_policy,
        interactive_profile=profile if profile.ListFields() else None,
        request_id=request_id or new_request_id(),
        max_tokens=max_tokens,
        max_cost_usd=max_cost_usd,
    )
    return Call(
        path=_RUNS + "CreateRun",
        request=request,
        decode=lambda data: run_service_pb2.CreateRunResponse.FromString(data).run,
    )


def get_run(run_id: str) -> Call[run_pb2.Run]:
    return Call(
        path=_RUNS + "GetRun",
        request=run_service_pb2.GetRunRequest(run_id=run_id),
        decode=lambda data: run_service_pb2.GetRunResponse.FromString(data).run,
    )


def list_runs(
    *,
    statuses: Iterable[run_pb2.RunStatus.ValueType],
    engine: str | None,
    labels: Mapping[str, str] | None,
    created_after: datetime | None,
    created_before: datetime | None,
    view: run_pb2.RunView.ValueType,
    oldest_first: bool,
    page_size: int,
) -> Listing[run_pb2.Run]:
    chosen = run_service_pb2.RunFilter(
        statuses=statuses,
        engine=engine or "",
        labels=labels or {},
        created_after=to_timestamp(created_after),
        created_before=to_timestamp(created_before),
    )
    return _listing(
        _RUNS + "ListRuns",
        lambda token: run_service_pb2.ListRunsRequest(
            filter=chosen,
            page_size=page_size,
            page_token=token,
            view=view,
            oldest_first=oldest_first,
        ),
        run_service_pb2.ListRunsResponse.FromString,
        lambda response: response.runs,
    )


def watch_run(run_id: str, *, after_sequence: int | None) -> Call[run_service_pb2.WatchRunResponse]:
    return Call(
        path=_RUNS + "WatchRun",
        request=run_service_pb2.WatchRunRequest(run_id=run_id, after_sequence=after_sequence),
        decode=run_service_pb2.WatchRunResponse.FromString,
        wait_for_ready=False,  # no deadline, see stream_output
    )


def submit_reply(
    run_id: str,
    interaction_id: int,
    response: JsonValue,
    *,
    etag: str | None,
    request_id: str | None,
) -> Call[run_pb2.Run]:
    request = run_service_pb2.SubmitReplyRequest(
        run_id=run_id,
        interaction_id=interaction_id,
        response=to_value(response),
        etag=etag or "",
        request_id=request_id or new_request_id(),
    )
    return Call(
        path=_RUNS + "SubmitReply",
        request=request,
        decode=lambda data: run_service_pb2.SubmitReplyResponse.FromString(data).run,
    )


def cancel_run(run_id: str, *, etag: str | None, request_id: str | None) -> Call[run_pb2.Run]:
    request = run_service_pb2.CancelRunRequest(
        run_id=run_id, etag=etag or "", request_id=request_id or new_request_id()
    )
    return Call(
        path=_RUNS + "CancelRun",
        request=request,
        decode=lambda data: run_service_pb2.CancelRunResponse.FromString(data).run,
    )


def reopen_run(
    run_id: str, *, session_handle: str | None, etag: str | None, request_id: str | None
) -> Call[run_pb2.Run]:
    request = run_service_pb2.ReopenRunRequest(
        run_id=run_id, etag=etag or "", request_id=request_id or new_request_id()
    )
    if session_handle is None:
        request.keep_session = True
    else:
        request.session_handle = session_handle
    return Call(
        path=_RUNS + "ReopenRun",
        request=request,
        decode=lambda data: run_service_pb2.ReopenRunResponse.FromString(data).run,
    )


def list_interactions(run_id: str, *, page_size: int) -> Listing[run_pb2.Interaction]:
    return _listing(
        _RUNS + "ListInteractions",
        lambda token: run_service_pb2.ListInteractionsRequest(
            run_id=run_id, page_size=page_size, page_token=token
        ),
        run_service_pb2.ListInteractionsResponse.FromString,
        lambda response: response.interactions,
    )


def stream_output(
    request: run_service_pb2.StreamOutputRequest,
) -> Call[run_service_pb2.StreamOutputResponse]:
    return Call(
        path=_RUNS + "StreamOutput",
        request=request,
        decode=run_service_pb2.StreamOutputResponse.FromString,
        # Streams have no deadline: the client's reconnecting limits the wait for a server.
        wait_for_ready=False,
    )


def get_recovery_info(run_id: str) -> Call[recovery_service_pb2.GetRecoveryInfoResponse]:
    return Call(
        path=_RECOVERY + "GetRecoveryInfo",
        request=recovery_service_pb2.GetRecoveryInfoRequest(run_id=run_id),
        decode=recovery_service_pb2.GetRecoveryInfoResponse.FromString,
    )


def recovered_filter(
    *,
    recovery_states: Iterable[run_pb2.RecoveryState.ValueType],
    recovery_reason: str | None,
    engine: str | None,
    labels: Mapping[str, str] | None,
    recovered_after: datetime | None,
    recovered_before: datetime | None,
    reconciliation_id: str | None,
) -> recovery_service_pb2.RecoveredFilter:
    return recovery_service_pb2.RecoveredFilter(
        recovery_states=recovery_states,
        recovery_reason=recovery_reason or "",
        engine=engine or "",
        labels=labels or {},
        recovered_after=to_timestamp(recovered_after),
        recovered_before=to_timestamp(recovered_before),
        reconciliation_id=reconciliation_id or "",
    )


def list_recovered(
    chosen: recovery_service_pb2.RecoveredFilter,
    *,
    view: run_pb2.RunView.ValueType,
    page_size: int,
) -> Listing[run_pb2.Run]:
    return _listing(
        _RECOVERY + "ListRecovered",
        lambda token: recovery_service_pb2.ListRecoveredRequest(
            filter=chosen, page_size=page_size, page_token=token, view=view
        ),
        recovery_service_pb2.ListRecoveredResponse.FromString,
        lambda response: response.runs,
    )


def watch_recovered(
    chosen: recovery_service_pb2.RecoveredFilter, *, after_cursor: str
) -> Call[recovery_service_pb2.WatchRecoveredResponse]:
    return Call(
        path=_RECOVERY + "WatchRecovered",
        request=recovery_service_pb2.WatchRecoveredRequest(
            filter=chosen, after_cursor=after_cursor
        ),
        decode=recovery_service_pb2.WatchRecoveredResponse.FromString,
        wait_for_ready=False,  # no deadline, see stream_output
    )


def explain_recovery(run_id: str) -> Call[recovery_service_pb2.ExplainRecoveryResponse]:
    return Call(
        path=_RECOVERY + "ExplainRecovery",
        request=recovery_service_pb2.ExplainRecoveryRequest(run_id=run_id),
        decode=recovery_service_pb2.ExplainRecoveryResponse.FromString,
    )


def plan_recovery(*, page_size: int) -> Callable[[str], Call[PlanPage]]:
    def decode(data: bytes) -> PlanPage:
        response = recovery_service_pb2.PlanRecoveryResponse.FromString(data)
        return PlanPage(response.decisions, response.next_page_token, response.plan)

    return lambda token: Call(
        path=_RECOVERY + "PlanRecovery",
        request=recovery_service_pb2.PlanRecoveryRequest(page_size=page_size, page_token=token),
        decode=decode,
    )


def get_recovery_status() -> Call[recovery_service_pb2.GetRecoveryStatusResponse]:
    return Call(
        path=_RECOVERY + "GetRecoveryStatus",
        request=recovery_service_pb2.GetRecoveryStatusRequest(),
        decode=recovery_service_pb2.GetRecoveryStatusResponse.FromString,
    )


def get_instances() -> Call[Sequence[recovery_service_pb2.Instance]]:
    return Call(
        path=_RECOVERY + "GetInstances",
        request=recovery_service_pb2.GetInstancesRequest(),
        decode=lambda data: recovery_service_pb2.GetInstancesResponse.FromString(data).instances,
    )


def list_reconciliations(*, page_size: int) -> Listing[recovery_pb2.Reconciliation]:
    return _listing(
        _RECOVERY + "ListReconciliations",
        lambda token: recovery_service_pb2.ListReconciliationsRequest(
            page_size=page_size, page_token=token
        ),
        recovery_service_pb2.ListReconciliationsResponse.FromString,
        lambda response: response.reconciliations,
    )


def get_reconciliation(reconciliation_id: str) -> Call[recovery_pb2.Reconciliation]:
    return Call(
        path=_RECOVERY + "GetReconciliation",
        request=recovery_service_pb2.GetReconciliationRequest(reconciliation_id=reconciliation_id),
        decode=lambda data: (
            recovery_service_pb2.GetReconciliationResponse.FromString(data).reconciliation
        ),
    )


def prune(*, dry_run: bool) -> Call[recovery_service_pb2.PruneResponse]:
    return Call(
        path=_RECOVERY + "Prune",
        request=recovery_service_pb2.PruneRequest(dry_run=dry_run),
        decode=recovery_service_pb2.PruneResponse.FromString,
    )


def list_webhooks() -> Call[Sequence[recovery_service_pb2.Webhook]]:
    return Call(
        path=_RECOVERY + "ListWebhooks",
        request=recovery_service_pb2.ListWebhooksRequest(),
        decode=lambda data: recovery_service_pb2.ListWebhooksResponse.FromString(data).webhooks,
    )


def retry_webhook(name: str) -> Call[int]:
    return Call(
        path=_RECOVERY + "RetryWebhook",
        request=recovery_service_pb2.RetryWebhookRequest(name=name),
        decode=lambda data: recovery_service_pb2.RetryWebhookResponse.FromString(data).revived,
    )


def check_health(service: str) -> Call[ServingStatus]:
    """Return a health check that needs no grpcio-health-checking.

    HealthCheckRequest and HealthCheckResponse have one field each, and the same wire format as
    these wrappers. So this package registers no message that another package registers too.
    """
    return Call(
        path="/grpc.health.v1.Health/Check",
        request=wrappers_pb2.StringValue(value=service),
        decode=_serving_status,
        wait_for_ready=False,  # a probe reports the present state at once
    )


def new_request_id() -> str:
    """Return a new id for one logical call and its retries."""
    return str(uuid.uuid4())


def _serving_status(data: bytes) -> ServingStatus:
    number = wrappers_pb2.Int32Value.FromString(data).value
    statuses = tuple(ServingStatus)
    return statuses[number] if 0 <= number < len(statuses) else ServingStatus.UNKNOWN


class _PageMessage(Protocol):
    next_page_token: str


PageMessageT = TypeVar("PageMessageT", bound=_PageMessage)


def _listing(
    path: str,
    request: Callable[[str], Message],
    parse: Callable[[bytes], PageMessageT],
    rows: Callable[[PageMessageT], Sequence[RowT]],
) -> Listing[RowT]:
    def decode(data: bytes) -> Page[RowT]:
        response = parse(data)
        return Page(rows(response), response.next_page_token)

    return lambda token: Call(path=path, request=request(token), decode=decode)
