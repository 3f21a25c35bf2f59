"""State of waits: when to retry and when to stop. No I/O."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import grpc

from runrecovery.errors import DeadlineExceeded, ErrorDetails, RunQuarantined, Unavailable
from runrecovery.v1 import run_pb2

TERMINAL_STATUSES = frozenset(
    {run_pb2.RUN_STATUS_SUCCEEDED, run_pb2.RUN_STATUS_FAILED, run_pb2.RUN_STATUS_CANCELED}
)
"""Statuses of ended runs. Only `runs.reopen` can change a run's status afterwards."""

# The last try, at the deadline, still needs time for one response.
_LAST_TRY_S = 0.1
RANDOM = random.SystemRandom()

ValueT = TypeVar("ValueT")


class Backoff:
    """Exponential backoff with full jitter.

    Args:
        first_s: ceiling of the first pause; it doubles with each further pause.
        longest_s: ceiling of every pause.
    """

    def __init__(
        self,
        *,
        first_s: float,
        longest_s: float,
        uniform: Callable[[float, float], float] = RANDOM.uniform,
    ) -> None:
        self._ceiling_s = first_s
        self._longest_s = longest_s
        self._uniform = uniform

    def pause_s(self, *, at_least_s: float = 0.0) -> float:
        """Return the seconds to pause: those that the service asked for, plus the jitter.

        Both are added, because the service asks all clients for the same pause, and they must not
        all retry at the same time.
        """
        pause = at_least_s + self._uniform(0.0, self._ceiling_s)
        self._ceiling_s = min(self._ceiling_s * 2, self._longest_s)
        return pause


class Pacer:
    """A backoff with a time limit.

    Args:
        first_s: as in `Backoff`.
        longest_s: as in `Backoff`.
        within_s: seconds until the limit; None: no limit.
    """

    def __init__(
        self,
        *,
        first_s: float,
        longest_s: float,
        within_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = RANDOM.uniform,
    ) -> None:
        self._backoff = Backoff(first_s=first_s, longest_s=longest_s, uniform=uniform)
        self._clock = clock
        self._end = None if within_s is None else clock() + within_s

    def left_s(self) -> float | None:
        """Return the seconds until the limit, at least 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def pause_s(self, *, at_least_s: float = 0.0) -> float | None:
        """Return the seconds to pause before the next try; None at the limit."""
        left = self.left_s()
        if left == 0.0:
            return None
        pause = self._backoff.pause_s(at_least_s=at_least_s)
        return pause if left is None else min(pause, left)


class Wait(Generic[ValueT]):
    """A wait for a value that meets a condition, across failures of single tries.

    Args:
        goal: describes the condition in the text of an error.
        reached: returns whether a value meets the condition.
    """

    def __init__(self, goal: str, *, reached: Callable[[ValueT], bool], pacer: Pacer) -> None:
        self._goal = goal
        self._reached = reached
        self._pacer = pacer
        self._seen = ""
        self._failure: Unavailable | DeadlineExceeded | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Wrap one try: remember Unavailable and DeadlineExceeded as reasons to retry."""
        self._failure = None
        try:
            yield
        except (Unavailable, DeadlineExceeded) as failure:
            self._failure = failure

    def attempt_timeout_s(self, usual_s: float) -> float:
        """Return the deadline of one try: the usual one, or the remaining time if that is less."""
        left = self._pacer.left_s()
        return usual_s if left is None else min(usual_s, max(left, _LAST_TRY_S))

    def is_over(self, value: ValueT) -> bool:
        """Return whether this value ends the wait."""
        self._seen = _summarize(value)
        return self._reached(value)

    def pause_s(self) -> float:
        """Return the seconds to pause before the next try.

        Raises:
            DeadlineExceeded: the time is over. Its cause is the failure of the last try, if any.
        """
        hint = self._failure.retry_after_s if isinstance(self._failure, Unavailable) else None
        pause = self._pacer.pause_s(at_least_s=hint or 0.0)
        if pause is None:
            raise DeadlineExceeded(
                f"waiting for {self._goal} took too long; last seen: {self._failure or self._seen}",
                details=ErrorDetails(code=grpc.StatusCode.DEADLINE_EXCEEDED),
            ) from self._failure
        return pause


def wait_for_run(run_id: str, *, timeout_s: float | None, or_waiting: bool) -> Wait[run_pb2.Run]:
    """Return a `Wait` that ends with a run, or also with its next question."""
    wanted = TERMINAL_STATUSES | ({run_pb2.RUN_STATUS_WAITING_USER} if or_waiting else set())

    def reached(run: run_pb2.Run) -> bool:
        if run.recovery.recovery_state == run_pb2.RECOVERY_STATE_QUARANTINED:
            raise RunQuarantined(f"run {run_id!r} is quarantined and will not end by itself")
        return run.status in wanted

    goal = "end or to ask its user" if or_waiting else "end"
    pacer = Pacer(first_s=0.1, longest_s=2.0, within_s=timeout_s)
    return Wait(f"run {run_id!r} to {goal}", reached=reached, pacer=pacer)


def wait_until_serving(service: str, *, timeout_s: float | None) -> Wait[str]:
    """Return a `Wait` that ends when a health check says SERVING."""
    pacer = Pacer(first_s=0.1, longest_s=1.0, within_s=timeout_s)
    goal = f"service {service!r} to be SERVING" if service else "the service to be SERVING"
    return Wait(goal, reached=lambda status: status == "SERVING", pacer=pacer)


def _summarize(value: object) -> str:
    if isinstance(value, run_pb2.Run):
        return run_pb2.RunStatus.Name(value.status)
    return str(value)
