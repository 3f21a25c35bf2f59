"""The words of the product as types. Times are aware UTC datetimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, TypeAlias, TypeVar

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]

T = TypeVar("T")


class RunStatus(StrEnum):
    """Where a run stands."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    WAITING_USER = "WAITING_USER"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"

    @property
    def is_terminal(self) -> bool:
        """True when no later status is possible."""
        return self in TERMINAL


TERMINAL = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELED})


class Profile(StrEnum):
    """How a run waits for its user; fixed before its first turn."""

    RESUMABLE = "RESUMABLE"
    STICKY_PROCESS = "STICKY_PROCESS"


class RestartPolicy(StrEnum):
    """What a restart does with a run that it finds QUEUED or RUNNING."""

    FAIL = "FAIL"
    REQUEUE = "REQUEUE"


class RecoveryState(StrEnum):
    """What the last restart that concerned a run decided for it."""

    NONE = "NONE"
    RECOVERED_WAITING = "RECOVERED_WAITING"
    FAILED_RECONCILED = "FAILED_RECONCILED"
    RECOVERED_QUEUED = "RECOVERED_QUEUED"
    CANCELED_RECONCILED = "CANCELED_RECONCILED"
    QUARANTINED = "QUARANTINED"
    REOPENED = "REOPENED"


class InteractionKind(StrEnum):
    """What a question asks for; the values are the words of the engine protocol."""

    OPEN_TEXT = "open_text"
    CHOOSE_ONE = "choose_one"
    CONFIRM = "confirm"
    FILL_FIELDS = "fill_fields"
    RISK_ACK = "risk_ack"


class InteractionState(StrEnum):
    """What became of a question."""

    OPEN = "OPEN"
    """Asked; nobody has answered."""
    ANSWERED = "ANSWERED"
    """An answer was accepted and has not been given to a process yet."""
    DELIVERED = "DELIVERED"
    """A process got the answer."""
    CLOSED = "CLOSED"
    """The run ended, or started again, before it was answered or the answer delivered."""


class RunEventKind(StrEnum):
    """What happened to a run."""

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


class ErrorCode(StrEnum):
    """Why a run FAILED. An open set: callers must accept codes that they do not know."""

    SESSION_RESUME_FAILED = "SESSION_RESUME_FAILED"
    INTERACTION_PROCESS_LOST = "INTERACTION_PROCESS_LOST"
    ORCHESTRATOR_RESTART_INTERRUPTED = "ORCHESTRATOR_RESTART_INTERRUPTED"
    INTERACTION_WAIT_TIMEOUT = "INTERACTION_WAIT_TIMEOUT"
    REPLY_NOT_DELIVERED = "REPLY_NOT_DELIVERED"
    RUN_TIMEOUT = "RUN_TIMEOUT"
    SUPERVISION_LOST = "SUPERVISION_LOST"
    ENGINE_FAILED = "ENGINE_FAILED"
    ENGINE_PROTOCOL_ERROR = "ENGINE_PROTOCOL_ERROR"
    LAUNCH_FAILED = "LAUNCH_FAILED"
    INTERNAL_ERROR = "INTERNAL_ERROR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One answer that a question offers."""

    label: str
    value: JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What an engine asks its user."""

    kind: InteractionKind
    prompt: str
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """A question of a run and what became of it.

    `interaction_id` counts the run's questions from 1. `kind` is None when the stored one is
    unknown. `response` means something only while `replied_at` is set. `wait_deadline_at` is when
    it will have waited long enough; None where the wait has no end. `auto_decided`: nobody had
    answered by then, and the service did, with null.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What an engine needs to resume a conversation. `handle` is a secret: never log or send it."""

    type: str
    handle: str
    turn: int

    def __repr__(self) -> str:
        return f"Session(type={self.type!r}, handle=<secret>, turn={self.turn})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunError:
    """Why a run FAILED: a stable code, and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryInfo:
    """What a restart decided for a run. `status_before` is None when it could not be read."""

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

    `key` is the row's integer key: internal, never on the wire. `status` and `profile` are None
    when the stored word is unknown. `attempt` counts starts from the beginning, `turn` the
    processes within the attempt; both are 0 before the first launch. `owner_epoch` fences: only
    the epoch on the row may write it. `version` rises with every change; the etag is made of it.
    `event_count` is the sequence of its latest event. `session_timeout_s` is how long a question
    waits, None where only its engine says it; `max_run_s` what the whole run may take, None
    without a limit. `input` is None where the view leaves it out.
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

    @property
    def holds_slot(self) -> bool:
        """True while the run occupies a slot: it runs, or its process lives through the wait."""
        return self.status is RunStatus.RUNNING or (
            self.status is RunStatus.WAITING_USER and self.profile is Profile.STICKY_PROCESS
        )

    @property
    def quarantined(self) -> bool:
        """True when a recovery set the run aside because its record is damaged."""
        return (
            self.recovery is not None and self.recovery.recovery_state is RecoveryState.QUARANTINED
        )

    @property
    def etag(self) -> str:
        """Changes with every change of the run's own state."""
        return f"{self.key:x}-{self.version:x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """What CreateRun records; the spans as in `Run`."""

    run_id: str
    engine: str
    labels: dict[str, str]
    profile: Profile
    restart_policy: RestartPolicy
    max_attempts: int
    session_timeout_s: float | None = None
    require_user_reply: bool = True
    max_run_s: float | None = None
    input: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """One event of a run. `sequence` counts the run's events from 1 without a gap; `kind` and
    `status` are None when the stored word is unknown; `interaction_id` is 0 when it is about no
    question; `recovery` is the decision, of RECOVERED and REOPENED."""

    sequence: int
    kind: RunEventKind | None
    happened_at: datetime
    status: RunStatus | None
    attempt: int
    interaction_id: int
    error_code: str | None
    recovery: RecoveryInfo | None = None


class View(StrEnum):
    """How much of a run is read."""

    BASIC = "BASIC"
    """Without input, output, and the question's prompt and options."""
    FULL = "FULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs to list; empty fields do not filter. Times: after <= t < before."""

    statuses: frozenset[RunStatus] = frozenset()
    engine: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    after: datetime | None = None
    before: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Rows of one page and the key to go on after; `after` is None on the last page."""

    rows: tuple[T, ...]
    after: tuple[int, ...] | None
