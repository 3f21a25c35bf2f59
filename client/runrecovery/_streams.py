"""Where the readers of streams stand, and when a broken stream is reopened; without I/O."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

import grpc

from runrecovery import _requests as requests
from runrecovery._requests import Call
from runrecovery._waiting import RANDOM, Backoff
from runrecovery.errors import ErrorDetails, Overloaded, SlowReader, Unavailable, WatchGap
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

Broken: TypeAlias = Unavailable | Overloaded | SlowReader
BROKEN: Final = (Unavailable, Overloaded, SlowReader)
"""Failures after which a stream is reopened. The others would only come again."""

SILENCE_S: float = 45.0
"""A watch that hears nothing for this long is dead: three bookmarks of the service, 15 s each."""

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0

MessageT = TypeVar("MessageT")


class Reconnection:
    """When a broken stream is reopened, and when its failure is final.

    An outage begins with the first failure after a message, and ends with the next message.

    Args:
        reconnect_s: seconds that an outage may last; None: for ever.
        timeout_s: seconds that all streams together may take; None is no limit.
    """

    def __init__(
        self,
        *,
        reconnect_s: float | None,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = RANDOM.uniform,
    ) -> None:
        self._reconnect_s = math.inf if reconnect_s is None else reconnect_s
        self._clock = clock
        self._uniform = uniform
        self._end = math.inf if timeout_s is None else clock() + timeout_s
        self._opened_at = clock()
        self._out_since: float | None = None
        self._backoff = self._new_backoff()

    def open(self) -> float | None:
        """The deadline of the next stream, in seconds; None is none."""
        self._opened_at = self._clock()
        left_s = self._end - self._opened_at
        return None if left_s == math.inf else max(0.0, left_s)

    def lived_s(self) -> float:
        """Seconds since the stream was opened."""
        return self._clock() - self._opened_at

    def heard(self, *, news: bool) -> None:
        """A message came.

        Args:
            news: it is more than a sign of life. A service that ends every stream after its
                first sign of life is asked ever less often all the same.
        """
        self._out_since = None
        if news or self.lived_s() >= _LONGEST_PAUSE_S:
            self._backoff = self._new_backoff()

    def pause_s(self, failure: Broken) -> float:
        """Seconds to pause before the stream is reopened; raises the failure when it is final."""
        now = self._clock()
        if self._out_since is None:
            self._out_since = now
        left_s = self._out_since + self._reconnect_s - now
        pause_s = min(left_s, self._backoff.pause_s(at_least_s=failure.retry_after_s or 0.0))
        if left_s <= 0 or self._end - now <= pause_s:
            raise failure
        return pause_s

    def _new_backoff(self) -> Backoff:
        return Backoff(first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, uniform=self._uniform)


class Reader(ABC, Generic[MessageT]):
    """Where a reader stands, so that a broken stream goes on without gap or repeat.

    Attributes:
        silence_s: seconds without a message after which a stream is dead; None: it may be
            silent for ever.
    """

    silence_s: float | None = None

    def __init__(self, reconnection: Reconnection) -> None:
        self._reconnection = reconnection

    def open(self) -> tuple[Call[MessageT], float | None]:
        """The call that goes on from here, and its deadline in seconds (None is none)."""
        return self._call(), self._reconnection.open()

    def pause_s(self, failure: Broken) -> float:
        """Seconds to pause before the stream is reopened; raises the failure when it is final."""
        return self._reconnection.pause_s(failure)

    @abstractmethod
    def took(self, message: MessageT) -> bool:
        """A message came. Tells whether it is for the caller, who is then being given it."""

    @abstractmethod
    def _call(self) -> Call[MessageT]: ...


class OutputReader(Reader[run_service_pb2.StreamOutputResponse]):
    """A reader of output stands at a byte of one attempt.

    Args:
        request: what the caller asked for; it is not changed.
        reconnection: when to reopen.
        reconnect_s: a stream that lived this long had worked, even if the run said nothing:
            output has no signs of life.
    """

    def __init__(
        self,
        request: run_service_pb2.StreamOutputRequest,
        reconnection: Reconnection,
        *,
        reconnect_s: float,
    ) -> None:
        super().__init__(reconnection)
        self._request = run_service_pb2.StreamOutputRequest()
        self._request.CopyFrom(request)
        self._reconnect_s = reconnect_s

    def took(self, message: run_service_pb2.StreamOutputResponse) -> bool:
        # Attempt 0 is the latest; it must stay the one that the reading began with.
        self._request.attempt = message.attempt
        self._request.offset = message.offset + len(message.data)
        self._reconnection.heard(news=True)
        return True

    def pause_s(self, failure: Broken) -> float:
        if self._reconnection.lived_s() >= self._reconnect_s:
            self._reconnection.heard(news=True)
        return super().pause_s(failure)

    def _call(self) -> Call[run_service_pb2.StreamOutputResponse]:
        return requests.stream_output(self._request)


class RunWatch(Reader[run_service_pb2.WatchRunResponse]):
    """A watcher of a run stands at a sequence, which counts the run's events without a gap."""

    def __init__(
        self,
        run_id: str,
        reconnection: Reconnection,
        *,
        after_sequence: int | None,
        include_bookmarks: bool,
    ) -> None:
        super().__init__(reconnection)
        self.silence_s = SILENCE_S
        self._run_id = run_id
        self._last = after_sequence
        self._include_bookmarks = include_bookmarks
        self._gap_after: int | None = None

    def took(self, message: run_service_pb2.WatchRunResponse) -> bool:
        match message.WhichOneof("update"):
            case "snapshot":
                news = self._begins(message.sequence)
            case "bookmark":
                news = self._goes_on(message.sequence, by=0)
            case "event":
                news = self._goes_on(message.sequence, by=1)
            case _:  # of a newer service: it has a place in the sequence, as all have
                news = self._last is not None and self._goes_on(message.sequence, by=1)
        if news:
            self._last = message.sequence
        self._reconnection.heard(news=news)
        return news or (self._include_bookmarks and message.HasField("bookmark"))

    def _begins(self, sequence: int) -> bool:
        """Whether this is the snapshot to begin with; a later one must not skip events."""
        return self._last is None or self._goes_on(sequence, by=0)

    def _goes_on(self, sequence: int, *, by: int) -> bool:
        """Whether a message that adds `by` events is new; False for one that was delivered."""
        if self._last is None:
            if by:
                raise WatchGap(f"watch of run {self._run_id!r} began without a snapshot")
            return False
        if sequence > self._last + by:
            self._refuse_gap(self._last)
        return sequence > self._last

    def _refuse_gap(self, last: int) -> None:
        missing = f"watch of run {self._run_id!r}: events after {last} are missing"
        if self._gap_after == last:
            raise WatchGap(missing)
        self._gap_after = last
        raise Unavailable(missing, details=ErrorDetails(code=grpc.StatusCode.UNAVAILABLE))

    def _call(self) -> Call[run_service_pb2.WatchRunResponse]:
        return requests.watch_run(self._run_id, after_sequence=self._last)


class RecoveredWatch(Reader[recovery_service_pb2.WatchRecoveredResponse]):
    """A watcher of decisions stands at a cursor, which only the service can read."""

    def __init__(
        self,
        chosen: recovery_service_pb2.RecoveredFilter,
        reconnection: Reconnection,
        *,
        after_cursor: str,
        include_bookmarks: bool,
    ) -> None:
        super().__init__(reconnection)
        self.silence_s = SILENCE_S
        self._chosen = chosen
        self._cursor = after_cursor
        self._include_bookmarks = include_bookmarks

    def took(self, message: recovery_service_pb2.WatchRecoveredResponse) -> bool:
        # A decision at the place that was reached is one that was delivered.
        is_repeat = bool(message.cursor) and message.cursor == self._cursor
        news = message.HasField("decision") and not is_repeat
        self._cursor = message.cursor or self._cursor
        self._reconnection.heard(news=news)
        return news or (self._include_bookmarks and message.HasField("bookmark"))

    def _call(self) -> Call[recovery_service_pb2.WatchRecoveredResponse]:
        return requests.watch_recovered(self._chosen, after_cursor=self._cursor)


def silent() -> Unavailable:
    """The failure of a stream in which nothing came for longer than it may be silent."""
    return Unavailable(
        "the stream gave no sign of life in time",
        details=ErrorDetails(code=grpc.StatusCode.UNAVAILABLE),
    )
