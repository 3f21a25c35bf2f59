"""Every failure that a caller can meet, one class each. `rpc/errors.py` maps them to gRPC codes.

RunRecoveryError
├── NotFound: RunNotFound, ReconciliationNotFound
├── Invalid: InvalidFields, UnknownEngine, PageTokenInvalid, PageTokenMismatch,
│   WatchCursorInvalid
├── Conflict: RunAlreadyExists, RequestIdReused
├── Refused: RunNotWaiting, InteractionSuperseded, RunAlreadyTerminal, RunQuarantined,
│   RunOfAnotherInstance, RunNotReopenable, SessionNotResumable
├── EtagMismatch
├── NotNow: ReconciliationInProgress, ShuttingDown, SafeMode, StorageBusy, StorageUnavailable
├── Exhausted: Overloaded, StorageFull, SlowReader
├── OutOfRange: OutputOutOfRange, WatchHistoryPruned, WatchSequenceUnknown
└── Fenced: ClaimLost, RunGone
"""

from __future__ import annotations

from dataclasses import dataclass, field


class RunRecoveryError(Exception):
    """Root of the tree. Subclasses carry fields; their text is for people."""


class NotFound(RunRecoveryError):
    """Something that was named does not exist."""


@dataclass(eq=False)
class RunNotFound(NotFound):
    """No run has this id."""

    run_id: str

    def __str__(self) -> str:
        return f"no run {self.run_id!r}"


@dataclass(eq=False)
class ReconciliationNotFound(NotFound):
    """No reconciliation has this id."""

    reconciliation_id: str

    def __str__(self) -> str:
        return f"no reconciliation {self.reconciliation_id!r}"


class Invalid(RunRecoveryError):
    """The request is wrong whatever the state of the service."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request: its path in the message, and what is wrong."""

    field: str
    description: str


@dataclass(eq=False)
class InvalidFields(Invalid):
    """Fields of the request are bad; all of them are listed."""

    violations: tuple[FieldViolation, ...]

    def __str__(self) -> str:
        return "; ".join(f"{v.field}: {v.description}" for v in self.violations[:3])


@dataclass(eq=False)
class UnknownEngine(Invalid):
    """The configuration has no engine of this name."""

    engine: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        return f"no engine {self.engine!r}; known: {', '.join(self.known) or 'none'}"


class PageTokenInvalid(Invalid):
    """The page token was not made by this service."""

    def __str__(self) -> str:
        return "the page token was not made by this service"


class PageTokenMismatch(Invalid):
    """The page token was made for another filter."""

    def __str__(self) -> str:
        return "the page token belongs to another filter"


class WatchCursorInvalid(Invalid):
    """The cursor was not made by this service."""

    def __str__(self) -> str:
        return "the cursor was not made by this service"


class Conflict(RunRecoveryError):
    """Something with this name exists and is different."""


@dataclass(eq=False)
class RunAlreadyExists(Conflict):
    """Another CreateRun made a run with this id."""

    run_id: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} exists"


@dataclass(eq=False)
class RequestIdReused(Conflict):
    """The request_id was used before with another payload."""

    request_id: str

    def __str__(self) -> str:
        return f"request_id {self.request_id} was used with another payload"


@dataclass(eq=False)
class Refused(RunRecoveryError):
    """The run is not in a state that allows this."""

    run_id: str


class RunNotWaiting(Refused):
    """A reply came while the run does not wait for one."""

    def __str__(self) -> str:
        return f"run {self.run_id!r} does not wait for a reply"


class InteractionSuperseded(Refused):
    """A reply named a question that is not the open one, or was answered otherwise."""

    def __str__(self) -> str:
        return f"that question of run {self.run_id!r} is not open"


class RunAlreadyTerminal(Refused):
    """A cancel came after the run had SUCCEEDED or FAILED."""

    def __str__(self) -> str:
        return f"run {self.run_id!r} has ended"


class RunQuarantined(Refused):
    """The run's record is damaged and set aside for an operator."""

    def __str__(self) -> str:
        return f"run {self.run_id!r} is quarantined: its record is damaged"


@dataclass(eq=False)
class RunOfAnotherInstance(Refused):
    """The run belongs to another service on the same database, which alone can change it."""

    instance: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} belongs to instance {self.instance!r}; ask that service"


@dataclass(eq=False)
class RunNotReopenable(Refused):
    """The run did not fail for want of a session, or its window is over."""

    why: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} cannot be set back: {self.why}"


@dataclass(eq=False)
class SessionNotResumable(Refused):
    """What the run would be resumed by is not there."""

    why: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} cannot be resumed: {self.why}"


@dataclass(eq=False)
class EtagMismatch(RunRecoveryError):
    """The run changed since the caller saw it."""

    run_id: str
    current_etag: str

    def __str__(self) -> str:
        return f"run {self.run_id!r} has changed"


@dataclass(eq=False)
class NotNow(RunRecoveryError):
    """The service cannot answer yet or any more; try again after `retry_after_s` seconds."""

    retry_after_s: float = field(default=1.0, kw_only=True)


class ReconciliationInProgress(NotNow):
    """The recovery of this start has not committed."""

    def __str__(self) -> str:
        return "recovery has not finished"


class ShuttingDown(NotNow):
    """The service is ending."""

    def __str__(self) -> str:
        return "the service is shutting down"


class SafeMode(NotNow):
    """This start launches nothing, so that a new run would only wait to be failed."""

    def __str__(self) -> str:
        return "the service is in safe mode and starts no runs; the next restart may"


class StorageBusy(NotNow):
    """Somebody else holds the database's lock."""

    def __str__(self) -> str:
        return "the database is busy"


class StorageUnavailable(NotNow):
    """The database does not answer."""

    def __str__(self) -> str:
        return "the database does not answer"


@dataclass(eq=False)
class Exhausted(RunRecoveryError):
    """A limit is reached; try again after `retry_after_s` seconds."""

    retry_after_s: float = field(default=1.0, kw_only=True)


class Overloaded(Exhausted):
    """The queue of runs, or the number of calls under way, is at its limit."""

    def __str__(self) -> str:
        return "the service is at its limit"


class StorageFull(Exhausted):
    """The database's disk is full."""

    def __str__(self) -> str:
        return "the disk of the database is full"


class SlowReader(Exhausted):
    """The caller of a stream did not read it."""

    def __str__(self) -> str:
        return "the stream was not read for too long; resume it where you stand"


@dataclass(eq=False)
class OutOfRange(RunRecoveryError):
    """What was asked for lies outside of what there is."""

    run_id: str


@dataclass(eq=False)
class WatchHistoryPruned(OutOfRange):
    """The events that a watch would go on with are not kept any more."""

    oldest: int

    def __str__(self) -> str:
        return f"the events of run {self.run_id!r} before {self.oldest} are not kept any more"


@dataclass(eq=False)
class WatchSequenceUnknown(OutOfRange):
    """A watch would go on behind an event that has not happened."""

    latest: int

    def __str__(self) -> str:
        return f"run {self.run_id!r} has had {self.latest} events so far"


@dataclass(eq=False)
class OutputOutOfRange(OutOfRange):
    """The attempt was never made, or its output does not reach the offset."""

    reason: str

    def __str__(self) -> str:
        return f"output of run {self.run_id!r}: {self.reason}"


def is_outage(error: BaseException) -> bool:
    """True for what the database, its disk or a limit is known to do; a traceback tells no more."""
    return isinstance(error, NotNow | Exhausted)


@dataclass(eq=False)
class Fenced(RunRecoveryError):
    """A newer epoch owns what this one wanted to write; whoever meets it must stop."""

    what: str

    def __str__(self) -> str:
        return f"{self.what} belongs to a newer epoch"


@dataclass(eq=False)
class ClaimLost(Fenced):
    """The store does not have this start's claim any more, and no newer one: a failover lost it, or
    another instance name adopted the store."""

    def __str__(self) -> str:
        return f"the database does not have this start's claim of {self.what} any more"


@dataclass(eq=False)
class RunGone(Fenced):
    """A run, or its launch, that is followed is not in the store: commits of ours were lost, as in
    a failover to a standby that lagged behind. Another run may have its integer key."""

    def __str__(self) -> str:
        return f"{self.what} is not in the store any more; the database lost a commit"


class StartRefused(Exception):
    """The service will not start (or go on) like this. Not a gRPC error: nobody is served yet."""


@dataclass(eq=False)
class Held(StartRefused):
    """Another service holds the data directory, the database or the instance name."""

    what: str
    holder: str

    def __str__(self) -> str:
        return f"{self.what} is held by {self.holder}"


@dataclass(eq=False)
class DatabaseRefused(StartRefused):
    """The database is not one that this version may open; nothing in it was touched."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(eq=False)
class StoreLost(DatabaseRefused):
    """A file of the SQLite store was removed or replaced while the service used it."""

    copy: str | None = None

    def __str__(self) -> str:
        copy = f"a sound copy of the store is {self.copy}" if self.copy else "no copy could be made"
        return f"{super().__str__()}; {copy}"


class DatabaseOutOfReach(DatabaseRefused):
    """The database does not answer now; a later start may succeed."""


@dataclass(eq=False)
class BackupRefused(StartRefused):
    """The name for a backup is taken; nothing was touched."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place} {self.reason}"


@dataclass(eq=False)
class DataDirRefused(StartRefused):
    """The data directory cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(eq=False)
class LeaseLost(StartRefused):
    """The lease could not be renewed for so long that another service may soon take over."""

    instance: str
    seconds: float

    def __str__(self) -> str:
        return f"the lease of instance {self.instance!r} was not renewed for {self.seconds:g} s"


@dataclass(eq=False)
class ThreadsRefused(StartRefused):
    """The system gives this process no thread."""

    reason: str

    def __str__(self) -> str:
        return f"the system gives this process no more threads: {self.reason}"


@dataclass(eq=False)
class OpenFilesRefused(StartRefused):
    """The process may open too few files for what is configured."""

    limit: int
    needed: int
    max_concurrent: int

    def __str__(self) -> str:
        return (
            f"this process may open {self.limit} files (ulimit -n); max_concurrent ="
            f" {self.max_concurrent} needs at least {self.needed}"
        )


@dataclass(eq=False)
class RecoveryGaveUp(StartRefused):
    """Recovery failed as often as the configuration allows; nothing was served."""

    tries: int
    last_error: str

    def __str__(self) -> str:
        return f"recovery failed {self.tries} times, last with {self.last_error}"


@dataclass(eq=False)
class CgroupRefused(StartRefused):
    """The configured cgroup cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"cgroup_parent = {self.place!r}: {self.reason}"


@dataclass(eq=False)
class ContainmentRefused(StartRefused):
    """Processes cannot be contained here as the service, or its configuration, demands."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class RecoveryInterrupted(StartRefused):
    """The service was told to stop while it recovered; the next start goes on from there."""

    def __str__(self) -> str:
        return "recovery was interrupted by a stop"
