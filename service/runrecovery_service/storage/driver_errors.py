"""Maps the errors of database drivers to the service's errors, with a text and a remedy for each.

Callers, the log, `check` and the exit messages show these texts. No text contains a path or a value
from a row.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

import peewee as pw

from runrecovery_service.domain.errors import StorageBusy, StorageFull, StorageUnavailable
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import postgresql

DRIVER_ERRORS: Final[tuple[type[Exception], ...]] = (
    pw.PeeweeException,
    sqlite3.Error,  # errors while rows are fetched do not pass through peewee
    *((postgresql.PSYCOPG.Error,) if postgresql.PSYCOPG is not None else ()),
)
StorageError = StorageBusy | StorageFull | StorageUnavailable
REPAIR_HINT: Final = "docs/operations.md, *A damaged database*, says how to repair it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of failure of a database.

    Attributes:
        meaning: the error that a caller gets.
        what: the problem, as the end of a sentence that begins with "the database".
        remedy: what an operator can do, as an imperative; empty: only waiting helps.
        lasts: whether the next start would fail too.
    """

    meaning: type[StorageError]
    what: str
    remedy: str = ""
    lasts: bool = False

    @property
    def cause(self) -> str:
        """Return a sentence for callers and for the log."""
        return f"the database {self.what}; {self.remedy or 'retry later'}"

    def refusal(self, words: str) -> str:
        """Return why a start is refused, as the text after the database's name.

        Args:
            words: the driver's message.
        """
        return f"{self.what} ({words})" + (f"; {self.remedy}" if self.remedy else "")


_FULL: Final = Fault(
    meaning=StorageFull,
    what="cannot be written to: its disk is full",
    remedy="make room",
)
_LOCKED: Final = Fault(meaning=StorageBusy, what="is busy: another connection holds its lock")
_DAMAGED: Final = Fault(
    meaning=StorageUnavailable, what="is damaged", remedy=REPAIR_HINT, lasts=True
)
_READ_ERROR: Final = Fault(
    meaning=StorageUnavailable,
    what="cannot be read: the system reports an I/O error",
    remedy="see the system's log about the disk",
    lasts=True,
)
_WRITE_ERROR: Final = Fault(
    meaning=StorageUnavailable,
    what="cannot be written to: the system reports an I/O error",
    remedy="check the disk, read-only mounts, quotas, and the limit on file sizes (ulimit -f)",
    lasts=True,
)
_SQLITE: Final[dict[int, Fault]] = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_PROTOCOL: _LOCKED,
    sqlite3.SQLITE_INTERRUPT: Fault(meaning=StorageBusy, what="is busy: it interrupts statements"),
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_NOMEM: Fault(
        meaning=StorageUnavailable, what="cannot be used: the system has no memory left"
    ),
    sqlite3.SQLITE_READONLY: Fault(
        meaning=StorageUnavailable,
        what="cannot be written to: its files or directory are read-only",
        remedy="make them writable for the service's user",
        lasts=True,
    ),
    sqlite3.SQLITE_IOERR: Fault(
        meaning=StorageUnavailable,
        what="cannot be read or written to: the system reports an I/O error",
        remedy="see the system's log about the disk",
        lasts=True,
    ),
    sqlite3.SQLITE_IOERR_READ: _READ_ERROR,
    sqlite3.SQLITE_IOERR_SHORT_READ: _READ_ERROR,
    sqlite3.SQLITE_IOERR_WRITE: _WRITE_ERROR,
    sqlite3.SQLITE_IOERR_FSYNC: _WRITE_ERROR,
    sqlite3.SQLITE_IOERR_DIR_FSYNC: _WRITE_ERROR,
    sqlite3.SQLITE_IOERR_TRUNCATE: _WRITE_ERROR,
    sqlite3.SQLITE_IOERR_SHMSIZE: _WRITE_ERROR,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CANTOPEN: Fault(
        meaning=StorageUnavailable,
        what="cannot be opened",
        remedy="its files must exist, and the service's user must be able to read and write them",
        lasts=True,
    ),
}
"""The faults of SQLite. An extended result code without an entry uses the entry of its primary
code."""

_READ_ONLY: Final = Fault(
    meaning=StorageUnavailable,
    what="is read-only",
    remedy="it is a standby, or default_transaction_read_only is set",
)
_NO_CONNECTION: Final = Fault(
    meaning=StorageUnavailable,
    what="has no connection left",
    remedy="raise its limit (max_connections, or that of the role, database or pooler), or end"
    " other clients",
)
_SQLSTATES: Final[dict[str, Fault]] = {
    "40001": Fault(meaning=StorageBusy, what="is busy: transactions are in each other's way"),
    "40P01": Fault(meaning=StorageBusy, what="is busy: transactions are in each other's way"),
    "55P03": Fault(meaning=StorageBusy, what="is busy: another session holds a lock"),
    "57014": Fault(meaning=StorageBusy, what="is busy: a statement took too long"),
    "53100": _FULL,
    "53200": Fault(meaning=StorageUnavailable, what="has no memory left"),
    "53300": _NO_CONNECTION,
    "53": Fault(meaning=StorageUnavailable, what="has too few resources"),
    "25006": _READ_ONLY,
    "08": Fault(meaning=StorageUnavailable, what="does not answer"),
    "57": Fault(meaning=StorageUnavailable, what="is stopping or starting"),
    "58": Fault(
        meaning=StorageUnavailable,
        what="cannot read or write its own files",
        remedy="its own log says why",
    ),
    "XX001": Fault(
        meaning=StorageUnavailable, what="is damaged", remedy="restore a backup", lasts=True
    ),
    "XX002": Fault(
        meaning=StorageUnavailable,
        what="has a damaged index",
        remedy="rebuild its indexes (REINDEX), or restore a backup",
        lasts=True,
    ),
    "42501": Fault(
        meaning=StorageUnavailable,
        what="denies the service's role a permission",
        remedy="the role must own the service's tables",
        lasts=True,
    ),
    "42P01": Fault(
        meaning=StorageUnavailable,
        what="lacks a table of the service",
        remedy="restore the table or a backup, and check search_path",
        lasts=True,
    ),
}
"""The faults of PostgreSQL. An SQLSTATE without an entry uses the entry of its class, the first two
characters."""

UNREACHABLE: Final = Fault(
    meaning=StorageUnavailable, what="does not answer, or refuses the connection"
)
"""The fault of an error without SQLSTATE. PostgreSQL's driver raises it if there is no connection.
"""
UNREACHABLE_REMEDY: Final = "correct the cause named here, or start again"
"""The hint that follows the driver's message when a start fails."""


def fault_of(error: BaseException) -> Fault | None:
    """Return the database's fault; None: the error is a defect of the service or of one row.

    The search includes all causes of the error. After SQLite has rolled back by itself, the
    service's own rollback fails and hides the cause.
    """
    faults = [fault for link in error_chain(error) if (fault := _fault_of_one(link))]
    # After a lost connection the rollback fails too, with a less specific error.
    return next((fault for fault in faults if fault is not UNREACHABLE), next(iter(faults), None))


def to_domain_error(error: Exception) -> StorageError | None:
    """Return the domain error for a driver's error; None: the error is a defect of the service."""
    fault = fault_of(error)
    return None if fault is None else fault.meaning(cause=fault.cause)


def driver_message(error: Exception) -> str:
    """Return the driver's message in one line, without any value of a row."""
    words = [words for link in error_chain(error) if (words := postgresql.words_of(link))]
    # Of the first error: the error of a failed rollback is meaningless.
    words = words or [str(link) for link in error_chain(error) if _fault_of_one(link)]
    return words[-1] if words else str(error)


def is_damage(error: BaseException) -> bool:
    """Return whether SQLite has read a damaged page or file."""
    return fault_of(error) is _DAMAGED


def is_unstorable(error: BaseException) -> bool:
    """Return whether a value can never be stored, because of its text, number or size."""
    return isinstance(error, UnicodeError | OverflowError | pw.DataError)


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes and its contexts."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__context__, link.__cause__]


def _fault_of_one(error: BaseException) -> Fault | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return _SQLITE.get(code) or _SQLITE.get(code & 0xFF)
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return _SQLSTATES.get(sqlstate) or _SQLSTATES.get(sqlstate[:2])
    lost = type(error).__module__.startswith("psycopg") and type(error).__name__ in {
        "OperationalError",
        "InterfaceError",
        "ConnectionTimeout",
    }
    if lost and postgresql.refused_as_read_only(error):
        return _READ_ONLY
    if lost and postgresql.refused_as_full(error):
        return _NO_CONNECTION
    return UNREACHABLE if lost else None
