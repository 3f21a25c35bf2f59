"""Watches the files of a SQLite store, so that a service stops when one is lost.

SQLite does not notice when a file is removed or replaced: open connections keep the old file, and
new connections use the new file. SQLite does not notice either when a file is overwritten in place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Final

from runrecovery_service.storage import wal_index
from runrecovery_service.storage.file_identity import identity, identity_of
from runrecovery_service.storage.sqlite_header import (
    APPLICATION_ID_BYTES,
    SQLITE_HEADER_SIZE,
    SQLITE_MAGIC,
)
from runrecovery_service.storage.wal_index import Frame

OVERWRITTEN: Final = "was cut short or overwritten"


class StoreFiles:
    """The SQLite file, its log and the log's index, as they were when the watch began."""

    def __init__(self, path: Path) -> None:
        """Record the files.

        Before this call, a SQLite connection must have read from the database. That connection must
        stay open: SQLite deletes the log when the last connection is closed.
        """
        self._names = [str(path), f"{path}-wal", f"{path}-shm"]
        self._lost: str | None = None
        self._frame: Frame | None = None
        self._file: tuple[tuple[bytes, int], bytes, int] | None = None
        # Kept open: closing a descriptor drops SQLite's locks of this process on that file.
        self._descriptors: list[int] = []
        with contextlib.suppress(FileNotFoundError):
            for name in self._names:
                self._descriptors.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
        self._identities = [identity_of(os.fstat(one)) for one in self._descriptors]

    def lost(self) -> str | None:
        """Return a text about the lost file; None if no file is lost. A loss is final.

        Raises:
            OSError: the files cannot be checked, for example because a permission is missing.
        """
        if self._lost is None:
            self._lost = self._moved() or self._overwritten()
        return self._lost

    @property
    def can_be_rescued(self) -> bool:
        """Whether the open connections can still read every row: no file was overwritten."""
        return not (self._lost or "").endswith(OVERWRITTEN)

    def close(self) -> None:
        """Close the files. Call this after the last connection is closed."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _moved(self) -> str | None:
        for name, noted in itertools.zip_longest(self._names, self._identities):
            if noted is None or identity(name) != noted:
                return f"{name} was removed or replaced"
        return None

    def _overwritten(self) -> str | None:
        file, log, _ = self._descriptors
        raw = self._read_index()
        before = wal_index.parse(raw)
        header, size = os.pread(file, SQLITE_HEADER_SIZE, 0), os.fstat(file).st_size
        if not header.startswith(SQLITE_MAGIC) or header[68:72] != APPLICATION_ID_BYTES:
            return f"{self._names[0]} {OVERWRITTEN}"
        if before is None:
            return None
        last, earlier, is_whole = before.last, self._frame, True
        if last.number:
            is_whole = _has_frame(log, last)
            if is_whole and earlier and earlier.salt == last.salt:
                is_whole = earlier.number > last.number or _has_frame(log, earlier)
        if not wal_index.is_same(
            self._read_index(), raw
        ):  # SQLite is writing: the next check decides
            return None
        if not is_whole:
            return f"{self._names[1]} {OVERWRITTEN}"
        self._frame = last if last.number else None
        state, known = before.file_state, self._file
        if state is not None:
            if known is not None and known[0] == state and known[1:] != (header, size):
                return f"{self._names[0]} {OVERWRITTEN}"
            self._file = (state, header, size)
        return None

    def _read_index(self) -> bytes:
        return os.pread(self._descriptors[2], wal_index.SIZE, 0)


def _has_frame(log: int, frame: Frame) -> bool:
    """Return whether the log still has this frame, and the header that belongs to it."""
    if os.fstat(log).st_size < frame.end or os.pread(log, 8, 16) != frame.salt:
        return False
    return frame.is_in(os.pread(log, wal_index.FRAME_HEADER_SIZE, frame.offset))
