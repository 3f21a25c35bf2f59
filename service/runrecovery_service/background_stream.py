"""A text stream whose writers never wait for its reader."""

from __future__ import annotations

import atexit
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from io import TextIOBase
from typing import Final, TypeAlias

from runrecovery_service.required_threads import start_thread

MOST_BYTES: Final = 256 * 1024
"""Bytes of text that may wait in the queue: some thousand log lines."""
DRAIN_S: Final = 1.0
"""How long the end of the process waits for the text to be written."""

_Entry: TypeAlias = bytes | int
"""Text to write, or the number of lines that were dropped at this place in the queue."""


def _plain_report(lines: int) -> str:
    return f"(lines lost here: {lines})\n"


class BackgroundStream(TextIOBase):
    """Writes to a descriptor from a thread of its own.

    The stream drops text when its queue is full, and when the system refuses the write (a full
    disk, a pipe without a reader). Before the next text, the stream writes one line with the number
    of dropped lines.

    Attributes:
        report_loss: returns the line that reports a number of dropped lines.
    """

    def __init__(
        self, descriptor: int, *, encoding: str = "utf-8", most_bytes: int = MOST_BYTES
    ) -> None:
        self.report_loss: Callable[[int], str] = _plain_report
        self._descriptor = descriptor
        self._encoding = encoding
        self._most_bytes = most_bytes
        self._queue: deque[_Entry] = deque()
        self._bytes = 0
        self._is_full = False
        self._is_writing = False
        self._is_torn = False
        # The lock is reentrant: a signal handler may call `write` in a thread that already holds
        # it.
        self._changed = threading.Condition()
        start_thread(self._write_for_ever, "log")
        atexit.register(self.drain)

    @property
    def encoding(self) -> str:  # type: ignore[override] # a plain attribute in the base class
        """The encoding of the text."""
        return self._encoding

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Queue text, or count its lines when the queue is full."""
        data = text.encode(self._encoding, "backslashreplace")
        with self._changed:
            # Once full, the queue takes no text until half of it is written. A slow reader then
            # gets long runs of lines with few gaps.
            self._is_full = self._is_full and self._bytes > self._most_bytes // 2
            if self._is_full or self._bytes + len(data) > self._most_bytes:
                self._is_full = True
                self._drop(_lines(data))
            else:
                self._queue.append(data)
                self._bytes += len(data)
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Do nothing: loggers flush after each line and must not wait. `drain` waits."""

    def drain(self, timeout_s: float = DRAIN_S) -> bool:
        """Wait until the queue is written; return False if the wait exceeds `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._queue and not self._is_writing, timeout_s
            )

    def _drop(self, lines: int) -> None:
        last = self._queue[-1] if self._queue else None
        if isinstance(last, int):
            self._queue[-1] = last + lines
        else:
            self._queue.append(lines)

    # -- the thread ----------------------------------------------------------------------------

    def _write_for_ever(self) -> None:
        lost = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                entry = self._queue.popleft()
                self._is_writing = True
            lost = self._write_entry(entry, lost)
            with self._changed:
                self._is_writing = False
                self._bytes -= len(entry) if isinstance(entry, bytes) else 0
                self._changed.notify_all()

    def _write_entry(self, entry: _Entry, lost: int) -> int:
        """Write the report of lost lines and an entry; return the number of lines that are lost."""
        if isinstance(entry, int):
            lost += entry
        if lost and self._put(self._loss_line(lost)):
            lost = 0
        if isinstance(entry, bytes) and (lost or not self._put(entry)):
            lost += _lines(entry)
        return lost

    def _loss_line(self, lost: int) -> bytes:
        """Return the line that reports the loss, a plain one if `report_loss` fails.

        An exception would end the thread, and every later line would be dropped.
        """
        try:
            line = self.report_loss(lost)
        except Exception:  # noqa: BLE001 - no other thread can report the loss
            line = _plain_report(lost)
        return line.encode(self._encoding, "backslashreplace")

    def _put(self, data: bytes) -> bool:
        """Write all data, without a time limit; return False if the system refuses the write."""
        left = memoryview(b"\n" + data if self._is_torn else data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process has made the shared descriptor non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                self._is_torn = self._is_torn or len(left) < len(data)
                return False
        self._is_torn = False
        return True


def _lines(data: bytes) -> int:
    return max(1, data.count(b"\n"))


def drain_stderr() -> None:
    """Wait up to `DRAIN_S` until standard error is written, if it is a `BackgroundStream`."""
    if isinstance(sys.stderr, BackgroundStream):
        sys.stderr.drain()
