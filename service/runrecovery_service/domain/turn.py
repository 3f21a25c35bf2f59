"""The possible ends of a turn. A turn is the life of one process of a run.

A cancel is not among these ends. A caller's cancel is accepted independently of the turn, and then
decides the run's status, whatever the end of the turn is.
"""

from __future__ import annotations

import json
from typing import Final, TypeAlias

from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.run import ErrorCode, JsonObject, Question, RunError
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.lazy_dataclass import dataclass

RUN_TIMEOUT: Final = "The run took longer than its engine allows."
SHIM_LOST: Final = (
    "The shim that guarded the process was killed or stopped, so the process was ended."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A resumable process asked its user a question and ended."""

    question: Question


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The engine reported a result and ended without an error."""

    output: JsonObject


@dataclass(frozen=True, slots=True)
class Failed:
    """The turn failed."""

    error: RunError


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A fault or stop of the service ended the process. The recovery matrix decides on the run."""

    because: str
    cause: InterruptionCause = InterruptionCause.SUSPENSION


@dataclass(frozen=True, slots=True)
class SessionGone:
    """The session that an interrupted turn was to resume is lost. `error` says how."""

    error: RunError


TurnEnd: TypeAlias = Asked | Succeeded | Failed | Interrupted | SessionGone


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFacts:
    """The facts that determine the end of a turn.

    Attributes:
        last_word: the latest question or result that the process printed; None: neither.
        is_at_work: whether the process has resumed work after `last_word`.
        protocol_error: how the process broke the protocol; None: it did not.
        interrupted: why the shim killed the process; None: the shim did not kill it.
        is_unsupervised: whether the shim was gone or stopped before the process ended.
        deadline_passed: the passed deadline that ends the process; None: none has passed.
        is_waiting: whether the process waits for the reply to its question.
        is_reply_lost: whether the process closed its input before it had read the reply.
        stopped: why the service kills the process for another reason than those above; None: no
            such reason.
    """

    last_word: Asked | Succeeded | None = None
    is_at_work: bool = False
    protocol_error: str | None = None
    interrupted: str | None = None
    is_unsupervised: bool = False
    deadline_passed: DueKind | None = None
    is_waiting: bool = False
    is_reply_lost: bool = False
    stopped: RunError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnd:
    """The end of the process of a turn.

    Attributes:
        exit_code: negative for a signal; None: the process did not exit and had to be killed.
        failure: the failure that the process reported, which takes precedence over the last
            question or result; None: no failure, or the dialect cannot report one.
        retry: the model call that the process was retrying when the service had to kill it; None:
            no call.
        stderr_tail: the last lines of standard error.
    """

    exit_code: int | None
    failure: RunError | None = None
    retry: str | None = None
    stderr_tail: str = ""

    @property
    def is_clean(self) -> bool:
        """True if the process reported no failure, and exited with 0 or had to be killed."""
        return self.exit_code in {None, 0} and self.failure is None


def is_repeated(first: Asked | Succeeded, second: Asked | Succeeded) -> bool:
    """Return True if both are equal. `true` differs from 1; the order of keys does not matter."""
    if not isinstance(first, Succeeded) or not isinstance(second, Succeeded):
        return repr(first) == repr(second)
    return _canonical(first.output) == _canonical(second.output)


def _canonical(output: JsonObject) -> str:
    return json.dumps(output, sort_keys=True)


def judge(turn: TurnFacts, process: ProcessEnd, *, resumes: bool = False) -> TurnEnd:
    """Return the end of the turn.

    If the service killed the process because of a fault, a deadline or a stop, this reason takes
    precedence over the last question or result. One exception: a result that arrived before the
    deadline is kept, unless the process had resumed work after the result.

    If the process was killed only because it did not exit after its result, the result is kept. If
    the process exited with another code than 0, the turn has failed.

    Args:
        resumes: whether an interrupted turn of the run is resumed (restart policy RESUME).
    """
    if (ended := _ended_by_service(turn, process)) is not None:
        return ended
    if turn.is_waiting:
        return _lost_in_wait(turn, process)
    if turn.is_unsupervised and resumes:
        return Interrupted(SHIM_LOST, InterruptionCause.SHIM_LOST)
    if turn.is_unsupervised:
        return _failed(ErrorCode.SUPERVISION_LOST, SHIM_LOST)
    if process.failure is not None:
        return Failed(process.failure)
    if not process.is_clean:
        return _failed(ErrorCode.ENGINE_FAILED, _how_it_ended(process))
    if turn.last_word is not None:
        return turn.last_word
    return _silent(turn, process)


def _ended_by_service(turn: TurnFacts, process: ProcessEnd) -> TurnEnd | None:
    """Return the end that the service or its shim caused; None if the process ended by itself."""
    if turn.protocol_error is not None:
        return _failed(ErrorCode.ENGINE_PROTOCOL_ERROR, turn.protocol_error)
    if turn.deadline_passed is not None:
        return _out_of_time(turn, process)
    if turn.interrupted is not None:
        return Interrupted(turn.interrupted)
    return None if turn.stopped is None else Failed(turn.stopped)


def end_of_budget(end: TurnEnd, used_up: str | None) -> TurnEnd:
    """Return the end of a turn, which is a failure if another turn would exceed the run's budget.

    A result and a failure stay as they are, because no other turn follows them.

    Args:
        used_up: why the budget allows no other turn, as a sentence; None: budget is left.
    """
    if used_up is None or isinstance(end, Succeeded | Failed):
        return end
    return _failed(ErrorCode.BUDGET_EXCEEDED, used_up)


def _silent(turn: TurnFacts, process: ProcessEnd) -> TurnEnd:
    """Return the end of a turn whose process printed no result or question, but did not fail."""
    if turn.is_reply_lost:
        return _failed(
            ErrorCode.REPLY_NOT_DELIVERED,
            "The process closed its input before it had read the reply.",
        )
    if process.exit_code is None:
        return _failed(
            ErrorCode.ENGINE_PROTOCOL_ERROR,
            "The process closed its output without a result or a question, but did not exit.",
        )
    return _failed(ErrorCode.ENGINE_FAILED, _how_it_ended(process))


def _lost_in_wait(turn: TurnFacts, process: ProcessEnd) -> TurnEnd:
    if process.exit_code is None and not turn.is_unsupervised:
        return _failed(
            ErrorCode.ENGINE_PROTOCOL_ERROR,
            "The process closed its output while it waited for the reply, but did not exit.",
        )
    return _failed(
        ErrorCode.INTERACTION_PROCESS_LOST, "The process ended while it waited for the reply."
    )


def _out_of_time(turn: TurnFacts, process: ProcessEnd) -> TurnEnd:
    if turn.deadline_passed is DueKind.WAIT:
        return _failed(
            ErrorCode.INTERACTION_WAIT_TIMEOUT, "No answer arrived before the deadline of the wait."
        )
    if isinstance(turn.last_word, Succeeded) and process.is_clean and not turn.is_at_work:
        return turn.last_word
    reported = "" if process.retry is None else f" Its agent was retrying: {process.retry}."
    return _failed(ErrorCode.RUN_TIMEOUT, f"{RUN_TIMEOUT}{reported}")


def _how_it_ended(process: ProcessEnd) -> str:
    code = process.exit_code or 0
    how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
    tail = f": {process.stderr_tail}" if process.stderr_tail else "."
    return f"The process {how} without a usable result{tail}"


def _failed(code: ErrorCode, message: str) -> Failed:
    return Failed(RunError(code=code, message=message))
