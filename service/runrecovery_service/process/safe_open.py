"""Opening files in places that agents may write to: they may be replaced by anything."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

MOST_READ: Final = 1 << 20


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file, made with mode 0600 if `flags` say so; never wait, follow no link.

    Raises:
        OSError: it is not there, or not a regular file: a pipe could be waited for for ever.
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
        OSError: as `open_regular`.
    """
    descriptor = open_regular(path, os.O_RDONLY)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - it is open already
        return file.read(MOST_READ)
