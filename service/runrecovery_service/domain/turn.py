"""How one turn of a run, the life of one process, can end.

A cancel is not among these ends. It is accepted independently of the turn and wins over its end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, TypeAlias

from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.run import ErrorCode, JsonObject, Question, RunError

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
    """The service's own trouble ended the process. The recovery matrix decides on the run."""

    because: str
    cause: InterruptionCause = InterruptionCause.SUSPENSION


@dataclass(frozen=True, slots=True)
class SessionGone:
    """The session that an interrupted turn was to resume is lost. `error` says how."""

    error: RunError


TurnEnd: TypeAlias = Asked | Succeeded | Failed | Interrupted | SessionGone


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the service observed of a process until its end.

    Attributes:
        said: the latest question or result that the process printed, None if neither.
        broken: how the process broke the protocol, None if it did not.
        failure: the failure that the process reported, if its dialect can report one. It takes
            precedence over `said`.
        exit_code: None if the process was alive and had to be ended; negative for a signal.
        interrupted: why the shim killed the process, None if the shim did not.
        unsupervised: the shim was gone or stopped before the process ended.
        resumes: an interrupted turn of the run is resumed (restart policy RESUME).
        timed_out: the deadline for which the process was ended, None if it was not.
        at_work: the process had resumed work after `said`.
        in_wait: the process ended or closed its output before its user had replied.
        undelivered: the process closed its input before it had read the reply.
        stderr_tail: the last lines of standard error.
    """

    said: Asked | Succeeded | None
    broken: str | None
    exit_code: int | None
    in_wait: bool
    stderr_tail: str
    at_work: bool = False
    undelivered: bool = False
    interrupted: str | None = None
    unsupervised: bool = False
    resumes: bool = False
    timed_out: DueKind | None = None
    failure: RunError | None = None


def is_repeated(first: Asked | Succeeded, second: Asked | Succeeded) -> bool:
    """Return True if both are equal. `true` differs from 1; the order of keys does not matter."""
    if not isinstance(first, Succeeded) or not isinstance(second, Succeeded):
        return repr(first) == repr(second)
    return _canonical(first.output) == _canonical(second.output)


def _canonical(output: JsonObject) -> str:
    return json.dumps(output, sort_keys=True)


def judge(seen: Observed) -> TurnEnd:
    """Return how the turn ended.

    What the service did to the process takes precedence over what the process said last. One
    exception: a result that arrived before the deadline is kept, unless the process had resumed
    work after it.

    The result of a process that did not exit by itself is kept. The result of a process with a bad
    exit code is not.
    """
    if seen.broken is not None:
        return _failed(ErrorCode.ENGINE_PROTOCOL_ERROR, seen.broken)
    if seen.timed_out is not None:
        return _out_of_time(seen)
    if seen.interrupted is not None:
        return Interrupted(seen.interrupted)
    if seen.in_wait:
        return _lost_in_wait(seen)
    if seen.unsupervised and seen.resumes:
        return Interrupted(SHIM_LOST, InterruptionCause.SHIM_LOST)
    if seen.unsupervised:
        return _failed(ErrorCode.SUPERVISION_LOST, SHIM_LOST)
    if seen.failure is not None:
        return Failed(seen.failure)
    if seen.exit_code not in {None, 0}:
        return _failed(ErrorCode.ENGINE_FAILED, _how_it_ended(seen))
    if seen.said is not None:
        return seen.said
    return _silent(seen)


def _silent(seen: Observed) -> TurnEnd:
    """Return the end of a process without a bad exit code that said nothing."""
    if seen.undelivered:
        return _failed(
            ErrorCode.REPLY_NOT_DELIVERED,
            "The process closed its input before it had read the reply.",
        )
    if seen.exit_code is None:
        return _failed(
            ErrorCode.ENGINE_PROTOCOL_ERROR,
            "The process closed its output without a result or a question, but did not exit.",
        )
    return _failed(ErrorCode.ENGINE_FAILED, _how_it_ended(seen))


def _lost_in_wait(seen: Observed) -> TurnEnd:
    if seen.exit_code is None and not seen.unsupervised:
        return _failed(
            ErrorCode.ENGINE_PROTOCOL_ERROR,
            "The process closed its output while it waited for the reply, but did not exit.",
        )
    return _failed(
        ErrorCode.INTERACTION_PROCESS_LOST, "The process ended while it waited for the reply."
    )


def _out_of_time(seen: Observed) -> TurnEnd:
    if seen.timed_out is DueKind.WAIT:
        return _failed(
            ErrorCode.INTERACTION_WAIT_TIMEOUT, "No answer arrived before the deadline of the wait."
        )
    well = seen.exit_code in {None, 0} and seen.failure is None
    if isinstance(seen.said, Succeeded) and well and not seen.at_work:
        return seen.said
    return _failed(ErrorCode.RUN_TIMEOUT, RUN_TIMEOUT)


def _how_it_ended(seen: Observed) -> str:
    code = seen.exit_code or 0
    how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
    tail = f": {seen.stderr_tail}" if seen.stderr_tail else "."
    return f"The process {how} without a usable result{tail}"


def _failed(code: ErrorCode, message: str) -> Failed:
    return Failed(RunError(code=code, message=message))
