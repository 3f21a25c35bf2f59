"""Opening files in folders where an agent may have replaced any file by a link or a pipe."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

MAX_READ_BYTES: Final = 1 << 20


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file; never wait for it and follow no link. A new file gets mode 0600.

    Raises:
        OSError: the file does not exist or is not regular. A pipe, for example, could block for
            ever.
    """
    wanted = flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, wanted, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_start(path: Path) -> bytes:
    """Return the first MiB of a regular file.

    Raises:
        OSError: see `open_regular`.
    """
    descriptor = open_regular(path, os.O_RDONLY)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - it is open already
        return file.read(MAX_READ_BYTES)
