"""Locks that a service holds for life: on lock files, and on the SQLite file itself."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from runrecovery_service.domain.errors import DataDirRefused, Held
from runrecovery_service.storage import wal_index
from runrecovery_service.storage.wal_index import Frame, WalIndex

LOCK_TABLE: Final = Path("/proc/locks")
APPLICATION_ID: Final = 0x52524356
"""`RRCV`, in the header of every SQLite file of ours."""
APPLICATION_ID_BYTES: Final = APPLICATION_ID.to_bytes(4, "big")
SQLITE_HEADER_SIZE: Final = 100
SQLITE_MAGIC: Final = b"SQLite format 3\0"
OVERWRITTEN: Final = "was cut short or overwritten"


class Lock(ABC):
    """An exclusive `flock` on one file. The kernel releases it when the process dies."""

    def __init__(self, path: Path, what: str, *, create: bool) -> None:
        """Take the lock.

        Raises:
            Held: another process has it; the error names it.
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
            if self.is_in_place():  # else it was removed or replaced between the two calls
                return
            os.close(self._descriptor)

    @abstractmethod
    def _holder(self) -> str:
        """Return who holds the file."""

    def is_in_place(self) -> bool:
        """True while the path still leads to the file that is locked."""
        return identity(self._path) == _identity(os.fstat(self._descriptor))

    def demand_in_place(self) -> None:
        """Raise DataDirRefused if another service could lock the path now."""
        if not self.is_in_place():
            raise DataDirRefused(
                self._what, f"{self._path} was removed or replaced under the running service"
            )

    @property
    def name(self) -> str:
        """Return what names the locked file on this machine, by whatever path it is reached."""
        device, inode = _identity(os.fstat(self._descriptor))
        return f"{device}:{inode}"

    def release(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


class LockFile(Lock):
    """A file that exists to be locked, and names its holder."""

    def __init__(self, path: Path, what: str, holder: str) -> None:
        """Take the lock and write the holder into the file.

        Raises:
            Held: another process has it; the error quotes the file.
        """
        super().__init__(path, what, create=True)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, holder.encode(), 0)

    def _holder(self) -> str:
        text = os.pread(self._descriptor, 500, 0).decode(errors="replace").strip()
        return text or "an unknown process"

    def release(self) -> None:
        """Release the lock and empty the file. After a crash the file still names who died."""
        os.ftruncate(self._descriptor, 0)
        super().release()


class DatabaseLock(Lock):
    """A lock on the SQLite file itself, by whatever path or hard link it was reached.

    SQLite locks with `fcntl`, which a `flock` neither blocks nor releases. But closing *any*
    descriptor of a file drops all `fcntl` locks that the process has on it: take this lock before
    the first connection and release it after the last.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            Held: another service uses this file.
        """
        super().__init__(path, f"database {path}", create=False)

    def _holder(self) -> str:
        """Find the holder's pid: the file itself cannot name it.

        The holder did not need the lock files that this process has: it came by another path, or
        they were removed under it.
        """
        holder = "an unknown process"
        found = os.fstat(self._descriptor)
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        with contextlib.suppress(OSError):
            for line in LOCK_TABLE.read_text().splitlines():
                words = line.split()
                if words[1] == "FLOCK" and words[5] == f"{device}:{found.st_ino}":
                    pid = words[4]  # 0 in another pid namespace
                    holder = "a process of another container" if pid == "0" else f"pid {pid}"
        return f"{holder}, through another lock file or path"


class StoreFiles:
    """The SQLite file, its log and the log's index, as they are while the store is in use.

    SQLite does not notice that one of them was removed or replaced: its open connections go on with
    the old files, its new ones with the new files. Nor that one was overwritten in place.
    """

    def __init__(self, path: Path) -> None:
        """Note the files. A connection that has read must be open, and stay open: the last one
        that is closed removes the log."""
        self._names = [str(path), f"{path}-wal", f"{path}-shm"]
        self._lost: str | None = None
        self._frame: Frame | None = None
        self._file: tuple[tuple[bytes, int], bytes, int] | None = None
        self._descriptors: list[int] = []
        # Kept: to close one drops the locks that SQLite has in this process on that file.
        with contextlib.suppress(FileNotFoundError):
            for name in self._names:
                self._descriptors.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
        self._identities = [_identity(os.fstat(one)) for one in self._descriptors]

    def lost(self) -> str | None:
        """Return what happened to a file. Once something did, the answer stays.

        Raises:
            OSError: the system does not tell, over permissions for example.
        """
        if self._lost is None:
            self._lost = self._moved() or self._overwritten()
        return self._lost

    @property
    def can_be_rescued(self) -> bool:
        """True unless what the open connections see was changed under them."""
        return not (self._lost or "").endswith(OVERWRITTEN)

    def close(self) -> None:
        """Close the files, after the last connection."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _moved(self) -> str | None:
        for name, noted in itertools.zip_longest(self._names, self._identities):
            if noted is None or identity(name) != noted:
                return f"{name} was removed or replaced"
        return None

    def _overwritten(self) -> str | None:
        file, log, _ = self._descriptors
        before = self._index()
        header, size = os.pread(file, SQLITE_HEADER_SIZE, 0), os.fstat(file).st_size
        if not header.startswith(SQLITE_MAGIC) or header[68:72] != APPLICATION_ID_BYTES:
            return f"{self._names[0]} {OVERWRITTEN}"
        if before is None:
            return None
        noted, held = self._frame, True
        if before.last.number:
            held = _holds(log, before.last)
            if held and noted and noted.salt == before.last.salt:
                held = noted.number > before.last.number or _holds(log, noted)
        if self._index() != before:  # SQLite is writing
            return None
        if not held:
            return f"{self._names[1]} {OVERWRITTEN}"
        self._frame = before.last if before.last.number else None
        state, known = before.file_state, self._file
        if state is not None:
            if known is not None and known[0] == state and known[1:] != (header, size):
                return f"{self._names[0]} {OVERWRITTEN}"
            self._file = (state, header, size)
        return None

    def _index(self) -> WalIndex | None:
        return wal_index.parse(os.pread(self._descriptors[2], wal_index.SIZE, 0))


def _holds(log: int, frame: Frame) -> bool:
    """True if a log has its header, and a frame in its place."""
    if os.fstat(log).st_size < frame.end or os.pread(log, 8, 16) != frame.salt:
        return False
    return frame.is_in(os.pread(log, wal_index.FRAME_HEADER_SIZE, frame.offset))


def identity(path: str | Path) -> tuple[int, int] | None:
    """Return the device and inode that a path leads to, or None when there is no file."""
    try:
        return _identity(os.stat(path))  # noqa: PTH116 - a third of the time, at every transaction
    except (FileNotFoundError, NotADirectoryError):
        return None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
