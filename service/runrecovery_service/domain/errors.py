"""Every failure that a caller can get, one class each. `rpc/errors.py` maps them to gRPC codes.

The text that callers get is in `__str__` of each class. Texts about fields of a request are in
`rpc/validation.py`. The reason of a refusal is given where the error is raised.

RunRecoveryError
├── NotFound: RunNotFound, RequestedRunRemoved, ReconciliationNotFound, OutputRemoved
├── Invalid: InvalidFields, UnknownEngine, PageTokenInvalid, PageTokenMismatch,
│   WatchCursorInvalid
├── Conflict: RunAlreadyExists, RequestIdReused
├── Refused: RunNotWaiting, InteractionSuperseded, RunAlreadyTerminal, RunQuarantined,
│   RunOfAnotherInstance, RunNotReopenable, SessionNotResumable
├── EtagMismatch, CallerUnknown
├── Denied: RoleNotSufficient, EngineNotAllowed
├── NotNow: ReconciliationInProgress, ShuttingDown, SafeMode, StorageBusy, StorageUnavailable
├── Exhausted: Overloaded, CallerOverloaded, StorageFull, SlowReader
├── OutOfRange: OutputOutOfRange, WatchHistoryPruned, WatchSequenceUnknown
├── DecisionsPruned
└── Fenced
    └── CommitsLost: ClaimLost, RunGone

`start_errors.py` has the errors that end the service.
"""

from __future__ import annotations

from dataclasses import field
from datetime import datetime

from runrecovery_service.lazy_dataclass import dataclass


class RunRecoveryError(Exception):
    """Root of the tree. Subclasses carry fields. Their text is for people."""


class NotFound(RunRecoveryError):
    """The request names an object that does not exist."""


@dataclass(eq=False)
class RunNotFound(NotFound):
    """No run has this id."""

    run_id: str

    def __str__(self) -> str:
        return f"no run has the id {self.run_id!r}; retention may have removed it"


@dataclass(eq=False)
class RequestedRunRemoved(NotFound):
    """The request was carried out before, and the run that it created or changed was removed."""

    request_id: str

    def __str__(self) -> str:
        return (
            f"request_id {self.request_id} was carried out before, and retention has removed its"
            " run; use a new request_id"
        )


@dataclass(eq=False)
class ReconciliationNotFound(NotFound):
    """No reconciliation has this id."""

    reconciliation_id: str

    def __str__(self) -> str:
        wanted = self.reconciliation_id
        return f"no reconciliation has the id {wanted!r}; retention may have removed it"


@dataclass(eq=False)
class OutputRemoved(NotFound):
    """The output of the run was removed; the run itself is kept."""

    run_id: str

    def __str__(self) -> str:
        return f"retention has removed the output of run {self.run_id!r}"


class Invalid(RunRecoveryError):
    """The request is invalid, whatever the state of the service."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request: its path in the message, and what is wrong with it."""

    field: str
    description: str


@dataclass(eq=False)
class InvalidFields(Invalid):
    """The request has bad fields. `violations` lists all of them."""

    violations: tuple[FieldViolation, ...]

    def __str__(self) -> str:
        return "; ".join(f"{v.field}: {v.description}" for v in self.violations[:3])


@dataclass(eq=False)
class UnknownEngine(Invalid):
    """The configuration has no engine of this name."""

    engine: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        known = ", ".join(self.known) or "none"
        return f"no engine {self.engine!r} is configured; configured engines: {known}"


class PageTokenInvalid(Invalid):
    """This service did not issue the page token."""

    def __str__(self) -> str:
        return "this service did not issue the page token; start again without a page token"


class PageTokenMismatch(Invalid):
    """The page token was issued for another filter."""

    def __str__(self) -> str:
        return (
            "the page token was issued for another filter; repeat that filter, or start again"
            " without a page token"
        )


class WatchCursorInvalid(Invalid):
    """This service did not issue the cursor."""

    def __str__(self) -> str:
        return "this service did not issue the cursor; start again without a cursor"


class Conflict(RunRecoveryError):
    """An object with this name exists and is different."""


@dataclass(eq=False)
class RunAlreadyExists(Conflict):
    """Another CreateRun created a run with this id."""

    run_id: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} already exists; choose another id"


@dataclass(eq=False)
class RequestIdReused(Conflict):
    """The request_id was used before with another payload."""

    request_id: str

    def __str__(self) -> str:
        return (
            f"request_id {self.request_id} was already used with another payload; use a new"
            " request_id"
        )


@dataclass(eq=False)
class Refused(RunRecoveryError):
    """The state of the run does not allow the request."""

    run_id: str


class RunNotWaiting(Refused):
    """A reply was sent to a run that does not wait for one."""

    def __str__(self) -> str:
        return f"run {self.run_id!r} does not wait for a reply"


class InteractionSuperseded(Refused):
    """A reply named a question that is not the open one, or that already has another answer."""

    def __str__(self) -> str:
        return f"this question of run {self.run_id!r} is not open; read the run for the open one"


class RunAlreadyTerminal(Refused):
    """A cancel was sent to a run that had SUCCEEDED or FAILED."""

    def __str__(self) -> str:
        return f"run {self.run_id!r} has already ended"


class RunQuarantined(Refused):
    """The run's record is damaged. An operator has to repair it."""

    def __str__(self) -> str:
        return f"run {self.run_id!r} is quarantined: its record is damaged; ask the operator"


@dataclass(eq=False)
class RunOfAnotherInstance(Refused):
    """The run belongs to another instance on the same database, and only that one can change it."""

    instance: str

    def __str__(self) -> str:
        return (
            f"run {self.run_id!r} belongs to instance {self.instance!r}; send the request to that"
            " instance"
        )


@dataclass(eq=False)
class RunNotReopenable(Refused):
    """The run did not fail because of a lost session, or the time to reopen it has passed."""

    why: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} cannot be reopened: {self.why}"


@dataclass(eq=False)
class SessionNotResumable(Refused):
    """The session that the run would resume cannot be resumed."""

    why: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} cannot be resumed: {self.why}"


@dataclass(eq=False)
class EtagMismatch(RunRecoveryError):
    """The run changed after the caller had read it."""

    run_id: str
    current_etag: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} has changed since its etag was read; read the run again"


@dataclass(eq=False)
class CallerUnknown(RunRecoveryError):
    """The request has no valid token or certificate of a known caller. No text quotes a token."""

    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(eq=False)
class Denied(RunRecoveryError):
    """The caller is known, but has no right to do this."""

    caller: str


@dataclass(eq=False)
class RoleNotSufficient(Denied):
    """The caller's role does not include the role that the method needs."""

    role: str = field(kw_only=True)
    needed: str = field(kw_only=True)

    def __str__(self) -> str:
        return f"caller {self.caller!r} is a {self.role}; this call needs the role {self.needed}"


@dataclass(eq=False)
class EngineNotAllowed(Denied):
    """The caller has no right to create runs of this engine."""

    engine: str

    def __str__(self) -> str:
        return f"caller {self.caller!r} may not create runs of engine {self.engine!r}"


@dataclass(eq=False)
class NotNow(RunRecoveryError):
    """The service cannot answer yet, or no longer. Retry after `retry_after_s` seconds."""

    retry_after_s: float = field(default=1.0, kw_only=True)


class ReconciliationInProgress(NotNow):
    """The recovery of this start has not been committed yet."""

    def __str__(self) -> str:
        return "the service has not finished its recovery; retry later"


class ShuttingDown(NotNow):
    """The service is shutting down."""

    def __str__(self) -> str:
        return "the service is shutting down; retry later"


class SafeMode(NotNow):
    """The service is in safe mode: it launches no process, and therefore creates no run."""

    def __str__(self) -> str:
        return "the service is in safe mode and starts no runs; retry after its next restart"


@dataclass(eq=False)
class StorageBusy(NotNow):
    """Another connection holds the database's lock."""

    cause: str = "the database is busy; retry later"

    def __str__(self) -> str:
        return self.cause


@dataclass(eq=False)
class StorageUnavailable(NotNow):
    """The database does not answer, is damaged or is read-only."""

    cause: str = "the database does not answer; retry later"

    def __str__(self) -> str:
        return self.cause


@dataclass(eq=False)
class Exhausted(RunRecoveryError):
    """A limit is reached. Retry after `retry_after_s` seconds."""

    retry_after_s: float = field(default=1.0, kw_only=True)


class Overloaded(Exhausted):
    """The queue of runs, or the number of open calls, is at its limit."""

    def __str__(self) -> str:
        return "the service has reached its limit of queued runs or open calls; retry later"


@dataclass(eq=False)
class CallerOverloaded(Exhausted):
    """The caller has reached one of its own limits. `limit` names the limit."""

    caller: str
    limit: str = field(kw_only=True)

    def __str__(self) -> str:
        return f"caller {self.caller!r} has reached its limit of {self.limit}; retry later"


@dataclass(eq=False)
class StorageFull(Exhausted):
    """The disk of the database is full, or a disk has less room than `min_free_bytes`."""

    cause: str = "the disk of the database is full; retry later"

    def __str__(self) -> str:
        return self.cause


class SlowReader(Exhausted):
    """The client read a stream too slowly."""

    def __str__(self) -> str:
        return "the client read the stream too slowly; resume after the last event received"


@dataclass(eq=False)
class OutOfRange(RunRecoveryError):
    """The request asks for events or output that do not exist."""

    run_id: str


@dataclass(eq=False)
class WatchHistoryPruned(OutOfRange):
    """The next events of a watch have been deleted."""

    oldest: int

    def __str__(self) -> str:
        return (
            f"the events of run {self.run_id!r} before {self.oldest} have been deleted; resume"
            f" after {self.oldest - 1} or read the run"
        )


@dataclass(eq=False)
class WatchSequenceUnknown(OutOfRange):
    """A watch was asked to resume after an event that has not happened."""

    latest: int

    def __str__(self) -> str:
        return (
            f"the latest event of run {self.run_id!r} has the sequence {self.latest}; resume after"
            " that event at most"
        )


class DecisionsPruned(RunRecoveryError):
    """Decisions after the cursor of a watch have possibly been removed."""

    def __str__(self) -> str:
        return (
            "retention has removed the report of this cursor, and perhaps decisions after it; start"
            " again without a cursor, and list the recovered runs"
        )


@dataclass(eq=False)
class OutputOutOfRange(OutOfRange):
    """The attempt does not exist, or its output ends before the offset."""

    reason: str

    def __str__(self) -> str:
        return f"output of run {self.run_id!r}: {self.reason}"


def is_outage(error: BaseException) -> bool:
    """Return True for an expected failure of the database, its disk or a limit.

    Such a failure is logged without a traceback.
    """
    return isinstance(error, NotNow | Exhausted)


def error_facts(error: BaseException) -> dict[str, str]:
    """Return the log fields of an error: its class and, for an outage, its cause."""
    cause = {"cause": str(error)} if is_outage(error) else {}
    if isinstance(error, TimeoutError):  # has no text if a lock or a slow disk is the cause
        cause = {"cause": str(error) or "the database did not answer in time"}
    return {"error": type(error).__name__, **cause}


@dataclass(eq=False)
class Fenced(RunRecoveryError):
    """A newer epoch owns the row that this epoch wanted to write. The writer must stop."""

    what: str

    def __str__(self) -> str:
        return f"a newer epoch owns {self.what}"


@dataclass(eq=False)
class CommitsLost(Fenced):
    """The database lacks commits that it had acknowledged: a failover or a restored copy lost them.

    The state of this service in memory no longer agrees with the database.

    Attributes:
        since: the latest time whose commits are certainly there; None: not known.
        until: the time of the latest acknowledged commit.
    """

    what: str = "the database"
    since: datetime | None = None
    until: datetime | None = None

    def __str__(self) -> str:
        times = [
            f"{word} {time:%Y-%m-%d %H:%M:%S} UTC"
            for word, time in (("after", self.since), ("until", self.until))
            if time is not None
        ]
        return " ".join(["the database has lost commits that it acknowledged", *times])


@dataclass(eq=False)
class ClaimLost(CommitsLost):
    """The database has no record of this start of the service, nor of a newer one.

    A failover lost the record, or another instance name adopted the database.
    """

    def __str__(self) -> str:
        return f"the database no longer has this start's claim of {self.what}"


@dataclass(eq=False)
class RunGone(CommitsLost):
    """The database has no row of a run or launch that this service has committed.

    Commits were lost, for example by a failover to a standby that lagged behind. The integer key
    can belong to another run by now.
    """

    def __str__(self) -> str:
        return f"the database no longer has {self.what}; it lost a commit"
