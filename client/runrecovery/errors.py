"""The errors of failed calls, one class each.

RunRecoveryClientError
├── NotFound: RunNotFound, OutputRemoved, ReconciliationNotFound
├── InvalidRequest: UnknownEngine, PageTokenInvalid, WatchCursorInvalid
├── RunAlreadyExists
├── RequestIdReused
├── RunNotWaiting
├── InteractionSuperseded
├── RunAlreadyTerminal
├── RunQuarantined
├── RunOfAnotherInstance
├── RunNotReopenable
├── SessionNotResumable
├── EtagMismatch
├── OutputOutOfRange
├── WatchHistoryPruned
├── WatchSequenceUnknown
├── WatchGap
├── Unavailable: RecoveryInProgress, ShuttingDown, SafeMode
├── ResourceExhausted: Overloaded, StorageFull, SlowReader
├── Unauthenticated: TokenUnusable
├── PermissionDenied
├── DeadlineExceeded
├── InternalError
└── UnrecognizedError

The service names the reason in a `google.rpc.ErrorInfo`. The class depends on that reason, or on
the gRPC code if there is no reason. The gRPC error is the `__cause__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field of a request: its path in the message, and the problem."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """Details of a failure, besides its message.

    Attributes:
        code: the gRPC status code.
        reason: the ErrorReason without its prefix, for example `RUN_NOT_FOUND`; empty when the
            error does not come from the service (no connection, a proxy, a deadline).
        metadata: values that belong to the reason.
        violations: the invalid fields of the request; the service sends at most 20.
        resource_name: the id that was not found.
        retry_after_s: seconds after which a retry may succeed; None if the service did not say.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    resource_name: str = ""
    retry_after_s: float | None = None


_NO_DETAILS = ErrorDetails()


class RunRecoveryClientError(Exception):
    """Base class of all errors of failed calls. Its text is for people only."""

    def __init__(self, message: str = "", *, details: ErrorDetails = _NO_DETAILS) -> None:
        super().__init__(message)
        self.details = details

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self.details.code

    @property
    def reason(self) -> str:
        """The service's name of the reason; empty when the service did not give one."""
        return self.details.reason

    @property
    def metadata(self) -> Mapping[str, str]:
        """Values that belong to the reason, read-only."""
        return MappingProxyType(dict(self.details.metadata))


class NotFound(RunRecoveryClientError):
    """The run, report or name in the request does not exist."""

    @property
    def resource_name(self) -> str:
        """The id that was not found; empty if the service did not name it."""
        return self.details.resource_name


class RunNotFound(NotFound):
    """No run has this id."""


class OutputRemoved(NotFound):
    """The run is kept, and its output was removed because of its age."""


class ReconciliationNotFound(NotFound):
    """No reconciliation has this id."""


class InvalidRequest(RunRecoveryClientError):
    """The request is invalid in every state of the service."""

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """The invalid fields, at most 20; empty if the service named none."""
        return self.details.violations


class UnknownEngine(InvalidRequest):
    """The service has no engine with this name."""

    @property
    def known_engines(self) -> tuple[str, ...]:
        """The names of its engines; empty if the service did not name them."""
        names = self.details.metadata.get("known_engines", "").split(",")
        return tuple(name.strip() for name in names if name.strip())


class PageTokenInvalid(InvalidRequest):
    """The page token does not come from this service, or belongs to another filter."""


class WatchCursorInvalid(InvalidRequest):
    """`after_cursor` does not come from `recovery.watch_recovered` of this service.

    Start a new watch without a cursor; `recovery.recovered` lists the decisions in between.
    """


class RunAlreadyExists(RunRecoveryClientError):
    """Another call has created a run with this id."""


class RequestIdReused(RunRecoveryClientError):
    """An earlier request with this request_id had another payload."""


class RunNotWaiting(RunRecoveryClientError):
    """The run is not waiting for a reply."""


class InteractionSuperseded(RunRecoveryClientError):
    """The question is not the open one, or has another answer."""


class RunAlreadyTerminal(RunRecoveryClientError):
    """The run has SUCCEEDED or FAILED, so it cannot be canceled."""


class RunQuarantined(RunRecoveryClientError):
    """The run's record is damaged; the run is quarantined for an operator."""


class RunOfAnotherInstance(RunRecoveryClientError):
    """Only another instance on the same database can answer, for example with output files."""

    @property
    def instance(self) -> str:
        """The name of that instance; empty if the service did not name it."""
        return self.details.metadata.get("instance", "")


class RunNotReopenable(RunRecoveryClientError):
    """The time to reopen the run is over, or its failure had another cause than a lost session."""


class SessionNotResumable(RunRecoveryClientError):
    """The run has no stored handle, or the session check found the session lost."""


class EtagMismatch(RunRecoveryClientError):
    """The run has changed since the caller read it. Read it again, then decide."""

    @property
    def current_etag(self) -> str:
        """The run's present etag; empty if the service did not name it."""
        return self.details.metadata.get("current_etag", "")


class OutputOutOfRange(RunRecoveryClientError):
    """The output ends before the offset, or the run has no such attempt."""


class WatchHistoryPruned(RunRecoveryClientError):
    """Events after `after_sequence` have been deleted.

    Start a new watch without `after_sequence`; it begins with a snapshot of the run. From
    `watch_recovered`: the report of the cursor was removed. Start without a cursor.
    """

    @property
    def oldest_sequence(self) -> int | None:
        """The sequence of the oldest event left; None if the service did not name it."""
        return _number(self.details.metadata.get("oldest_sequence"))


class WatchSequenceUnknown(RunRecoveryClientError):
    """`after_sequence` is greater than the sequence of the run's latest event.

    The sequence is of another database, or the database was restored from a backup. Start a new
    watch without `after_sequence`, and discard the events that you have.
    """

    @property
    def latest_sequence(self) -> int | None:
        """The sequence of the run's latest event; None if the service did not name it."""
        return _number(self.details.metadata.get("latest_sequence"))


class WatchGap(RunRecoveryClientError):
    """A watch omitted events, also after it was reopened: a defect of the service."""


class Unavailable(RunRecoveryClientError):
    """The service cannot answer now; retry later. The client has already retried.

    `reason` is STORAGE_BUSY or STORAGE_UNAVAILABLE, or empty when there is no connection.
    """

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which a retry may succeed; None if the service did not say."""
        return self.details.retry_after_s


class RecoveryInProgress(Unavailable):
    """The service has not finished its recovery yet; `wait_until_ready` waits for it."""


class ShuttingDown(Unavailable):
    """The service is stopping."""


class SafeMode(Unavailable):
    """The service is in safe mode after repeated unfinished recoveries: it accepts no new runs."""


class ResourceExhausted(RunRecoveryClientError):
    """A limit is reached. Without a reason: a response larger than `max_receive_bytes`."""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which a retry may succeed; None if the service did not say."""
        return self.details.retry_after_s


class Overloaded(ResourceExhausted):
    """Too many runs are queued, or too many calls or streams are open, perhaps of this caller."""


class StorageFull(ResourceExhausted):
    """The disk of the service's database is full, or has less room than its `min_free_bytes`."""


class SlowReader(ResourceExhausted):
    """The caller read its stream too slowly. The iterators of this client resume the stream."""


class Unauthenticated(RunRecoveryClientError):
    """The service knows neither the token nor the certificate of this caller."""


class PermissionDenied(RunRecoveryClientError):
    """The caller's role, or its engines, do not allow the call."""

    @property
    def needed_role(self) -> str:
        """The role that the call needs; empty if the role is not the reason."""
        return self.details.metadata.get("needed_role", "")


class TokenUnusable(Unauthenticated):
    """The `token_file` cannot be read, or holds no token. Nothing was sent."""


class DeadlineExceeded(RunRecoveryClientError):
    """No response arrived in time. It is unknown whether the call took effect.

    `runs.create`, `runs.reply`, `runs.cancel` and `runs.reopen` can be repeated safely with the
    `request_id` of the first call.
    """


class InternalError(RunRecoveryClientError):
    """A defect of the service."""

    @property
    def error_id(self) -> str:
        """The id of the details in the service's log; empty if the service did not name it."""
        return self.details.metadata.get("error_id", "")


class UnrecognizedError(RunRecoveryClientError):
    """Any other error, from a newer service or a proxy. See `code` and `reason`."""


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
