"""A lock of our own, by which all services on a host edit a file one after the other."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from runrecovery_service.trust.errors import TrustFileBusy, TrustFileOutOfReach

_STEP_S: Final = 0.01
"""Between two tries for the lock."""


@contextmanager
def locked(path: Path, *, wait_s: float, pause: Callable[[float], object]) -> Iterator[None]:
    """Hold the lock file, against other processes and other threads alike.

    The file stays when the lock is let go: whoever removed it could take it from somebody who
    waits for it. The kernel lets go when its holder dies.

    Raises:
        TrustFileBusy: others held it for `wait_s` seconds.
        TrustFileOutOfReach: it cannot be opened.
    """
    descriptor = _open(path)
    try:
        _acquire(descriptor, path, tries=1 + round(wait_s / _STEP_S), pause=pause)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise TrustFileOutOfReach(path, error.errno or 0, f"the lock: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TrustFileOutOfReach(path, errno.EINVAL, "the lock is no regular file")
    return descriptor


def _acquire(descriptor: int, path: Path, *, tries: int, pause: Callable[[float], object]) -> None:
    for left in range(tries - 1, -1, -1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                pause(_STEP_S)
        except OSError as error:
            raise TrustFileOutOfReach(path, error.errno or 0, f"the lock: {error}") from error
        else:
            return
    raise TrustFileBusy(path, "others hold the lock")
