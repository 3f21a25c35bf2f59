"""Standard input, output and error of the command, whatever it was started with."""

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
    """Standard output does not take what was written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.no_reader = error.errno == errno.EPIPE


class _Output(io.FileIO):
    """Standard output. A failure is raised once; later text, as Python's own flush, is dropped."""

    _has_failed = False

    def write(self, data: ReadableBuffer) -> int:
        if self._has_failed:
            return memoryview(data).nbytes
        try:
            while True:
                written: int | None = super().write(data)
                if written is not None:
                    return written
                poll = select.poll()  # somebody else made the descriptor non-blocking
                poll.register(self.fileno(), select.POLLOUT)
                poll.poll()
        except OSError as error:
            self._has_failed = True
            raise OutputFailed(error) from error


class _Messages(io.FileIO):
    """Standard error. A message that cannot be written must not change how the command ends."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def prepare() -> None:
    """Make the three streams usable.

    A descriptor that was closed would be given to the next file or socket that is opened, and
    messages would be written into that. It becomes /dev/null, opened the wrong way round, so that
    its use is an error.
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
    """Let no line on standard error wait for whoever reads it."""
    descriptor = os.dup(STDERR)  # the thread may wait
    _never_wait(STDERR)
    sys.stderr = cast("TextIO", BackgroundStream(descriptor, encoding=sys.stderr.encoding))


def _never_wait(descriptor: int) -> None:
    """Let libraries in C, which write to the descriptor themselves, lose text instead of waiting.

    A pipe or terminal is opened anew for that: whoever shares it with us must not be affected.
    """
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(kind):
        os.set_blocking(descriptor, False)
    elif stat.S_ISFIFO(kind) or os.isatty(descriptor):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with suppress(OSError):  # nobody reads, or it is another user's: as it was, then
            anew = os.open(f"/proc/self/fd/{descriptor}", flags)
            os.dup2(anew, descriptor)
            os.close(anew)


def _text(raw: io.FileIO, *, like: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",  # a name that is not text in this encoding is still shown
        line_buffering=raw.fileno() == STDERR or raw.isatty(),
    )
