"""Chooses the size of the pipe for the standard output of an agent.

The pipe is large, because agent CLIs exit without writing the rest of their output to a full pipe.
But the kernel adds up the pipes of each ordinary user. Once they reach `fs.pipe-user-pages-soft`,
every new pipe of that user holds only two pages. So the service uses at most half of that limit.
"""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import Final

LARGEST_BYTES: Final = 1 << 20
"""The usual fs.pipe-max-size: a larger pipe needs privileges."""
USUAL_BYTES: Final = 1 << 16
PAGE_BYTES: Final = 4096
SOFT_LIMIT: Final = Path("/proc/sys/fs/pipe-user-pages-soft")


def stdout_pipe_bytes(processes: int, *, limit: Path = SOFT_LIMIT) -> int:
    """Return the size of each pipe in bytes: a power of two, at least the usual size.

    Args:
        limit: the file with the kernel's limit in pages; 0 means none.
    """
    try:
        pages = int(limit.read_text("ascii"))
    except (OSError, ValueError):
        return USUAL_BYTES
    size = LARGEST_BYTES
    while pages and size > USUAL_BYTES and size * processes > pages * PAGE_BYTES // 2:
        size //= 2
    return size


def widen_pipe(descriptor: int, size: int) -> None:
    """Let a pipe hold this many bytes. If the kernel refuses, the pipe stays as it is."""
    if size > USUAL_BYTES:
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, size)
