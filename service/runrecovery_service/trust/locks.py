"""The lock with which all services on a host edit a file one after the other.

The lock file contains a random token, which identifies the place of the edited file. An entry can
only be removed in the place in which it was added. If a file system is not mounted, or another one
is mounted instead, the lock file is missing or has another token.

No lock library is used, because the token must be read and written through the open file that holds
the lock.
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
"""Time between two tries for the lock."""
_TOKEN: Final = re.compile(rb"([0-9a-f]{32})\n")


@contextmanager
def lock(path: Path, *, wait_s: float, pause: Callable[[float], object]) -> Iterator[str]:
    """Acquire the lock against other processes and threads; yield its token.

    The lock file stays after the release. Its removal could take the lock from a process that
    waits for it. The kernel releases the lock if its holder dies.

    Raises:
        TrustFileBusy: others held the lock for `wait_s` seconds.
        TrustFileOutOfReach: the lock file cannot be opened.
    """
    descriptor = _acquire(path, tries=1 + round(wait_s / _STEP_S), pause=pause)
    try:
        yield _ensure_token(descriptor, path)
    finally:
        os.close(descriptor)


def read_token(path: Path) -> str | None:
    """Return the token in a lock file, or None. Acquire no lock."""
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


def _acquire(path: Path, *, tries: int, pause: Callable[[float], object]) -> int:
    """Return the descriptor of the lock file, opened and locked."""
    for left in range(tries - 1, -1, -1):
        descriptor = _open(path)
        try:
            # A lock file that was removed meanwhile excludes nobody.
            if _try_lock(descriptor, path) and _is_at(descriptor, path):
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
        raise TrustFileOutOfReach(path, errno.EINVAL, "the lock is not a regular file")
    return descriptor


def _try_lock(descriptor: int, path: Path) -> bool:
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


def _ensure_token(descriptor: int, path: Path) -> str:
    """Return the token of the lock file. Write one if the file is new or its token is damaged."""
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
