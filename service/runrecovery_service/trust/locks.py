"""A lock of our own, by which all services on a host edit a file one after the other.

What its file holds is drawn once, at random, and says where we are: what was done to a file is
known to be undone only in the place that it was done in. A file system that is not mounted, or
another one in its place, has no such lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from runrecovery_service.trust.errors import TrustFileBusy, TrustFileOutOfReach

_STEP_S: Final = 0.01
"""Between two tries for the lock."""
_TOKEN: Final = re.compile(rb"([0-9a-f]{32})\n")


@contextmanager
def locked(path: Path, *, wait_s: float, pause: Callable[[float], object]) -> Iterator[str]:
    """Hold the lock file, against other processes and other threads alike; gives its token.

    The file stays when the lock is let go: whoever removed it could take it from somebody who
    waits for it. The kernel lets go when its holder dies.

    Raises:
        TrustFileBusy: others held it for `wait_s` seconds.
        TrustFileOutOfReach: it cannot be opened.
    """
    descriptor = _held(path, tries=1 + round(wait_s / _STEP_S), pause=pause)
    try:
        yield _token_of(descriptor, path)
    finally:
        os.close(descriptor)


def token(path: Path) -> str | None:
    """Return the token in a lock file, None where there is none. Takes no lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _held(path: Path, *, tries: int, pause: Callable[[float], object]) -> int:
    """Return the lock file, opened and locked."""
    for left in range(tries - 1, -1, -1):
        descriptor = _open(path)
        try:
            # One that somebody has removed meanwhile keeps nobody out.
            if _take(descriptor, path) and _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if left:
            pause(_STEP_S)
    raise TrustFileBusy(path, "others hold the lock")


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


def _take(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise TrustFileOutOfReach(path, error.errno or 0, f"the lock: {error}") from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _token_of(descriptor: int, path: Path) -> str:
    """Return what the lock file holds; write it if it is new, or was cut off at that."""
    try:
        found = _read(descriptor)
        if found is None:
            found = secrets.token_hex(16)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{found}\n".encode(), 0)
            os.fsync(descriptor)
    except OSError as error:
        raise TrustFileOutOfReach(path, error.errno or 0, f"the lock: {error.strerror}") from error
    return found


def _read(descriptor: int) -> str | None:
    found = _TOKEN.fullmatch(os.pread(descriptor, 64, 0))
    return None if found is None else found[1].decode()
