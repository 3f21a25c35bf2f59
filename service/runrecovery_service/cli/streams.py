"""Makes standard input, output and error usable, however the command was started."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO, cast

from runrecovery_service.background_stream import BackgroundStream

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = range(3)
_WRONG_WAY: Final = {STDIN: os.O_WRONLY, STDOUT: os.O_RDONLY, STDERR: os.O_RDONLY}


class OutputFailed(Exception):
    """Writing to standard output failed."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.no_reader = error.errno == errno.EPIPE


class _Output(io.FileIO):
    """Standard output. Raises the first failure; drops later writes, such as Python's flush."""

    _has_failed = False

    def write(self, data: ReadableBuffer) -> int:
        if self._has_failed:
            return memoryview(data).nbytes
        try:
            while True:
                written: int | None = super().write(data)
                if written is not None:
                    return written
                poll = select.poll()  # another process made the descriptor non-blocking
                poll.register(self.fileno(), select.POLLOUT)
                poll.poll()
        except OSError as error:
            self._has_failed = True
            raise OutputFailed(error) from error


class _Messages(io.FileIO):
    """Standard error. A failed write is ignored, so that it does not change the exit code."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def prepare() -> None:
    """Open the standard streams that are closed, and prepare the others.

    Otherwise the next file or socket would get the descriptor number of a closed stream, and
    messages would be written into this file. So /dev/null gets this number, opened for the wrong
    direction: every read or write of the stream then fails.
    """
    for descriptor, flags in _WRONG_WAY.items():
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # noqa: FBT003 - its signature
    if sys.stdin is None:
        sys.stdin = open(STDIN, encoding="utf-8", closefd=False)  # noqa: SIM115 - for life
    sys.stdout = _text(_Output(STDOUT, "w", closefd=False), like=sys.stdout)
    sys.stderr = _text(_Messages(STDERR, "w", closefd=False), like=sys.stderr)


def write_messages_in_background() -> None:
    """Write standard error from a thread, so that a slow reader blocks nothing."""
    descriptor = os.dup(STDERR)  # stays blocking: only the thread waits for it
    _make_non_blocking(STDERR)
    sys.stderr = cast("TextIO", BackgroundStream(descriptor, encoding=sys.stderr.encoding))


def _make_non_blocking(descriptor: int) -> None:
    """Make the descriptor non-blocking, so that writes of C libraries lose text and never block.

    A pipe or terminal is opened again for this, because other processes can share the old one.
    """
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(kind):
        os.set_blocking(descriptor, False)
    elif stat.S_ISFIFO(kind) or os.isatty(descriptor):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with suppress(OSError):  # no reader, or another owner: writes stay blocking
            reopened = os.open(f"/proc/self/fd/{descriptor}", flags)
            os.dup2(reopened, descriptor)
            os.close(reopened)


def _text(raw: io.FileIO, *, like: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",  # for characters that the encoding lacks
        line_buffering=raw.fileno() == STDERR or raw.isatty(),
    )
