"""Runs with their questions, sessions, events and errors. Times are aware UTC datetimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime
from enum import StrEnum
from typing import Generic, TypeAlias, TypeVar

from runrecovery_service.domain.usage import UNLIMITED, Budget, Usage
from runrecovery_service.lazy_dataclass import dataclass

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]

T = TypeVar("T")


class RunStatus(StrEnum):
    """The status of a run."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    WAITING_USER = "WAITING_USER"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"

    @property
    def is_terminal(self) -> bool:
        """True if the status is final, so that no other status follows."""
        return self in TERMINAL


TERMINAL = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELED})


class Profile(StrEnum):
    """How a run waits for its user. It is fixed before the first turn."""

    RESUMABLE = "RESUMABLE"
    STICKY_PROCESS = "STICKY_PROCESS"


class RestartPolicy(StrEnum):
    """What a restart does with a QUEUED or RUNNING run."""

    FAIL = "FAIL"
    REQUEUE = "REQUEUE"
    RESUME = "RESUME"


class RecoveryState(StrEnum):
    """The latest decision of a restart on a run."""

    NONE = "NONE"
    RECOVERED_WAITING = "RECOVERED_WAITING"
    FAILED_RECONCILED = "FAILED_RECONCILED"
    RECOVERED_QUEUED = "RECOVERED_QUEUED"
    CANCELED_RECONCILED = "CANCELED_RECONCILED"
    QUARANTINED = "QUARANTINED"
    REOPENED = "REOPENED"
    SUCCEEDED_RECONCILED = "SUCCEEDED_RECONCILED"


class InteractionKind(StrEnum):
    """The kind of answer that a question asks for. The values are those of the engine protocol."""

    OPEN_TEXT = "open_text"
    CHOOSE_ONE = "choose_one"
    CONFIRM = "confirm"
    FILL_FIELDS = "fill_fields"
    RISK_ACK = "risk_ack"


class InteractionState(StrEnum):
    """The state of a question."""

    OPEN = "OPEN"
    """The question was asked and has no answer."""
    ANSWERED = "ANSWERED"
    """An answer was accepted but not delivered to a process yet."""
    DELIVERED = "DELIVERED"
    """A process received the answer."""
    CLOSED = "CLOSED"
    """The run ended or started again before an answer was accepted or delivered."""


class RunEventKind(StrEnum):
    """The kind of an event of a run."""

    CREATED = "CREATED"
    STARTED = "STARTED"
    ASKED = "ASKED"
    ANSWERED = "ANSWERED"
    AUTO_DECIDED = "AUTO_DECIDED"
    QUEUED = "QUEUED"
    CANCEL_REQUESTED = "CANCEL_REQUESTED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    RECOVERED = "RECOVERED"
    REOPENED = "REOPENED"
    RETRYING = "RETRYING"


class ErrorCode(StrEnum):
    """Why a run FAILED. Later versions add codes, so callers must accept codes they do not know."""

    SESSION_RESUME_FAILED = "SESSION_RESUME_FAILED"
    INTERACTION_PROCESS_LOST = "INTERACTION_PROCESS_LOST"
    ORCHESTRATOR_RESTART_INTERRUPTED = "ORCHESTRATOR_RESTART_INTERRUPTED"
    INTERACTION_WAIT_TIMEOUT = "INTERACTION_WAIT_TIMEOUT"
    REPLY_NOT_DELIVERED = "REPLY_NOT_DELIVERED"
    RUN_TIMEOUT = "RUN_TIMEOUT"
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"
    SUPERVISION_LOST = "SUPERVISION_LOST"
    ENGINE_FAILED = "ENGINE_FAILED"
    ENGINE_PROTOCOL_ERROR = "ENGINE_PROTOCOL_ERROR"
    ENGINE_UNAUTHENTICATED = "ENGINE_UNAUTHENTICATED"
    LAUNCH_FAILED = "LAUNCH_FAILED"
    INTERNAL_ERROR = "INTERNAL_ERROR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One answer that a question offers."""

    label: str
    value: JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool by an agent, for which a permission question asks.

    Attributes:
        id: the agent CLI's id of the call.
        input: the arguments of the call.
        workspace: the absolute path of the folder in which the agent works.
        pattern: the pattern of the engine's `ask_for` that the call matches.
        is_last: whether no other call followed it in the agent's message. If so, the CLI can
            return to the call and show its result to the model.
    """

    id: str
    tool: str
    input: JsonObject
    workspace: str
    pattern: str
    is_last: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of an engine to its user. `tool_call`: the call that the question is about."""

    kind: InteractionKind
    prompt: str
    options: tuple[Option, ...] = ()
    tool_call: ToolCall | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """A question of a run, with its state and answer.

    `interaction_id` counts the run's questions from 1. `kind` is None if the stored one is unknown.
    `response` is valid only if `replied_at` is set. `wait_deadline_at` is the end of the wait, or
    None if the question waits for ever. `auto_decided`: whether the service answered null, because
    no answer came in time. `tool_call` is the call that the question asks permission for, or None
    for another question. `replied_by` is the caller that answered, or None if no caller answered or
    no callers are configured.
    """

    interaction_id: int
    kind: InteractionKind | None
    prompt: str
    options: tuple[Option, ...]
    state: InteractionState
    asked_at: datetime
    replied_at: datetime | None
    response: JsonValue
    wait_deadline_at: datetime | None = None
    auto_decided: bool = False
    tool_call: ToolCall | None = None
    replied_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The agent's own conversation. The handle resumes it and is a secret: never log or send it."""

    type: str
    handle: str
    turn: int

    def __repr__(self) -> str:
        return f"Session(type={self.type!r}, handle=<secret>, turn={self.turn})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunError:
    """Why a run FAILED: a stable code and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryInfo:
    """The decision of a restart on a run. `status_before` is None if it could not be read."""

    recovery_state: RecoveryState
    recovered_at: datetime
    recovery_reason: str
    status_before: RunStatus | None
    status_after: RunStatus | None
    error_code: str | None
    reconciliation_id: str
    instance: str
    epoch: int
    recovery_count: int
    processes_ended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of an engine for one request, as stored.

    Attributes:
        key: the row's integer key. It is internal and never sent to a caller.
        status, profile: None if the stored value is unknown.
        attempt: how often the run was started from the beginning; 0 before the first launch.
        turn: the number of processes in this attempt; 0 before the first launch.
        owner_epoch: the only epoch that is allowed to write the row.
        version: a number that rises with every change. The etag contains it.
        event_count: the sequence of the latest event.
        session_timeout_s: how long a question waits. None: the engine's setting decides.
        max_run_s: the time limit of the whole run, in seconds. None: no limit.
        max_resumes: how often one interrupted turn can be resumed; 0: never.
        resume_count: how often the latest turn was resumed.
        resume_at: the earliest time of the next launch. None: at once.
        usage: the usage of all its turns so far; None until the first report.
        budget: the limits on `usage`.
        input: the input of the run; None: the view omits the input.
        traceparent: the trace of the call that created the run. None: the call named none.
        created_by, canceled_by: the callers that created and canceled the run. None: not
            canceled, or no callers are configured.
    """

    key: int
    run_id: str
    engine: str
    labels: dict[str, str]
    status: RunStatus | None
    profile: Profile | None
    restart_policy: RestartPolicy
    max_attempts: int
    session_timeout_s: float | None = None
    require_user_reply: bool = True
    max_run_s: float | None = None
    input: JsonObject | None
    output: JsonObject | None
    error: RunError | None
    pending: Interaction | None
    session: Session | None
    interaction_count: int
    auto_decided_count: int = 0
    attempt: int
    turn: int
    cancel_requested: bool
    recovery: RecoveryInfo | None
    owner: str
    owner_epoch: int
    version: int
    event_count: int = 1
    created_at: datetime
    started_at: datetime | None
    updated_at: datetime
    ended_at: datetime | None
    run_deadline_at: datetime | None = None
    reopenable_until: datetime | None = None
    max_resumes: int = 0
    resume_count: int = 0
    resume_at: datetime | None = None
    usage: Usage | None = None
    budget: Budget = UNLIMITED
    created_by: str | None = None
    canceled_by: str | None = None
    traceparent: str | None = None

    @property
    def holds_slot(self) -> bool:
        """True while the run has a process, which works or waits for a reply."""
        return self.status is RunStatus.RUNNING or (
            self.status is RunStatus.WAITING_USER and self.profile is Profile.STICKY_PROCESS
        )

    @property
    def quarantined(self) -> bool:
        """True if a recovery quarantined the run because its record is damaged."""
        return (
            self.recovery is not None and self.recovery.recovery_state is RecoveryState.QUARANTINED
        )

    @property
    def etag(self) -> str:
        """A value that changes with every change of the run."""
        return f"{self.key:x}-{self.version:x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """The run that CreateRun records. The attributes are those of `Run`."""

    run_id: str
    engine: str
    labels: dict[str, str]
    profile: Profile
    restart_policy: RestartPolicy
    max_attempts: int
    session_timeout_s: float | None = None
    require_user_reply: bool = True
    max_run_s: float | None = None
    max_resumes: int = 0
    budget: Budget = UNLIMITED
    input: JsonObject
    created_by: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """One event of a run.

    Attributes:
        sequence: counts the run's events from 1 without a gap.
        kind, status: None if the stored value is unknown.
        interaction_id: the question of the event; 0: none.
        recovery: the decision, for RECOVERED and REOPENED.
        usage: the usage of the turn that ended with the event. None: no turn ended, or its agent
            reported none.
        message: the text that the agent reported, for RETRYING.
        caller: the caller that caused the event. None: no caller caused it, or no callers are
            configured.
    """

    sequence: int
    kind: RunEventKind | None
    happened_at: datetime
    status: RunStatus | None
    attempt: int
    interaction_id: int
    error_code: str | None
    recovery: RecoveryInfo | None = None
    usage: Usage | None = None
    message: str = ""
    caller: str | None = None


class View(StrEnum):
    """Selects the parts of a run to read."""

    BASIC = "BASIC"
    """Everything but input, output, and the question's prompt and options."""
    FULL = "FULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Selects runs: after <= created_at < before. Empty fields do not filter.

    `engines` are the engines whose runs the caller is allowed to see; None: all.
    """

    engines: frozenset[str] | None = None
    statuses: frozenset[RunStatus] = frozenset()
    engine: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    after: datetime | None = None
    before: datetime | None = None

    @property
    def engines_listed(self) -> tuple[str, ...] | None:
        """The engines whose runs are listed. Empty: no runs; None: the runs of all engines."""
        if self.engine is None:
            return None if self.engines is None else tuple(sorted(self.engines))
        return (self.engine,) if self.engines is None or self.engine in self.engines else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Rows of one page, and the key after which the next page begins; None on the last page."""

    rows: tuple[T, ...]
    after: tuple[int, ...] | None
