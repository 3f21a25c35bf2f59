"""Every failure that a call can end in, one class each.

RunRecoveryClientError
├── NotFound: RunNotFound, ReconciliationNotFound
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
├── DeadlineExceeded
├── InternalError
└── UnrecognizedError

The service names the case in a `google.rpc.ErrorInfo`; the class is chosen by its reason, and
by the gRPC code where there is none. The gRPC error stays as `__cause__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request: its path in the message, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """What the service said about a failure, beside its message.

    Attributes:
        code: the gRPC status code.
        reason: the ErrorReason without its prefix, for example `RUN_NOT_FOUND`; empty when the
            answer did not come from the service itself (no connection, a proxy, a deadline).
        metadata: facts that belong to the reason.
        violations: the bad fields of the request; the service sends at most 20.
        resource_name: the id that was not found.
        retry_after_s: seconds after which the service expects a new try to work; None if it
            did not say.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    resource_name: str = ""
    retry_after_s: float | None = None


_NO_DETAILS = ErrorDetails()


class RunRecoveryClientError(Exception):
    """Root of the tree: catch it to catch every failed call. Its text is for people only."""

    def __init__(self, message: str = "", *, details: ErrorDetails = _NO_DETAILS) -> None:
        super().__init__(message)
        self.details = details

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self.details.code

    @property
    def reason(self) -> str:
        """The service's own name for the case; empty when the service did not give one."""
        return self.details.reason

    @property
    def metadata(self) -> Mapping[str, str]:
        """Facts that belong to the reason, read-only."""
        return MappingProxyType(dict(self.details.metadata))


class NotFound(RunRecoveryClientError):
    """Something that the request named does not exist."""

    @property
    def resource_name(self) -> str:
        """The id that was not found; empty if the service did not repeat it."""
        return self.details.resource_name


class RunNotFound(NotFound):
    """No run has this id."""


class ReconciliationNotFound(NotFound):
    """No reconciliation has this id."""


class InvalidRequest(RunRecoveryClientError):
    """The request is wrong whatever the state of the service."""

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """Every bad field, at most 20; empty if the service named none."""
        return self.details.violations


class UnknownEngine(InvalidRequest):
    """The service has no engine of this name."""

    @property
    def known_engines(self) -> tuple[str, ...]:
        """The names that it has; empty if it did not say."""
        names = self.details.metadata.get("known_engines", "").split(",")
        return tuple(name.strip() for name in names if name.strip())


class PageTokenInvalid(InvalidRequest):
    """The page token was not made by this service, or for another filter."""


class WatchCursorInvalid(InvalidRequest):
    """`after_cursor` was not made by `recovery.watch_recovered` of this service.

    Watch anew without it; `recovery.recovered` tells what was decided meanwhile.
    """


class RunAlreadyExists(RunRecoveryClientError):
    """Another call has made a run with this id."""


class RequestIdReused(RunRecoveryClientError):
    """The request_id was used before with another payload."""


class RunNotWaiting(RunRecoveryClientError):
    """A reply came while the run does not wait for one."""


class InteractionSuperseded(RunRecoveryClientError):
    """A reply named a question that is not the open one, or that was answered otherwise."""


class RunAlreadyTerminal(RunRecoveryClientError):
    """A cancel came after the run had SUCCEEDED or FAILED."""


class RunQuarantined(RunRecoveryClientError):
    """The run's record is damaged and set aside for an operator; nothing will happen to it."""


class RunOfAnotherInstance(RunRecoveryClientError):
    """The run belongs to another service on the same database; send the call to that one."""

    @property
    def instance(self) -> str:
        """The name of that service; empty if this one did not say."""
        return self.details.metadata.get("instance", "")


class RunNotReopenable(RunRecoveryClientError):
    """A reopening came too late, or for a run that did not fail for want of its session."""


class SessionNotResumable(RunRecoveryClientError):
    """The run has no kept handle, or the engine's check refuses the handle."""


class EtagMismatch(RunRecoveryClientError):
    """The run has changed since the caller saw it. Get it again and decide anew."""

    @property
    def current_etag(self) -> str:
        """The run's etag now; empty if the service did not say."""
        return self.details.metadata.get("current_etag", "")


class OutputOutOfRange(RunRecoveryClientError):
    """The output does not reach as far as the offset, or no such attempt was made."""


class WatchHistoryPruned(RunRecoveryClientError):
    """The events after `after_sequence` are not kept any more.

    Watch anew without `after_sequence`: that begins with the run as it stands.
    """

    @property
    def oldest_sequence(self) -> int | None:
        """The first event that is kept; None if the service did not say."""
        return _number(self.details.metadata.get("oldest_sequence"))


class WatchSequenceUnknown(RunRecoveryClientError):
    """`after_sequence` is beyond the run's latest event: it is of another store, or an older one.

    Watch anew without `after_sequence`, and forget what you had seen.
    """

    @property
    def latest_sequence(self) -> int | None:
        """The latest event of the run; None if the service did not say."""
        return _number(self.details.metadata.get("latest_sequence"))


class WatchGap(RunRecoveryClientError):
    """A watch left out events, and again when it was reopened: a defect of the service."""


class Unavailable(RunRecoveryClientError):
    """The service cannot answer now: try again later. The client's own retries are used up.

    `reason` tells STORAGE_BUSY and STORAGE_UNAVAILABLE; it is empty when there is no connection.
    """

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the service expects a new try to work; None if it did not say."""
        return self.details.retry_after_s


class RecoveryInProgress(Unavailable):
    """The service has started and has not finished its recovery; `wait_until_ready` waits."""


class ShuttingDown(Unavailable):
    """The service is stopping."""


class SafeMode(Unavailable):
    """Earlier starts died while they recovered, so this one launches and takes no runs."""


class ResourceExhausted(RunRecoveryClientError):
    """Something is full or too large. Without a reason: an answer above `max_receive_bytes`."""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the service expects a new try to work; None if it did not say."""
        return self.details.retry_after_s


class Overloaded(ResourceExhausted):
    """The queue of runs, or the server, is full."""


class StorageFull(ResourceExhausted):
    """The disk of the service's database is full."""


class SlowReader(ResourceExhausted):
    """The caller did not read its stream for too long; the iterators of this client reopen it."""


class DeadlineExceeded(RunRecoveryClientError):
    """No answer came in time, and it is unknown whether the call took effect.

    `runs.create`, `runs.reply`, `runs.cancel` and `runs.reopen` can be called again safely with
    a `request_id` that was given the first time too.
    """


class InternalError(RunRecoveryClientError):
    """A defect of the service."""

    @property
    def error_id(self) -> str:
        """The id under which the service's log tells more; empty if it did not say."""
        return self.details.metadata.get("error_id", "")


class UnrecognizedError(RunRecoveryClientError):
    """Anything else: a newer service's reason, a proxy's refusal. See `code` and `reason`."""


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
