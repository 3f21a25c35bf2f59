"""Converts gRPC errors into errors of the client, by their trailers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from runrecovery import errors
from runrecovery.errors import ErrorDetails, FieldViolation, RunRecoveryClientError

DOMAIN = "runrecovery"
STATUS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"

BY_REASON: Mapping[str, type[RunRecoveryClientError]] = {
    "RUN_NOT_FOUND": errors.RunNotFound,
    "RECONCILIATION_NOT_FOUND": errors.ReconciliationNotFound,
    "INVALID_FIELD": errors.InvalidRequest,
    "UNKNOWN_ENGINE": errors.UnknownEngine,
    "PAGE_TOKEN_INVALID": errors.PageTokenInvalid,
    "PAGE_TOKEN_MISMATCH": errors.PageTokenInvalid,
    "RUN_ALREADY_EXISTS": errors.RunAlreadyExists,
    "REQUEST_ID_REUSED": errors.RequestIdReused,
    "RUN_NOT_WAITING": errors.RunNotWaiting,
    "INTERACTION_SUPERSEDED": errors.InteractionSuperseded,
    "RUN_ALREADY_TERMINAL": errors.RunAlreadyTerminal,
    "RUN_QUARANTINED": errors.RunQuarantined,
    "RUN_OF_ANOTHER_INSTANCE": errors.RunOfAnotherInstance,
    "RUN_NOT_REOPENABLE": errors.RunNotReopenable,
    "SESSION_NOT_RESUMABLE": errors.SessionNotResumable,
    "ETAG_MISMATCH": errors.EtagMismatch,
    "RECONCILIATION_IN_PROGRESS": errors.RecoveryInProgress,
    "SHUTTING_DOWN": errors.ShuttingDown,
    "SAFE_MODE": errors.SafeMode,
    "STORAGE_BUSY": errors.Unavailable,
    "STORAGE_UNAVAILABLE": errors.Unavailable,
    "OVERLOADED": errors.Overloaded,
    "STORAGE_FULL": errors.StorageFull,
    "SLOW_READER": errors.SlowReader,
    "OUTPUT_REMOVED": errors.OutputRemoved,
    "OUTPUT_OUT_OF_RANGE": errors.OutputOutOfRange,
    "WATCH_HISTORY_PRUNED": errors.WatchHistoryPruned,
    "WATCH_SEQUENCE_UNKNOWN": errors.WatchSequenceUnknown,
    "WATCH_CURSOR_INVALID": errors.WatchCursorInvalid,
    "CALLER_UNKNOWN": errors.Unauthenticated,
    "ROLE_NOT_SUFFICIENT": errors.PermissionDenied,
    "ENGINE_NOT_ALLOWED": errors.PermissionDenied,
    "CALLER_OVERLOADED": errors.Overloaded,
    "INTERNAL": errors.InternalError,
}

# Codes with one meaning. The others (FAILED_PRECONDITION, ABORTED, …) are used for several cases,
# so they mean nothing without a reason.
BY_CODE: Mapping[grpc.StatusCode, type[RunRecoveryClientError]] = {
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.CANCELLED: errors.Unavailable,  # from a stopping server or proxy
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.INTERNAL: errors.InternalError,
}

CHANNEL_CLOSED = "Channel closed!"
"""gRPC's text when the caller closed the channel during a call: nothing to retry or resume."""

MessageT = TypeVar("MessageT", bound=Message)


def from_rpc_error(error: grpc.RpcError) -> RunRecoveryClientError:
    """Return the client's error for a gRPC error. Raise it `from` the gRPC error."""
    pairs = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    # As a tuple, because grpc.aio's metadata have keys(), which dict() would misread.
    details = read_details(error.code(), dict(tuple(pairs)))
    kind = BY_REASON.get(details.reason) or BY_CODE.get(details.code, errors.UnrecognizedError)
    if details.code is grpc.StatusCode.CANCELLED and CHANNEL_CLOSED in (error.details() or ""):
        kind = errors.UnrecognizedError
    return kind(error.details() or details.code.name, details=details)


def read_details(code: grpc.StatusCode, trailers: Mapping[str, str | bytes]) -> ErrorDetails:
    """Return the details in the trailers of a failed call."""
    packed = _packed_details(trailers.get(STATUS_TRAILER))
    info = _unpack(packed, error_details_pb2.ErrorInfo)
    ours = info.domain == DOMAIN
    return ErrorDetails(
        code=code,
        reason=info.reason if ours else "",
        metadata=dict(info.metadata) if ours else {},
        violations=tuple(
            FieldViolation(violation.field, violation.description)
            for violation in _unpack(packed, error_details_pb2.BadRequest).field_violations
        ),
        resource_name=_unpack(packed, error_details_pb2.ResourceInfo).resource_name,
        retry_after_s=_retry_after_s(packed, trailers.get(PUSHBACK_TRAILER)),
    )


def _packed_details(trailer: str | bytes | None) -> list[AnyMessage]:
    if not isinstance(trailer, bytes):
        return []
    try:
        return list(status_pb2.Status.FromString(trailer).details)
    except DecodeError:  # an invalid trailer, from a proxy, must not hide the error
        return []


def _unpack(packed: Iterable[AnyMessage], kind: type[MessageT]) -> MessageT:
    """Return the first detail of this type, or an empty message."""
    found = kind()
    for detail in packed:
        if detail.TypeName() == kind.DESCRIPTOR.full_name:
            try:
                detail.Unpack(found)
            except DecodeError:
                return kind()
            return found
    return found


def _retry_after_s(packed: Iterable[AnyMessage], pushback: str | bytes | None) -> float | None:
    retry = _unpack(packed, error_details_pb2.RetryInfo)
    if retry.HasField("retry_delay"):
        return max(0.0, float(retry.retry_delay.ToTimedelta().total_seconds()))
    if isinstance(pushback, str) and pushback.isdecimal():
        return int(pushback) / 1000
    return None
