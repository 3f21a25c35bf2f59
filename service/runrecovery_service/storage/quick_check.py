"""Searches a SQLite store for damaged pages at a start, within a time limit."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from runrecovery_service.required_threads import start_thread

AFTER_STOP_S: Final = 0.5
AFTER_CRASH_S: Final = 10.0
"""Time limits of the search, after a planned stop and after a crash. SQLite's `quick_check` reads
some 0.5 GB per second if the file is in memory."""
REPEAT_S: Final = 0.05
"""Seconds between two interruptions. They are repeated, because an interruption between two
statements has no effect."""

log = structlog.get_logger()


def lacks_tables(connection: sqlite3.Connection) -> bool:
    """Return whether a file lacks the service's tables, for example after a failed repair."""
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'instance'").fetchone()
    return found is None


def find_damage(connection: sqlite3.Connection) -> str | None:
    """Return the first damage that SQLite finds within the time limit; None if it finds none.

    Raises:
        sqlite3.DatabaseError: the damage prevents the search itself.
    """
    within_s = AFTER_STOP_S if _was_stopped_in_order(connection) else AFTER_CRASH_S
    try:
        with _interrupting(connection, within_s):
            ((found,),) = connection.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        log.info("storage.check_cut_short", seconds=within_s)
        return None
    return None if found == "ok" else one_line(found)


def one_line(finding: str) -> str:
    """Return one finding of a check as one line, without the heading."""
    return " ".join(finding.removeprefix("*** in database main ***").split())


def _was_stopped_in_order(connection: sqlite3.Connection) -> bool:
    """Return whether the last service stopped as planned, and so released its lease."""
    held = connection.execute("SELECT 1 FROM instance WHERE lease_until > 0 LIMIT 1").fetchone()
    return held is None


@contextmanager
def _interrupting(connection: sqlite3.Connection, within_s: float) -> Iterator[None]:
    """Interrupt the connection's statement inside the block after `within_s` seconds."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(within_s):
            connection.interrupt()
            while not done.wait(REPEAT_S):
                connection.interrupt()

    watcher = start_thread(watch, "storage-check")
    try:
        yield
    finally:
        done.set()
        watcher.join()
