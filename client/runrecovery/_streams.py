"""Tracks the position of a stream, and decides when to reopen a broken one. No I/O."""

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
"""Failures after which a stream is reopened. Any other failure would only repeat."""

SILENCE_S: float = 45.0
"""A watch without a message for this long is dead: three bookmarks of the service are missing."""

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0

MessageT = TypeVar("MessageT")


class Reconnection:
    """Decides when a broken stream is reopened, and when its failure is final.

    An outage begins with the first failure after a message, and ends with the next message.

    Args:
        reconnect_s: seconds that an outage may last; None: no limit.
        timeout_s: seconds that all streams together may take; None: no limit.
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
        self._outage_since: float | None = None
        self._backoff = self._new_backoff()

    def open(self) -> float | None:
        """Record that a stream is opened; return its deadline in seconds, None for no deadline."""
        self._opened_at = self._clock()
        left_s = self._end - self._opened_at
        return None if left_s == math.inf else max(0.0, left_s)

    def age_s(self) -> float:
        """Return the seconds since the stream was opened."""
        return self._clock() - self._opened_at

    def record_message(self, *, news: bool) -> None:
        """Record that a message was received.

        Args:
            news: False for a bookmark, which does not reset the backoff: a service that ends every
                stream after its first bookmark is called less and less often.
        """
        self._outage_since = None
        if news or self.age_s() >= _LONGEST_PAUSE_S:
            self._backoff = self._new_backoff()

    def pause_s(self, failure: Broken) -> float:
        """Return the seconds to pause before reopening; raise the failure if it is final."""
        now = self._clock()
        if self._outage_since is None:
            self._outage_since = now
        left_s = self._outage_since + self._reconnect_s - now
        pause_s = min(left_s, self._backoff.pause_s(at_least_s=failure.retry_after_s or 0.0))
        if left_s <= 0 or self._end - now <= pause_s:
            raise failure
        return pause_s

    def _new_backoff(self) -> Backoff:
        return Backoff(first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, uniform=self._uniform)


class Reader(ABC, Generic[MessageT]):
    """The position of a reader, so that a broken stream resumes without gap or repetition.

    Attributes:
        silence_s: seconds without a message after which a stream is dead; None: no limit.
    """

    silence_s: float | None = None

    def __init__(self, reconnection: Reconnection) -> None:
        self._reconnection = reconnection

    def open(self) -> tuple[Call[MessageT], float | None]:
        """Return the call that resumes here, and its deadline in seconds (None: no deadline)."""
        return self._call(), self._reconnection.open()

    def pause_s(self, failure: Broken) -> float:
        """Return the seconds to pause before reopening; raise the failure if it is final."""
        return self._reconnection.pause_s(failure)

    @abstractmethod
    def accept(self, message: MessageT) -> bool:
        """Record a received message; return whether to pass it to the caller."""

    @abstractmethod
    def _call(self) -> Call[MessageT]: ...


class OutputReader(Reader[run_service_pb2.StreamOutputResponse]):
    """A reader of output; its position is a byte of one attempt.

    Args:
        request: the caller's request; it is not changed.
        reconnection: decides when to reopen.
        reconnect_s: a stream that was open this long counts as working, even without output,
            because streams of output have no bookmarks.
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

    def accept(self, message: run_service_pb2.StreamOutputResponse) -> bool:
        # Attempt 0 means the latest. Reopened streams must read the same attempt.
        self._request.attempt = message.attempt
        self._request.offset = message.offset + len(message.data)
        self._reconnection.record_message(news=True)
        return True

    def pause_s(self, failure: Broken) -> float:
        if self._reconnection.age_s() >= self._reconnect_s:
            self._reconnection.record_message(news=True)
        return super().pause_s(failure)

    def _call(self) -> Call[run_service_pb2.StreamOutputResponse]:
        return requests.stream_output(self._request)


class RunWatch(Reader[run_service_pb2.WatchRunResponse]):
    """A watch of a run; its position is a sequence, which counts the events without a gap."""

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

    def accept(self, message: run_service_pb2.WatchRunResponse) -> bool:
        match message.WhichOneof("update"):
            case "snapshot":
                news = self._is_first_snapshot(message.sequence)
            case "bookmark":
                news = self._is_new(message.sequence, by=0)
            case "event":
                news = self._is_new(message.sequence, by=1)
            case _:  # from a newer service; it has a sequence like all messages
                news = self._last is not None and self._is_new(message.sequence, by=1)
        if news:
            self._last = message.sequence
        self._reconnection.record_message(news=news)
        return news or (self._include_bookmarks and message.HasField("bookmark"))

    def _is_first_snapshot(self, sequence: int) -> bool:
        """Return whether this is the first snapshot. A later one that skips events is a gap."""
        return self._last is None or self._is_new(sequence, by=0)

    def _is_new(self, sequence: int, *, by: int) -> bool:
        """Return whether the reader has not seen this message yet.

        Args:
            sequence: the sequence of the message.
            by: how many events the message adds to those before it: 1 for an event, else 0.

        Raises:
            WatchGap: events before the message are missing, also in a reopened stream.
        """
        if self._last is None:
            if by:
                raise WatchGap(f"watch of run {self._run_id!r} began without a snapshot")
            return False
        if sequence > self._last + by:
            self._raise_gap(self._last)
        return sequence > self._last

    def _raise_gap(self, last: int) -> None:
        missing = f"watch of run {self._run_id!r}: events after {last} are missing"
        if self._gap_after == last:
            raise WatchGap(missing)
        self._gap_after = last
        raise Unavailable(missing, details=ErrorDetails(code=grpc.StatusCode.UNAVAILABLE))

    def _call(self) -> Call[run_service_pb2.WatchRunResponse]:
        return requests.watch_run(self._run_id, after_sequence=self._last)


class RecoveredWatch(Reader[recovery_service_pb2.WatchRecoveredResponse]):
    """A watch of decisions; its position is a cursor, which only the service can read."""

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

    def accept(self, message: recovery_service_pb2.WatchRecoveredResponse) -> bool:
        # A decision with the last cursor was delivered already.
        is_repeat = bool(message.cursor) and message.cursor == self._cursor
        news = message.HasField("decision") and not is_repeat
        self._cursor = message.cursor or self._cursor
        self._reconnection.record_message(news=news)
        return news or (self._include_bookmarks and message.HasField("bookmark"))

    def _call(self) -> Call[recovery_service_pb2.WatchRecoveredResponse]:
        return requests.watch_recovered(self._chosen, after_cursor=self._cursor)


def silence_error() -> Unavailable:
    """Return the failure of a stream without a message for `silence_s`."""
    return Unavailable(
        "no message arrived on the stream in time",
        details=ErrorDetails(code=grpc.StatusCode.UNAVAILABLE),
    )
