"""The one table from domain errors to gRPC status, message and details.

Every error carries google.rpc details: an ErrorInfo with the reason (errors.proto), and for some
errors BadRequest, PreconditionFailure, ResourceInfo or RetryInfo. All details together stay below
8 KiB. A gRPC client accepts no more as trailers and would see RESOURCE_EXHAUSTED instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from runrecovery.v1 import errors_pb2

from runrecovery_service.domain import errors
from runrecovery_service.domain.errors import FieldViolation, RunRecoveryError
from runrecovery_service.lazy_dataclass import dataclass

DOMAIN: Final = "runrecovery"
STATUS_TRAILER: Final = "grpc-status-details-bin"
PUSHBACK_TRAILER: Final = "grpc-retry-pushback-ms"
"""The trailer with the time that gRPC's own retry waits. gRPC does not read RetryInfo."""

MAX_VIOLATIONS: Final = 20
MAX_VIOLATIONS_BYTES: Final = 4000
"""The most bytes of violations. With base64, message and ErrorInfo, the trailers stay below 8 KiB.
"""
MAX_TEXT_CHARS: Final = 200
MAX_MESSAGE_BYTES: Final = 300
MAX_METADATA_BYTES: Final = 1000

Reason = errors_pb2.ErrorReason
_PREFIX: Final = "ERROR_REASON_"

Trailers = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class CallStatus:
    """The status with which a call fails: the arguments of grpc's `abort`."""

    code: grpc.StatusCode
    message: str
    trailers: Trailers


# A function of the table takes the class of its row; a test checks this, as types cannot. The
# details are Any, too: google.rpc ships no types for mypy.
_Details = Callable[[Any], Any]
_Metadata = Callable[[Any], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class ErrorMapping:
    """The gRPC code, the reason and the details of one class of errors."""

    code: grpc.StatusCode
    reason: errors_pb2.ErrorReason.ValueType
    details: tuple[_Details, ...] = ()
    metadata: _Metadata = lambda _: {}
    message: str | None = None
    """Replaces the error's own text."""


def status_of(error: RunRecoveryError) -> CallStatus:
    """Return the status of a call that failed with this error.

    Raises:
        KeyError: the class is not in the table; a test walks the error tree.
    """
    row = TABLE[type(error)]
    message = clip_bytes(row.message or str(error), MAX_MESSAGE_BYTES)
    details = [error_info(row.reason, row.metadata(error))]
    details += [build(error) for build in row.details]
    trailers: Trailers = ((STATUS_TRAILER, _pack_status(row.code, message, details)),)
    if row.details and row.details[0] is retry_info:
        trailers += ((PUSHBACK_TRAILER, str(_pushback_ms(error))),)
    return CallStatus(row.code, message, trailers)


def _pushback_ms(error: RunRecoveryError) -> int:
    # A pushback of 0 makes gRPC clients fail instead of retrying.
    return max(1, math.ceil(_retry_after_s(error) * 1000))


def internal_status(error_id: str) -> CallStatus:
    """Return the status of a call that failed by a defect. It names only the id in the log."""
    message = f"internal error {error_id}"
    info = error_info(Reason.ERROR_REASON_INTERNAL, {"error_id": error_id})
    status = _pack_status(grpc.StatusCode.INTERNAL, message, [info])
    return CallStatus(grpc.StatusCode.INTERNAL, message, ((STATUS_TRAILER, status),))


def clip(text: str, chars: int = MAX_TEXT_CHARS) -> str:
    """Return the text, cut to `chars` characters with an ellipsis if it is longer."""
    return text if len(text) <= chars else text[: chars - 1] + "…"


def clip_bytes(text: str, limit: int) -> str:
    """Return the text, cut to `limit` bytes of UTF-8 with an ellipsis if it is longer."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "…"


# -- details -----------------------------------------------------------------------------------


def error_info(reason: errors_pb2.ErrorReason.ValueType, metadata: Mapping[str, str]) -> Any:
    """Return the ErrorInfo, which every error has."""
    return error_details_pb2.ErrorInfo(
        reason=Reason.Name(reason).removeprefix(_PREFIX),
        domain=DOMAIN,
        metadata={key: clip_bytes(text, MAX_METADATA_BYTES) for key, text in metadata.items()},
    )


def retry_info(error: RunRecoveryError) -> Any:
    """Return the RetryInfo: when to retry."""
    seconds, rest = divmod(_retry_after_s(error), 1)
    delay = Duration(seconds=int(seconds), nanos=int(rest * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _retry_after_s(error: RunRecoveryError) -> float:
    if isinstance(error, errors.NotNow | errors.Exhausted):
        return error.retry_after_s
    return 1.0


def bad_request(violations: tuple[FieldViolation, ...]) -> Any:
    """Return the invalid fields: at most 20 and 4000 bytes, then a field named `truncated`."""
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        added = error_details_pb2.BadRequest.FieldViolation(
            field=clip(violation.field), description=clip(violation.description)
        )
        if (
            len(bad.field_violations) == MAX_VIOLATIONS
            or bad.ByteSize() + added.ByteSize() > MAX_VIOLATIONS_BYTES
        ):
            more = len(violations) - len(bad.field_violations)
            bad.field_violations.add(field="truncated", description=f"{more} more")
            break
        bad.field_violations.append(added)
    return bad


def _page_token(error: RunRecoveryError) -> Any:
    return bad_request((FieldViolation("page_token", str(error)),))


def _cursor(error: RunRecoveryError) -> Any:
    return bad_request((FieldViolation("after_cursor", str(error)),))


def _engine(error: errors.UnknownEngine) -> Any:
    return bad_request((FieldViolation("engine", f"no engine {clip(error.engine, 80)!r}"),))


def _run(error: errors.RunNotFound | errors.RunAlreadyExists | errors.OutputRemoved) -> Any:
    return error_details_pb2.ResourceInfo(
        resource_type="runrecovery.v1.Run",
        resource_name=clip(error.run_id),
        description=clip(str(error)),
    )


def _reconciliation(error: errors.ReconciliationNotFound) -> Any:
    return error_details_pb2.ResourceInfo(
        resource_type="runrecovery.v1.Reconciliation",
        resource_name=clip(error.reconciliation_id),
        description=clip(str(error)),
    )


def _precondition(error: errors.Refused) -> Any:
    reason = Reason.Name(TABLE[type(error)].reason).removeprefix(_PREFIX)
    failed = error_details_pb2.PreconditionFailure()
    failed.violations.add(
        type=reason, subject=f"runs/{clip(error.run_id)}", description=clip(str(error))
    )
    return failed


def _pack_status(code: grpc.StatusCode, message: str, details: list[Any]) -> bytes:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    data: bytes = status.SerializeToString()
    return data


# -- the table ---------------------------------------------------------------------------------

_Code = grpc.StatusCode

TABLE: Final[Mapping[type[RunRecoveryError], ErrorMapping]] = MappingProxyType(
    {
        errors.RunNotFound: ErrorMapping(
            _Code.NOT_FOUND, Reason.ERROR_REASON_RUN_NOT_FOUND, (_run,)
        ),
        errors.RequestedRunRemoved: ErrorMapping(
            _Code.NOT_FOUND,
            Reason.ERROR_REASON_RUN_NOT_FOUND,
            metadata=lambda error: {"request_id": error.request_id},
        ),
        errors.OutputRemoved: ErrorMapping(
            _Code.NOT_FOUND, Reason.ERROR_REASON_OUTPUT_REMOVED, (_run,)
        ),
        errors.ReconciliationNotFound: ErrorMapping(
            _Code.NOT_FOUND, Reason.ERROR_REASON_RECONCILIATION_NOT_FOUND, (_reconciliation,)
        ),
        errors.InvalidFields: ErrorMapping(
            _Code.INVALID_ARGUMENT,
            Reason.ERROR_REASON_INVALID_FIELD,
            (lambda error: bad_request(error.violations),),
        ),
        errors.UnknownEngine: ErrorMapping(
            _Code.INVALID_ARGUMENT,
            Reason.ERROR_REASON_UNKNOWN_ENGINE,
            (_engine,),
            metadata=lambda error: {"known_engines": ",".join(error.known)},
        ),
        errors.PageTokenInvalid: ErrorMapping(
            _Code.INVALID_ARGUMENT, Reason.ERROR_REASON_PAGE_TOKEN_INVALID, (_page_token,)
        ),
        errors.PageTokenMismatch: ErrorMapping(
            _Code.INVALID_ARGUMENT, Reason.ERROR_REASON_PAGE_TOKEN_MISMATCH, (_page_token,)
        ),
        errors.RunAlreadyExists: ErrorMapping(
            _Code.ALREADY_EXISTS, Reason.ERROR_REASON_RUN_ALREADY_EXISTS, (_run,)
        ),
        errors.RequestIdReused: ErrorMapping(
            _Code.ALREADY_EXISTS,
            Reason.ERROR_REASON_REQUEST_ID_REUSED,
            metadata=lambda error: {"request_id": error.request_id},
        ),
        errors.RunNotWaiting: ErrorMapping(
            _Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RUN_NOT_WAITING, (_precondition,)
        ),
        errors.InteractionSuperseded: ErrorMapping(
            _Code.FAILED_PRECONDITION,
            Reason.ERROR_REASON_INTERACTION_SUPERSEDED,
            (_precondition,),
        ),
        errors.RunAlreadyTerminal: ErrorMapping(
            _Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RUN_ALREADY_TERMINAL, (_precondition,)
        ),
        errors.RunQuarantined: ErrorMapping(
            _Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RUN_QUARANTINED, (_precondition,)
        ),
        errors.RunOfAnotherInstance: ErrorMapping(
            _Code.FAILED_PRECONDITION,
            Reason.ERROR_REASON_RUN_OF_ANOTHER_INSTANCE,
            (_precondition,),
            metadata=lambda error: {"instance": error.instance},
        ),
        errors.EtagMismatch: ErrorMapping(
            _Code.ABORTED,
            Reason.ERROR_REASON_ETAG_MISMATCH,
            metadata=lambda error: {"current_etag": error.current_etag},
        ),
        errors.CallerUnknown: ErrorMapping(
            _Code.UNAUTHENTICATED, Reason.ERROR_REASON_CALLER_UNKNOWN
        ),
        errors.RoleNotSufficient: ErrorMapping(
            _Code.PERMISSION_DENIED,
            Reason.ERROR_REASON_ROLE_NOT_SUFFICIENT,
            metadata=lambda error: {"role": error.role, "needed_role": error.needed},
        ),
        errors.EngineNotAllowed: ErrorMapping(
            _Code.PERMISSION_DENIED,
            Reason.ERROR_REASON_ENGINE_NOT_ALLOWED,
            metadata=lambda error: {"engine": error.engine},
        ),
        errors.ReconciliationInProgress: ErrorMapping(
            _Code.UNAVAILABLE, Reason.ERROR_REASON_RECONCILIATION_IN_PROGRESS, (retry_info,)
        ),
        errors.ShuttingDown: ErrorMapping(
            _Code.UNAVAILABLE, Reason.ERROR_REASON_SHUTTING_DOWN, (retry_info,)
        ),
        errors.Fenced: ErrorMapping(
            _Code.UNAVAILABLE,
            Reason.ERROR_REASON_SHUTTING_DOWN,
            (retry_info,),
            message="this instance was superseded and is stopping",
        ),
        errors.CommitsLost: ErrorMapping(
            _Code.UNAVAILABLE,
            Reason.ERROR_REASON_SHUTTING_DOWN,
            (retry_info,),
            message="the database lost commits; this instance is stopping",
        ),
        errors.ClaimLost: ErrorMapping(
            _Code.UNAVAILABLE,
            Reason.ERROR_REASON_SHUTTING_DOWN,
            (retry_info,),
            message="the database lost this instance's claim; the instance is stopping",
        ),
        errors.RunGone: ErrorMapping(
            _Code.UNAVAILABLE,
            Reason.ERROR_REASON_SHUTTING_DOWN,
            (retry_info,),
            message="the database lost a commit; this instance is stopping",
        ),
        errors.SafeMode: ErrorMapping(
            _Code.UNAVAILABLE, Reason.ERROR_REASON_SAFE_MODE, (retry_info,)
        ),
        errors.StorageBusy: ErrorMapping(
            _Code.UNAVAILABLE, Reason.ERROR_REASON_STORAGE_BUSY, (retry_info,)
        ),
        errors.StorageUnavailable: ErrorMapping(
            _Code.UNAVAILABLE, Reason.ERROR_REASON_STORAGE_UNAVAILABLE, (retry_info,)
        ),
        errors.Overloaded: ErrorMapping(
            _Code.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_OVERLOADED, (retry_info,)
        ),
        errors.CallerOverloaded: ErrorMapping(
            _Code.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_CALLER_OVERLOADED, (retry_info,)
        ),
        errors.StorageFull: ErrorMapping(
            _Code.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_STORAGE_FULL, (retry_info,)
        ),
        errors.SlowReader: ErrorMapping(
            _Code.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_SLOW_READER, (retry_info,)
        ),
        errors.RunNotReopenable: ErrorMapping(
            _Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RUN_NOT_REOPENABLE, (_precondition,)
        ),
        errors.SessionNotResumable: ErrorMapping(
            _Code.FAILED_PRECONDITION, Reason.ERROR_REASON_SESSION_NOT_RESUMABLE, (_precondition,)
        ),
        errors.WatchCursorInvalid: ErrorMapping(
            _Code.INVALID_ARGUMENT, Reason.ERROR_REASON_WATCH_CURSOR_INVALID, (_cursor,)
        ),
        errors.WatchHistoryPruned: ErrorMapping(
            _Code.OUT_OF_RANGE,
            Reason.ERROR_REASON_WATCH_HISTORY_PRUNED,
            metadata=lambda error: {"oldest_sequence": str(error.oldest)},
        ),
        errors.WatchSequenceUnknown: ErrorMapping(
            _Code.OUT_OF_RANGE,
            Reason.ERROR_REASON_WATCH_SEQUENCE_UNKNOWN,
            metadata=lambda error: {"latest_sequence": str(error.latest)},
        ),
        errors.DecisionsPruned: ErrorMapping(
            _Code.OUT_OF_RANGE, Reason.ERROR_REASON_WATCH_HISTORY_PRUNED
        ),
        errors.OutputOutOfRange: ErrorMapping(
            _Code.OUT_OF_RANGE, Reason.ERROR_REASON_OUTPUT_OUT_OF_RANGE
        ),
    }
)
