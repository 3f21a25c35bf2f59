"""Standard output of an agent that is not in its output file yet, in memory shared with the shim.

One system call (splice) moves the bytes from the pipe into this memory. So whenever the service is
killed, they are in the pipe, in the spool or in the output file. The shim then saves what is not in
the file (`output_rest.py`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from threading import Lock
from typing import Final

from runrecovery_service.process import wire

READ_BYTES: Final = 65536
_NAME, _MFD_CLOEXEC = "stdout", 1
FREED_BYTES: Final = 1 << 18
"""Memory is freed in pieces of at least this size."""


class Spool:
    """The raw output of one process, at growing offsets. Frees memory once the output file has it.

    `fill` and `read` belong to the event loop, `note_kept` to any thread.

    Args:
        kept_bytes: the size of the output file before the process prints anything.

    Raises:
        OSError: no descriptor or memory is left.
    """

    def __init__(self, *, kept_bytes: int = 0) -> None:
        self.descriptor = _open_memory()
        self.end = self._kept_to = self._freed_to = wire.POSITION_BYTES
        self._lock = Lock()
        self._is_open = True
        self._write_position(kept_bytes, kept_bytes)

    def fill(self, pipe: int) -> int:
        """Move up to `READ_BYTES` out of a pipe; return their number, 0 at the end of the pipe.

        Raises:
            BlockingIOError: the pipe is empty, and something can still write to it.
        """
        self._give_memory_back()
        moved = os.splice(pipe, self.descriptor, READ_BYTES, offset_dst=self.end)
        self.end += moved
        return moved

    def read(self, begin: int, most: int) -> bytes:
        """Return up to `most` bytes from an offset."""
        return os.pread(self.descriptor, min(most, self.end - begin), begin)

    def note_kept(self, upto: int, *, size: int | None, begin: int | None) -> None:
        """Record that the output file has the output before an offset.

        The record is one system call, which a kill does not interrupt.

        Args:
            size: the size of the file; None: some output was lost.
            begin: the size before the first output of this process; None: the file lacks some of
                this output.
        """
        with self._lock:
            if self._is_open:  # otherwise the number may already belong to another file
                self._kept_to = upto
                self._write_position(
                    wire.UNKNOWN if size is None else size, wire.UNKNOWN if begin is None else begin
                )

    def close(self) -> None:
        """Give the memory back, once the shim has closed it too."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self.descriptor)

    def _write_position(self, size: int, begin: int) -> None:
        position = wire.Position(start=self._kept_to, kept=size, begin=begin)
        os.pwrite(self.descriptor, wire.pack_position(position), 0)

    def _give_memory_back(self) -> None:
        """Free whole pages that the output file has, but never the first page with the position."""
        first = -(-self._freed_to // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self._kept_to // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length >= FREED_BYTES:
            with mmap.mmap(self.descriptor, length, offset=first) as pages:
                pages.madvise(mmap.MADV_REMOVE)
            self._freed_to = first + length


def _open_memory() -> int:
    """Return the descriptor of an empty file in memory.

    Raises:
        OSError: no descriptor is left.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(_NAME)
    # Some builds of Python lack the function, but not the C library that they run with.
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.memfd_create(_NAME.encode(), _MFD_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor
