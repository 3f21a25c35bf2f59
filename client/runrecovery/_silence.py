"""Notices a stream that has gone silent, for readers that block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

MessageT = TypeVar("MessageT")


class SilenceGuard:
    """Cancels a stream while its reader waits in vain; a thread, as a blocking read has no limit.

    Only the waiting counts: what the caller does between two messages is none of the stream's
    silence.

    Args:
        silence_s: seconds of waiting after which the stream is dead.
        cancel: ends the stream, from another thread.
    """

    def __init__(
        self,
        silence_s: float,
        cancel: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.has_cut = False
        self._silence_s = silence_s
        self._cancel = cancel
        self._clock = clock
        self._listening_since: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._guard, name="runrecovery-silence", daemon=True).start()

    def heard(self, stream: Iterator[MessageT]) -> Iterator[MessageT]:
        """The messages of the stream; it raises what the stream raises, also when it is cut."""
        self._listening_since = self._clock()
        for message in stream:
            self._listening_since = None
            yield message
            self._listening_since = self._clock()

    def end(self) -> None:
        """The stream has ended; the thread does so too."""
        self._ended.set()

    def _guard(self) -> None:
        left_s = self._silence_s
        while not self._ended.wait(left_s):
            left_s = self._left_s()
            if left_s <= 0:
                self.has_cut = True
                self._cancel()
                return

    def _left_s(self) -> float:
        """Seconds after which the reader can have waited too long, and not before."""
        since = self._listening_since
        return self._silence_s - (0.0 if since is None else self._clock() - since)
