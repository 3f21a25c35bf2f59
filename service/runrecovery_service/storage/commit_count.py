"""Counts the commits of a SQLite store twice, so that a start notices missing commits.

If the log of a database is removed, SQLite opens the database without the commits in the log, and
reports no error. Every transaction that changes a row therefore increments a counter in the store.
After the commit and before the acknowledgement, the counter is written into a marker file next to
the store. After a crash the file can be behind the store, but never ahead.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
from pathlib import Path
from typing import Final

MARKER_TEXT: Final = "A runrecovery database was created beside this file.\n"
_LINE: Final = "Commits acknowledged: {:020d}\n"
_COUNT: Final = re.compile(rb"Commits acknowledged: (\d{20})\n")


class CommitMarker:
    """The marker file next to a SQLite store, with the number of acknowledged commits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = len(MARKER_TEXT) + len(_LINE.format(0)) - 21
        self._lock = threading.Lock()
        self._written = 0

    def read(self) -> int | None:
        """Return how many commits were acknowledged; None if the file has no number."""
        try:
            found = _COUNT.search(self._path.read_bytes())
        except FileNotFoundError:
            return None
        return None if found is None else int(found.group(1))

    def first_text(self, commits: int) -> bytes:
        """Return the content of a new marker file."""
        return (MARKER_TEXT + _LINE.format(commits)).encode()

    def write(self, commits: int) -> None:
        """Write the number, unless the file has a higher one.

        The file is not synced, because it is allowed to be behind the store. An error is ignored:
        the commit is durable. At worst a later start notices fewer missing commits.
        """
        with self._lock, contextlib.suppress(OSError):
            if commits > self._written:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.pwrite(descriptor, f"{commits:020d}".encode(), self._offset)
                finally:
                    os.close(descriptor)
                self._written = commits


def stored_count(connection: sqlite3.Connection) -> int | None:
    """Return the counter of a store; None for a store of an older version, or a damaged one."""
    known = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'commit_count'"
    if connection.execute(known).fetchone() is None:
        return None
    row = connection.execute("SELECT commits FROM commit_count").fetchone()
    return row[0] if row is not None and isinstance(row[0], int) else None


def describe_loss(
    acknowledged: int | None, connection: sqlite3.Connection, marker: Path
) -> str | None:
    """Return how many acknowledged commits a store lacks, as a reason to refuse it; None: no loss.

    Args:
        acknowledged: the number in the marker file. Read it before the connection's snapshot
            begins, because a service may be committing.
    """
    counted = stored_count(connection)
    if acknowledged is None or counted is None or counted >= acknowledged:
        return None
    return (
        f"lacks {acknowledged - counted} commits that were acknowledged: its log (-wal) was removed"
        f" or damaged, or an older copy took its place. Put the log, or the newest copy, back."
        f" To continue without these commits, remove {marker.name}"
    )
