"""A text stream whose writers never wait for whoever reads it."""

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

from runrecovery_service.threads import start_thread

MOST_BYTES: Final = 256 * 1024
"""Text that may wait for a reader: some thousand lines of the log."""
DRAIN_S: Final = 1.0
"""How long the end of the process waits for a reader."""

_Entry: TypeAlias = bytes | int
"""Text, or the number of lines that were dropped in its place."""


def _plain_report(lines: int) -> str:
    return f"(lines lost here: {lines})\n"


class BackgroundStream(TextIOBase):
    """Writes to a descriptor from a thread of its own.

    Text that finds the queue full is dropped, and so is text that the system refuses (a full disk,
    a pipe without a reader). The next text that can be written comes after a line that says how
    many lines are missing.

    Attributes:
        report_loss: returns the line that says so, for a number of lines.
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
        # Its lock is reentrant: a signal handler may write while its thread is in here.
        self._changed = threading.Condition()
        start_thread(self._write_for_ever, "log")
        atexit.register(self.drain)

    @property
    def encoding(self) -> str:  # type: ignore[override] # a plain attribute in the base class
        """The encoding of what is written."""
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
            # Full until half of it is written: a slow reader gets long pieces between few gaps.
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
        """Do nothing: loggers flush after each line, and must not wait. See `drain`."""

    def drain(self, timeout_s: float = DRAIN_S) -> bool:
        """Wait until all that was queued is written; False when that took too long."""
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
        """Write an entry after the report of what was lost before it; return what is lost now."""
        if isinstance(entry, int):
            lost += entry
        if lost and self._put(self._loss_line(lost)):
            lost = 0
        if isinstance(entry, bytes) and (lost or not self._put(entry)):
            lost += _lines(entry)
        return lost

    def _loss_line(self, lost: int) -> bytes:
        """Return the line that reports the loss; a plain one if `report_loss` fails: an exception
        would end the thread, and every later line would be dropped."""
        try:
            line = self.report_loss(lost)
        except Exception:  # noqa: BLE001 - nothing else can report it
            line = _plain_report(lost)
        return line.encode(self._encoding, "backslashreplace")

    def _put(self, data: bytes) -> bool:
        """Write it all, however long that takes; False when the system refuses."""
        left = memoryview(b"\n" + data if self._is_torn else data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody else made the descriptor non-blocking
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
    """Wait a moment, if standard error is written in the background, until all of it is written."""
    if isinstance(sys.stderr, BackgroundStream):
        sys.stderr.drain()
