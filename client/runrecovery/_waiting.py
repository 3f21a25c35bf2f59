"""When to try again, and when to give up: the state of every loop, without its I/O."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import grpc

from runrecovery.errors import DeadlineExceeded, ErrorDetails, RunQuarantined, Unavailable
from runrecovery.v1 import run_pb2, run_service_pb2

TERMINAL_STATUSES = frozenset(
    {run_pb2.RUN_STATUS_SUCCEEDED, run_pb2.RUN_STATUS_FAILED, run_pb2.RUN_STATUS_CANCELED}
)
"""A run that reached one of these never changes its status again."""

# The last look of a loop, at its deadline, still needs time for one answer.
_LAST_TRY_S = 0.1
_RANDOM = random.SystemRandom()

ValueT = TypeVar("ValueT")


class Pacer:
    """Exponential pauses with full jitter, until a time limit.

    Args:
        first_s: ceiling of the first pause; each further one is twice as high.
        longest_s: ceiling of every pause.
        within_s: seconds until the limit; None is no limit.
    """

    def __init__(
        self,
        *,
        first_s: float,
        longest_s: float,
        within_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = _RANDOM.uniform,
    ) -> None:
        self._ceiling_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._uniform = uniform
        self._end = None if within_s is None else clock() + within_s

    def left_s(self) -> float | None:
        """Seconds until the limit, at least 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def pause_s(self, *, at_least_s: float = 0.0) -> float | None:
        """Seconds to pause before the next try; None when the limit is reached."""
        left = self.left_s()
        if left == 0.0:
            return None
        pause = max(self._uniform(0.0, self._ceiling_s), at_least_s)
        self._ceiling_s = min(self._ceiling_s * 2, self._longest_s)
        return pause if left is None else min(pause, left)


class Wait(Generic[ValueT]):
    """A wait for a value that says enough, through answers that the service cannot give yet.

    Args:
        goal: what is awaited, for the error's text.
        reached: says whether a value is enough.
    """

    def __init__(self, goal: str, *, reached: Callable[[ValueT], bool], pacer: Pacer) -> None:
        self._goal = goal
        self._reached = reached
        self._pacer = pacer
        self._seen = ""
        self._failure: Unavailable | DeadlineExceeded | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one try: being unavailable or late is a reason to try again."""
        self._failure = None
        try:
            yield
        except (Unavailable, DeadlineExceeded) as failure:
            self._failure = failure

    def attempt_timeout_s(self, usual_s: float) -> float:
        """The deadline of one try: the usual one, or what is left."""
        left = self._pacer.left_s()
        return usual_s if left is None else min(usual_s, max(left, _LAST_TRY_S))

    def is_over(self, value: ValueT) -> bool:
        """Whether this value ends the wait."""
        self._seen = _in_short(value)
        return self._reached(value)

    def pause_s(self) -> float:
        """Seconds to pause before the next try.

        Raises:
            DeadlineExceeded: the time is over; its cause is the last failure, if that was it.
        """
        hint = self._failure.retry_after_s if isinstance(self._failure, Unavailable) else None
        pause = self._pacer.pause_s(at_least_s=hint or 0.0)
        if pause is None:
            raise DeadlineExceeded(
                f"{self._goal}: not in time; last seen: {self._failure or self._seen}",
                details=ErrorDetails(code=grpc.StatusCode.DEADLINE_EXCEEDED),
            ) from self._failure
        return pause


def wait_for_run(run_id: str, *, timeout_s: float | None, or_waiting: bool) -> Wait[run_pb2.Run]:
    """The wait for the end of a run, or also for its next question."""
    enough = TERMINAL_STATUSES | ({run_pb2.RUN_STATUS_WAITING_USER} if or_waiting else set())

    def reached(run: run_pb2.Run) -> bool:
        if run.recovery.recovery_state == run_pb2.RECOVERY_STATE_QUARANTINED:
            raise RunQuarantined(f"run {run_id!r} is set aside and will not end by itself")
        return run.status in enough

    pacer = Pacer(first_s=0.1, longest_s=2.0, within_s=timeout_s)
    return Wait(f"the end of run {run_id!r}", reached=reached, pacer=pacer)


def wait_until_serving(service: str, *, timeout_s: float | None) -> Wait[str]:
    """The wait for a health check that says SERVING."""
    pacer = Pacer(first_s=0.1, longest_s=1.0, within_s=timeout_s)
    goal = f"service {service!r} SERVING" if service else "the service SERVING"
    return Wait(goal, reached=lambda status: status == "SERVING", pacer=pacer)


class OutputCursor:
    """Where a reader of output stands, so that a broken stream goes on without gap or repeat.

    Args:
        request: what the caller asked for; it is not changed.
        reconnect_s: seconds without a new piece for which a broken stream is reopened.
        timeout_s: seconds that all streams together may take; None is no limit.
    """

    def __init__(
        self,
        request: run_service_pb2.StreamOutputRequest,
        *,
        reconnect_s: float,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = run_service_pb2.StreamOutputRequest()
        self._request.CopyFrom(request)
        self._reconnect_s = reconnect_s
        self._clock = clock
        self._opened_at = clock()
        self._end = None if timeout_s is None else clock() + timeout_s
        self._outage: Pacer | None = None

    def open(self) -> tuple[run_service_pb2.StreamOutputRequest, float | None]:
        """The request and the deadline in seconds (None is none) of the next stream."""
        self._opened_at = self._clock()
        return self._request, self._left_s()

    def took(self, piece: run_service_pb2.StreamOutputResponse) -> None:
        """The caller is being given this piece."""
        # Attempt 0 is the latest; it must stay the one that the reading began with.
        self._request.attempt = piece.attempt
        self._request.offset = piece.offset + len(piece.data)
        self._outage = None

    def pause_s(self, failure: Unavailable) -> float:
        """Seconds to pause before the stream is reopened; raises the failure when it is enough."""
        # A stream that lived this long had worked, even if the run had nothing to say.
        if self._clock() - self._opened_at >= self._reconnect_s:
            self._outage = None
        if self._outage is None:
            self._outage = Pacer(
                first_s=0.2, longest_s=5.0, within_s=self._reconnect_s, clock=self._clock
            )
        pause = self._outage.pause_s(at_least_s=failure.retry_after_s or 0.0)
        left = self._left_s()
        if pause is None or (left is not None and left <= pause):
            raise failure
        return pause

    def _left_s(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - self._clock())


def _in_short(value: object) -> str:
    if isinstance(value, run_pb2.Run):
        return run_pb2.RunStatus.Name(value.status)
    return str(value)
