"""Cancels a stream that has gone silent, for blocking readers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

MessageT = TypeVar("MessageT")


class SilenceTimeout:
    """Cancels a stream whose reader waits too long.

    It uses a thread, because a blocking read has no timeout.

    Only the time that the reader waits for a message counts, not the time between two reads.

    Args:
        silence_s: seconds of waiting after which the stream is cancelled.
        cancel: cancels the stream; it is called from another thread.
    """

    def __init__(
        self,
        silence_s: float,
        cancel: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.has_expired = False
        self._silence_s = silence_s
        self._cancel = cancel
        self._clock = clock
        self._waiting_since: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="runrecovery-silence", daemon=True).start()

    def watch(self, stream: Iterator[MessageT]) -> Iterator[MessageT]:
        """Yield the messages of the stream; raise what the stream raises, also when cancelled."""
        self._waiting_since = self._clock()
        for message in stream:
            self._waiting_since = None
            yield message
            self._waiting_since = self._clock()

    def stop(self) -> None:
        """End the thread, because the stream has ended."""
        self._ended.set()

    def _run(self) -> None:
        left_s = self._silence_s
        while not self._ended.wait(left_s):
            left_s = self._left_s()
            if left_s <= 0:
                self.has_expired = True
                self._cancel()
                return

    def _left_s(self) -> float:
        """Return the seconds until the reader, if it still waits then, has waited too long."""
        since = self._waiting_since
        return self._silence_s - (0.0 if since is None else self._clock() - since)
