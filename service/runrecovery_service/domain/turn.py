"""How one turn of a run, the life of one process, can end. A cancel is not among the ends: it is
accepted apart from the turn, and wins over whatever the turn brought."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, TypeAlias

from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.run import ErrorCode, JsonObject, Question, RunError

RUN_TIMEOUT: Final = "The run has taken longer than its engine allows."


@dataclass(frozen=True, slots=True)
class Asked:
    """A resumable process asked its user a question and ended."""

    question: Question


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The engine reported a result and ended well."""

    output: JsonObject


@dataclass(frozen=True, slots=True)
class Failed:
    """The turn cannot be gone on with."""

    error: RunError


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The process was ended for want of a service that watched over it, not for anything it did:
    what becomes of the run is what a restart would decide."""

    because: str


TurnEnd: TypeAlias = Asked | Succeeded | Failed | Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was seen of a process until its end.

    Attributes:
        said: the question or the result that it printed last, None if neither.
        broken: how it broke the protocol, None if it did not.
        failure: what it failed with, where its engine can say; it goes before what it said.
        exit_code: None when it was still alive and had to be ended; negative for a signal.
        interrupted: why its shim ended it, None if the shim did not.
        unsupervised: its shim was gone, or stopped, before it ended.
        timed_out: what it had taken too long for, if it was ended for that.
        at_work: it had begun to work again after what it said last.
        in_wait: it ended, or closed its output, while its user was still being waited for.
        undelivered: it closed its input before it had read the reply.
        stderr_tail: the last lines of its standard error.
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
    timed_out: DueKind | None = None
    failure: RunError | None = None


def is_repeated(first: Asked | Succeeded, second: Asked | Succeeded) -> bool:
    """Return True if both say the same; `true` is not 1, and the order of keys says nothing."""
    if not isinstance(first, Succeeded) or not isinstance(second, Succeeded):
        return repr(first) == repr(second)
    return _canonical(first.output) == _canonical(second.output)


def _canonical(output: JsonObject) -> str:
    return json.dumps(output, sort_keys=True)


def judge(seen: Observed) -> TurnEnd:
    """Return how the turn ended.

    What was done to the process goes before what it said or did in its last moments. Only a result
    that came in time stands, though the run's time was over before the process had ended, unless
    the process was at work on another one.

    A process that said its last word and then lingered is taken at its word; one that exits
    badly is not, whatever it said.
    """
    if seen.broken is not None:
        return _failed(ErrorCode.ENGINE_PROTOCOL_ERROR, seen.broken)
    if seen.timed_out is not None:
        return _out_of_time(seen)
    if seen.interrupted is not None:
        return Interrupted(seen.interrupted)
    if seen.in_wait:
        return _lost_in_wait(seen)
    if seen.unsupervised:
        return _failed(
            ErrorCode.SUPERVISION_LOST,
            "The shim that watched over the process was killed or stopped; the process was ended.",
        )
    if seen.failure is not None:
        return Failed(seen.failure)
    if seen.exit_code not in {None, 0}:
        return _failed(ErrorCode.ENGINE_FAILED, _how_it_ended(seen))
    if seen.said is not None:
        return seen.said
    return _silent(seen)


def _silent(seen: Observed) -> TurnEnd:
    """Return the end of a process that did not exit badly, and has said nothing."""
    if seen.undelivered:
        return _failed(
            ErrorCode.REPLY_NOT_DELIVERED,
            "The process closed its input before it had read the reply.",
        )
    if seen.exit_code is None:
        return _failed(
            ErrorCode.ENGINE_PROTOCOL_ERROR,
            "The process closed its output without a result or a question, and lived on.",
        )
    return _failed(ErrorCode.ENGINE_FAILED, _how_it_ended(seen))


def _lost_in_wait(seen: Observed) -> TurnEnd:
    if seen.exit_code is None and not seen.unsupervised:
        return _failed(
            ErrorCode.ENGINE_PROTOCOL_ERROR,
            "The process closed its output while it waited for the reply, and lived on.",
        )
    return _failed(
        ErrorCode.INTERACTION_PROCESS_LOST, "The process ended while it waited for the reply."
    )


def _out_of_time(seen: Observed) -> TurnEnd:
    if seen.timed_out is DueKind.WAIT:
        return _failed(
            ErrorCode.INTERACTION_WAIT_TIMEOUT, "Nobody answered before the wait's deadline."
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
