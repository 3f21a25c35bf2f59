"""The state of a turn under way, and how each event changes it. Pure: no I/O, no clock.

`advance` takes the state and one event. It returns the next state, and the action that the
supervisor must carry out before the next event. `tests/execution/test_turn_state.py` has a table of
states and events.
"""

from __future__ import annotations

from dataclasses import field, replace
from enum import Enum, auto
from typing import Final, TypeAlias

from runrecovery_service.domain.run import ErrorCode, Profile, Question, RunError
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.domain.turn import Asked, Succeeded, TurnFacts
from runrecovery_service.domain.usage import UNLIMITED, Budget, TurnUsage, Usage
from runrecovery_service.engines.dialect import (
    AskMessage,
    Message,
    ProgressMessage,
    ResultMessage,
    RetryMessage,
    SessionMessage,
    UnknownMessage,
    UsageMessage,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.shim_events import (
    Empty,
    EndsItself,
    Exited,
    Gated,
    NotStarted,
    ShimEvent,
    Started,
)

LAST_OUTPUT_S: Final = 1.0
"""How long the output of a process is still read after its exit, while a child keeps it open."""
USAGE_RECORDED_EVERY_S: Final = 5.0
"""Time between two records of a running turn's usage. The first usage after the turn's question or
result is recorded at once, because the exit of an agent CLI can take seconds."""
RETRIES_RECORDED: Final = 20
"""How many retries of one turn become events of the run."""
UNKNOWN_TYPES: Final = 100
"""How many unknown message types of one turn are remembered, to log each only once."""
UNAUTHENTICATED: Final = "The model refuses the agent's credentials, but the agent tries again:"
SECOND_END: Final = "The agent gave a second, different result or question."
ASKED_WITHOUT_SESSION: Final = "The agent asked without having named a session to resume."
ASKED_WHILE_WAITING: Final = "The agent asked while its last question was open."
RESULT_WHILE_WAITING: Final = "The agent gave its result while its question was open."
SUSPENDED: Final = (
    "The service was suspended for longer than its lease, so that the run's processes were ended."
)


# -- events ------------------------------------------------------------------------------------


class Signal(Enum):
    """Events without content."""

    STDOUT_ENDED = auto()
    STDERR_ENDED = auto()
    SHIM_GONE = auto()
    """The shim has closed its pipe for reports."""
    SHIM_USELESS = auto()
    """The shim was found stopped or gone, although its pipe for reports is still open."""
    CANCELED = auto()
    """A cancel was accepted."""
    REPLY_LOST = auto()
    """The process closed its input before it had read the reply."""
    REPLY_ACCEPTED = auto()
    """The open question of a sticky process has its reply, which is about to be written."""
    USAGE_DUE = auto()
    """It is time to record the latest reported usage."""
    OUTPUT_UNREAD = auto()
    """The process should have ended, but its output is not completely read and parsed yet."""


@dataclass(frozen=True, slots=True)
class ProtocolBroken:
    """The agent broke the protocol. `how` is the explanation, one sentence."""

    how: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """A deadline of the run has passed."""

    kind: DueKind


@dataclass(frozen=True, slots=True)
class LineRead:
    """The agent printed a line. `at_work`: see `engines.dialect.Heard`."""

    at_work: bool | None


TurnEvent: TypeAlias = "Message | ShimEvent | Signal | ProtocolBroken | DeadlinePassed | LineRead"


# -- actions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordSession:
    """Record the session handle, which is a secret."""

    handle: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RecordQuestion:
    """Record the question of a sticky process, which keeps running."""

    question: Question


@dataclass(frozen=True, slots=True)
class CompareEnds:
    """Compare two results or questions; the protocol is broken if they differ (SECOND_END)."""

    first: Asked | Succeeded
    second: Asked | Succeeded


@dataclass(frozen=True, slots=True)
class RecordUsage:
    """Record the usage of the turn so far."""

    used: TurnUsage


@dataclass(frozen=True, slots=True)
class RecordRetry:
    """Record, as an event of the run, that the agent is waiting to call its model again."""

    message: str


@dataclass(frozen=True, slots=True)
class ReportUnknown:
    """Log a message of an unknown type, or a message that `problem` makes unusable."""

    type: str
    problem: str = ""


Action: TypeAlias = (
    RecordSession | RecordQuestion | CompareEnds | RecordUsage | RecordRetry | ReportUnknown
)


# -- state -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRules:
    """The inputs of `advance` that do not change during a turn.

    Attributes:
        profile: how the run waits for a reply; None: a profile that only a newer version knows.
        resumes: whether the process resumes a recorded session.
        ends_once: whether a second, different result or question breaks the protocol.
        exit_grace_s: the key `exit_grace_s` of `config/settings.py`.
        budget: the limits on the usage of the run.
        used_before: the usage of the run before this turn.
    """

    profile: Profile | None
    resumes: bool
    ends_once: bool
    exit_grace_s: float
    budget: Budget = UNLIMITED
    used_before: Usage | None = None

    def why_used_up(self, used: TurnUsage | None) -> str | None:
        """Return which limit of the run this usage of the turn has reached, or None."""
        return self.budget.why_used_up_by(used, before=self.used_before)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnState(TurnFacts):
    """The state of a turn under way.

    Attributes:
        exited: the exit of the agent's own process; None: it is alive.
        is_tree_empty: whether the kernel has reported to the shim that no process of the tree is
            left.
        is_canceled: whether a cancel was accepted.
        has_session: whether the process has named its session.
        open_outputs: how many of stdout and stderr are open.
        exit_due_s: the event loop's time by which the process must have ended; None: no limit.
        used: the usage of the turn: the highest reported value of each counter.
        is_usage_new: whether `used` is not recorded yet.
        usage_due_s: the event loop's time from which `used` can be recorded again.
        is_answering: whether the latest usage was that of an answer without a tool call, so that
            the turn is possibly ending.
        retries: the number of recorded retries.
        unknown_types: message types that were logged as unknown.
    """

    exited: Exited | None = None
    is_tree_empty: bool = False
    is_canceled: bool = False
    has_session: bool = False
    open_outputs: int = 2
    exit_due_s: float | None = None
    used: TurnUsage | None = None
    is_usage_new: bool = False
    usage_due_s: float = 0.0
    is_answering: bool = False
    retries: int = 0
    unknown_types: frozenset[str] = frozenset()

    @property
    def is_over(self) -> bool:
        """Whether the process has ended, or must be ended."""
        # All output must come before the end, so that a caller that follows the run misses nothing.
        has_ended = self.exited is not None and not self.open_outputs
        is_lost = self.is_unsupervised or self.interrupted is not None
        is_stopped = self.is_canceled or self.deadline_passed is not None
        is_stopped |= self.stopped is not None
        return has_ended or is_lost or is_stopped or self.protocol_error is not None

    @property
    def wakes_to_record(self) -> bool:
        """Whether the next thing that is due (`wake_s`) is to record the usage."""
        is_first = self.exit_due_s is None or self.usage_due_s <= self.exit_due_s
        return self.is_usage_new and is_first

    @property
    def wake_s(self) -> float | None:
        """The event loop's time at which something is due without an event; None: nothing."""
        return self.usage_due_s if self.wakes_to_record else self.exit_due_s

    @property
    def end_reason(self) -> str:
        """Why the process tree is ended, as one word for the log."""
        reasons = {
            "canceled": self.is_canceled,
            "timed_out": self.deadline_passed is not None,
            "protocol_broken": self.protocol_error is not None,
            "stopped": self.stopped is not None,
            "shim_lost": self.is_unsupervised,
            "reply_lost": self.is_reply_lost,
        }
        return next((why for why, holds in reasons.items() if holds), "turn_over")


Step: TypeAlias = "tuple[TurnState, Action | None]"


def advance(state: TurnState, event: TurnEvent, rules: TurnRules, *, now_s: float) -> Step:
    """Return the state after an event, and the action to carry out before the next event.

    Args:
        now_s: the event loop's time.
    """
    match event:
        case LineRead(at_work):
            return _line_read(state, rules, now_s, at_work=at_work), None
        case ProtocolBroken(how):
            return replace(state, protocol_error=how), None
        case DeadlinePassed(kind):
            return replace(state, deadline_passed=kind), None
        case Signal.USAGE_DUE:
            return _record_usage(state, now_s)
        case Signal():
            return _signal(state, event, rules, now_s), None
        case Exited() | EndsItself() | Empty():
            return _shim_event(state, event, now_s), None
        case Gated() | Started() | NotStarted():
            return state, None  # the launch itself waits for these
        case UsageMessage():
            return _usage(state, event, now_s)
        case _:
            return _message(state, event, rules)


def _message(state: TurnState, message: Message, rules: TurnRules) -> Step:
    match message:
        case SessionMessage(value=handle):
            return replace(state, has_session=True), RecordSession(handle)
        case AskMessage(question=question):
            return _question(state, Asked(question), rules)
        case ResultMessage(output=output):
            return _last_word(state, Succeeded(output), rules)
        case UnknownMessage():
            return _unknown(state, message)
        case RetryMessage():
            return _retry(state, message)
        case ProgressMessage() | UsageMessage():
            return state, None


def _question(state: TurnState, asked: Asked, rules: TurnRules) -> Step:
    if rules.profile is Profile.RESUMABLE:
        if not state.has_session and not rules.resumes:
            return replace(state, protocol_error=ASKED_WITHOUT_SESSION), None
        return _last_word(state, asked, rules)
    if state.is_waiting:
        return replace(state, protocol_error=ASKED_WHILE_WAITING), None
    if state.last_word is not None:
        return replace(state, protocol_error=SECOND_END), None
    # Set before the question is committed, because its reply can come right after the commit.
    return replace(state, is_waiting=True), RecordQuestion(asked.question)


def _last_word(state: TurnState, said: Asked | Succeeded, rules: TurnRules) -> Step:
    """Remember the question or result that ends the turn.

    If the dialect allows only one (`ends_once`), a second one is compared with the first.
    """
    if state.is_waiting:
        return replace(state, protocol_error=RESULT_WHILE_WAITING), None
    if state.last_word is not None and rules.ends_once:
        return state, CompareEnds(state.last_word, said)
    usage_due_s = 0.0 if state.last_word is None else state.usage_due_s
    return replace(state, last_word=said, usage_due_s=usage_due_s), None


def _usage(state: TurnState, message: UsageMessage, now_s: float) -> Step:
    used = message.used
    if state.used is not None:  # counters never fall
        used = TurnUsage(turn=used.turn.at_least(state.used.turn), session=used.session)
    state = replace(state, used=used, is_usage_new=True, is_answering=message.is_answering)
    return (state, None) if now_s < state.usage_due_s else _record_usage(state, now_s)


def _record_usage(state: TurnState, now_s: float) -> Step:
    if state.used is None:
        return state, None
    due_s = now_s + USAGE_RECORDED_EVERY_S
    return replace(state, is_usage_new=False, usage_due_s=due_s), RecordUsage(state.used)


def _retry(state: TurnState, retry: RetryMessage) -> Step:
    if retry.is_hopeless and (state.last_word is None or state.is_at_work):
        how = f"{UNAUTHENTICATED} {retry.message}."
        error = RunError(code=ErrorCode.ENGINE_UNAUTHENTICATED, message=how)
        state = replace(state, stopped=error)
    if state.retries >= RETRIES_RECORDED:
        return state, None
    return replace(state, retries=state.retries + 1), RecordRetry(retry.message)


def _unknown(state: TurnState, message: UnknownMessage) -> Step:
    kind = message.type
    if kind in state.unknown_types:
        return state, None
    if len(state.unknown_types) < UNKNOWN_TYPES:
        state = replace(state, unknown_types=state.unknown_types | {kind})
    return state, ReportUnknown(kind, message.problem)


def _line_read(
    state: TurnState, rules: TurnRules, now_s: float, *, at_work: bool | None
) -> TurnState:
    """If the agent has ended its turn, set a new time limit for the exit of the process.

    If the agent has begun further work on its own, there is no limit.
    """
    if state.exited is not None or not state.open_outputs:
        return replace(state, is_at_work=at_work is True)
    goes_on = (state.last_word is None or at_work is True) and not state.is_answering
    if goes_on and state.used is not None and (why := rules.why_used_up(state.used)) is not None:
        return replace(state, stopped=RunError(code=ErrorCode.BUDGET_EXCEEDED, message=why))
    if at_work is True:
        return replace(state, is_at_work=True, exit_due_s=None)
    if state.last_word is not None or at_work is False:
        return replace(state, is_at_work=False, exit_due_s=now_s + rules.exit_grace_s)
    return replace(state, is_at_work=False) if state.is_at_work else state


def _signal(state: TurnState, signal: Signal, rules: TurnRules, now_s: float) -> TurnState:
    soon_s = now_s + LAST_OUTPUT_S
    match signal:
        case Signal.CANCELED:
            return replace(state, is_canceled=True)
        case Signal.REPLY_ACCEPTED:
            return replace(state, is_waiting=False)
        case Signal.REPLY_LOST:  # the process is possibly just exiting
            return replace(state, is_reply_lost=True, exit_due_s=soon_s)
        case Signal.STDOUT_ENDED:
            due_s = now_s + rules.exit_grace_s
            return replace(state, open_outputs=state.open_outputs - 1, exit_due_s=due_s)
        case Signal.STDERR_ENDED:
            return replace(state, open_outputs=state.open_outputs - 1)
        case Signal.SHIM_GONE:
            return replace(state, is_unsupervised=state.exited is None, exit_due_s=soon_s)
        case Signal.SHIM_USELESS:
            # A shim can be killed after its tree has ended. While a write is retried, the straggler
            # sweep can find the shim gone although the exit that the shim has reported is still in
            # the queue.
            return replace(state, is_unsupervised=state.exited is None)
        case Signal.OUTPUT_UNREAD:
            return replace(state, exit_due_s=soon_s)
        case Signal.USAGE_DUE:
            return state


def _shim_event(state: TurnState, event: Exited | EndsItself | Empty, now_s: float) -> TurnState:
    soon_s = now_s + LAST_OUTPUT_S
    match event:
        case Exited():
            return replace(state, exited=event, exit_due_s=soon_s)
        case EndsItself():
            # An exit before the shim's kill counts, because the agent has possibly succeeded.
            interrupted = SUSPENDED if state.exited is None else None
            return replace(state, interrupted=interrupted, exit_due_s=soon_s)
        case Empty():
            return replace(state, is_tree_empty=True, exit_due_s=soon_s)
