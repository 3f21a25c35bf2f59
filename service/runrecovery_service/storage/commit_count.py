"""Counts the commits of a SQLite store twice, so that a start notices that some are missing.

SQLite opens a database whose log was removed as if the commits in that log had never been. So every
transaction that changes something counts itself in the store, and once that is durable, before it
is acknowledged, the number is written into a file beside the store. That file can be behind the
store, when the service or the machine dies between the two, but never ahead of it.
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
    """The file beside a SQLite store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = len(MARKER_TEXT) + len(_LINE.format(0)) - 21
        self._lock = threading.Lock()
        self._written = 0

    def read(self) -> int | None:
        """Return how many commits were acknowledged; None if the file does not tell."""
        try:
            found = _COUNT.search(self._path.read_bytes())
        except FileNotFoundError:
            return None
        return None if found is None else int(found.group(1))

    def first_text(self, commits: int) -> bytes:
        """Return the whole content of a new file."""
        return (MARKER_TEXT + _LINE.format(commits)).encode()

    def write(self, commits: int) -> None:
        """Write the number, unless a later one is there. No `fsync`: only behind is allowed.

        An error is not raised: the commit stands, and a start after a loss notices less.
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
    """Return how many commits a store has counted; None in one of an older version."""
    known = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'commit_count'"
    if connection.execute(known).fetchone() is None:
        return None
    row = connection.execute("SELECT commits FROM commit_count").fetchone()
    return None if row is None else int(row[0])


def describe_loss(
    acknowledged: int | None, connection: sqlite3.Connection, marker: Path
) -> str | None:
    """Return what is wrong with a store that has fewer commits than were acknowledged.

    Read `acknowledged` before the connection's snapshot begins: a service may be at work.
    """
    counted = stored_count(connection)
    if acknowledged is None or counted is None or counted >= acknowledged:
        return None
    return (
        f"lacks {acknowledged - counted} commits that were acknowledged: its log (-wal) was removed"
        f" or damaged, or an older copy took its place. Put the log, or the newest copy, back."
        f" To go on without those commits, remove {marker.name}"
    )
