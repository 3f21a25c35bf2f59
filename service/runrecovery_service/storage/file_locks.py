"""Locks that a service holds until its end: on lock files, and on the SQLite file itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from runrecovery_service.domain.start_errors import DataDirRefused, Held
from runrecovery_service.storage.file_identity import identity, identity_of

LOCK_TABLE: Final = Path("/proc/locks")


class Lock(ABC):
    """An exclusive `flock` on one file. The kernel releases it when the process dies."""

    def __init__(self, path: Path, what: str, *, create: bool) -> None:
        """Take the lock.

        Raises:
            Held: another process has the lock; the error names the process.
        """
        self._path = path
        self._what = what
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        while True:
            self._descriptor = os.open(path, flags, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = self._holder()
                os.close(self._descriptor)
                raise Held(what, holder) from error
            except OSError:
                os.close(self._descriptor)
                raise
            if self.is_in_place():  # else the file was removed or replaced between open and lock
                return
            os.close(self._descriptor)

    @abstractmethod
    def _holder(self) -> str:
        """Return a text that names the process which holds the lock."""

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the locked file."""
        return identity(self._path) == identity_of(os.fstat(self._descriptor))

    def demand_in_place(self) -> None:
        """Raise DataDirRefused if the path no longer leads to the locked file.

        Another service could then lock the file at the path.
        """
        if not self.is_in_place():
            raise DataDirRefused(
                self._what, f"{self._path} was removed or replaced under the running service"
            )

    @property
    def name(self) -> str:
        """The identity of the locked file on this machine, the same for every path to it."""
        device, inode = identity_of(os.fstat(self._descriptor))
        return f"{device}:{inode}"

    def release(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


class LockFile(Lock):
    """A lock on a file that exists only for the lock. The file's content names the holder."""

    def __init__(self, path: Path, what: str, holder: str) -> None:
        """Take the lock and write the holder into the file.

        Raises:
            Held: another process has the lock; the error quotes the file.
        """
        super().__init__(path, what, create=True)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, holder.encode(), 0)

    def _holder(self) -> str:
        text = os.pread(self._descriptor, 500, 0).decode(errors="replace").strip()
        return text or "an unknown process"

    def release(self) -> None:
        """Release the lock and empty the file. After a crash the file names the dead holder."""
        os.ftruncate(self._descriptor, 0)
        super().release()


class DatabaseLock(Lock):
    """A lock on the SQLite file itself, whatever path or hard link leads to it.

    SQLite uses `fcntl` locks. The `flock` of this class neither blocks nor releases them. But
    closing *any* descriptor of a file drops all `fcntl` locks of the process on the file. Take this
    lock before the first connection, and release it after the last.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            Held: another service uses this file.
        """
        super().__init__(path, f"database {path}", create=False)

    def _holder(self) -> str:
        """Return a text with the holder's pid from the kernel's table of locks.

        The content of a database file cannot name the holder. The lock files do not name it
        either: the holder uses another path to the database, or its lock files were removed.
        """
        holder = "an unknown process"
        found = os.fstat(self._descriptor)
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        with contextlib.suppress(OSError):
            for line in LOCK_TABLE.read_text().splitlines():
                words = line.split()
                if words[1] == "FLOCK" and words[5] == f"{device}:{found.st_ino}":
                    pid = words[4]  # 0 for a process of another pid namespace
                    holder = "a process of another container" if pid == "0" else f"pid {pid}"
        return f"{holder}, through another lock file or path"
