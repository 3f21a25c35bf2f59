"""Makes chosen calls of a service to its database fail. Runs in the service, before its `main`.

A *site* is a place of the service that calls its database: its functions on the stack, and the
statement. The environment variable `FAULTS` names a folder with a `plan.json`. The sites that the
service reaches, and the faults that were made, are written to `journal.jsonl` beside it.

`python database_calls.py -m runrecovery_service serve …` starts a service in that way.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import runpy
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

FOLDER: Final = "FAULTS"
CONNECT: Final = "CONNECT"
FETCH: Final = "FETCH"
STATEMENT_CHARS: Final = 80
_PLUMBING: Final = frozenset(
    {"async_storage.py", "database.py", "group_commit.py", "postgresql.py", "use_case.py"}
)
"""Modules that run the statements of other modules, and so do not tell one site from another."""
_PLACEHOLDERS: Final = re.compile(r"(\?|%s)(, ?(\?|%s))+")
_BOUNDS: Final = ("BEGIN", "SAVEPOINT", "RELEASE")

Act = Callable[[], Any]
Fail = Callable[[Any, Act], Any]
"""Fails a call. It gets the connection (None: the call connects), and what would make the call."""


class Calls:
    """Counts the calls to the database, and makes those fail that a plan names."""

    def __init__(self, folder: Path, kinds: dict[str, Fail]) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        self._journal = (folder / "journal.jsonl").open("a+b", buffering=0)
        self._journal.seek(0)
        made = [json.loads(line).get("fault") for line in self._journal]  # by earlier starts
        self._faults = {
            (fault["site"], fault["nth"]): fault for fault in plan["faults"] if fault not in made
        }
        self._kinds = kinds
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._outage: tuple[str, float] = ("", 0.0)
        self._within = threading.local()
        atexit.register(self._write_counts)

    def run(self, connection: Any, statement: str, act: Act) -> Any:
        """Make one call, or fail it."""
        # A ROLLBACK fails only with its connection, which the next call notices. The rest are
        # statements of a fault itself.
        if statement.startswith("ROLLBACK") or getattr(self._within, "fails", False):
            return act()
        site = self._site(connection, statement)
        kind = self._fault_of(site)
        if kind is None:
            return act()
        self._within.fails = True
        try:
            return self._kinds[kind](connection, act)
        finally:
            self._within.fails = False

    def _site(self, connection: Any, statement: str) -> str:
        text = _PLACEHOLDERS.sub("?", " ".join(statement.split()))[:STATEMENT_CHARS]
        if text.startswith("COMMIT"):
            # The use case is not on the stack any more, so its latest statement tells which it is.
            name = f"COMMIT after {getattr(self._within, 'latest', '')}"
        else:
            callers = _callers()
            name = f"{text} | {callers}"
            if callers and text != FETCH and not text.startswith(_BOUNDS):
                self._within.latest = name
        return name

    def _fault_of(self, name: str) -> str | None:
        site = hashlib.blake2s(name.encode(), digest_size=4).hexdigest()
        with self._lock:
            self._counts[site] += 1
            nth = self._counts[site]
            if nth == 1:
                self._write({"site": site, "name": name, "at": time.time()})
            kind, until_s = self._outage
            if time.monotonic() < until_s:
                return kind
            fault = self._faults.pop((site, nth), None)
            if fault is None:
                return None
            self._outage = (fault["kind"], time.monotonic() + fault["seconds"])
            self._write({"fault": fault, "name": name, "at": time.time()})
            return str(fault["kind"])

    def _write_counts(self) -> None:
        self._write({"counts": self._counts})

    def _write(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")


def _callers() -> str:
    names = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        folder, _, file = code.co_filename.rpartition("/")
        if "runrecovery_service" in folder and file not in _PLUMBING:
            names.append(f"{file.removesuffix('.py')}.{code.co_qualname}")
        frame = frame.f_back
    return " < ".join(names)


# -- SQLite --------------------------------------------------------------------------------------


def _sqlite_kind(code: int, message: str, *, rolls_back: bool = False) -> Fail:
    """Return what fails a call as SQLite does.

    Args:
        rolls_back: whether SQLite ends the transaction by itself, as it may do after such errors.
    """

    def fail(connection: Any, _: Act) -> Any:
        if rolls_back and connection is not None and connection.in_transaction:
            sqlite3.Connection.rollback(connection)
        error = sqlite3.OperationalError(message)
        if code == sqlite3.SQLITE_CORRUPT:
            error = sqlite3.DatabaseError(message)  # type: ignore[assignment]
        error.sqlite_errorcode = code
        error.sqlite_errorname = "SQLITE_…"
        raise error

    return fail


SQLITE_KINDS: Final[dict[str, Fail]] = {
    "busy": _sqlite_kind(sqlite3.SQLITE_BUSY, "database is locked"),
    "full": _sqlite_kind(sqlite3.SQLITE_FULL, "database or disk is full"),
    "full-rolled-back": _sqlite_kind(
        sqlite3.SQLITE_FULL, "database or disk is full", rolls_back=True
    ),
    "sync-failed": _sqlite_kind(sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error", rolls_back=True),
    "read-only": _sqlite_kind(
        sqlite3.SQLITE_READONLY, "attempt to write a readonly database"
    ),
    "damaged": _sqlite_kind(sqlite3.SQLITE_CORRUPT, "database disk image is malformed"),
    "interrupted": _sqlite_kind(sqlite3.SQLITE_INTERRUPT, "interrupted", rolls_back=True),
}  # fmt: skip


def _wrap_sqlite(calls: Calls) -> None:
    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, *given: Any) -> Any:
            return calls.run(self.connection, sql, lambda: super(Cursor, self).execute(sql, *given))

        def fetchone(self) -> Any:
            return self._fetch(super().fetchone)

        def fetchall(self) -> Any:
            return self._fetch(super().fetchall)

        def _fetch(self, fetch: Act) -> Any:
            try:
                return calls.run(self.connection, FETCH, fetch)
            except sqlite3.Error:
                self.close()  # as after an error of SQLite: the snapshot of the read ends
                raise

    class Connection(sqlite3.Connection):
        def cursor(self, _: Any = None) -> Any:
            return super().cursor(Cursor)

        def execute(self, *given: Any) -> Any:
            return self.cursor().execute(*given)

    connect = sqlite3.connect

    def connect_counted(*given: Any, **named: Any) -> Any:
        return calls.run(None, CONNECT, lambda: connect(*given, factory=Connection, **named))

    sqlite3.connect = connect_counted


# -- PostgreSQL ----------------------------------------------------------------------------------


def _raised_by_server(sqlstate: str, message: str) -> Fail:
    """Return what makes the server itself raise an error, which aborts the transaction."""
    raising = f"DO $$ BEGIN RAISE '{message}' USING ERRCODE = '{sqlstate}'; END $$"

    def fail(connection: Any, act: Act) -> Any:
        if connection is None or _is_aborted(connection):
            return act()  # a server cannot raise it here
        connection.execute(raising)
        raise AssertionError("the server raised no error")

    return fail


def _is_aborted(connection: Any) -> bool:
    return int(connection.info.transaction_status) == 3  # INERROR


def _lose(connection: Any, act: Act) -> Any:
    """Cut the connection before the call."""
    from runrecovery_service.storage.postgresql import cut

    if connection is None:
        raise _connect_error("Connection refused")
    cut(connection)
    return act()


def _lose_afterwards(connection: Any, act: Act) -> Any:
    """Cut the connection once the server has carried out the call, before its answer is read."""
    if connection is None:
        return _lose(connection, act)
    act()
    return _lose(connection, lambda: connection.execute("SELECT 1"))


def _end_session(connection: Any, act: Act) -> Any:
    if connection is None:
        raise _connect_error("FATAL:  the database system is shutting down")
    connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    return act()


def _refuse_connects(connection: Any, act: Act) -> Any:
    """Lose the connection, and refuse new ones, because the server has no slot."""
    if connection is None:
        raise _connect_error("FATAL:  sorry, too many clients already")
    return _lose(connection, act)


def _connect_error(words: str) -> Exception:
    import psycopg

    return psycopg.OperationalError(
        f'connection failed: connection to server on socket "…" {words}'
    )


POSTGRESQL_KINDS: Final[dict[str, Fail]] = {
    "lost": _lose,
    "lost-afterwards": _lose_afterwards,
    "serialization": _raised_by_server("40001", "could not serialize access"),
    "deadlock": _raised_by_server("40P01", "deadlock detected"),
    "full": _raised_by_server("53100", "could not extend file: No space left on device"),
    "shutdown": _end_session,
    "no-connections": _refuse_connects,
}


def _wrap_postgresql(calls: Calls) -> None:
    import psycopg

    execute, connect = psycopg.Cursor.execute, psycopg.connect

    def execute_counted(self: Any, query: Any, *given: Any, **named: Any) -> Any:
        text = query if isinstance(query, str) else repr(query)
        return calls.run(self.connection, text, lambda: execute(self, query, *given, **named))

    def connect_counted(*given: Any, **named: Any) -> Any:
        return calls.run(None, CONNECT, lambda: connect(*given, **named))

    psycopg.Cursor.execute = execute_counted  # type: ignore[method-assign]
    psycopg.connect = connect_counted


def prepare() -> None:
    """Wrap the driver of the planned kinds, and break the service by the planned mutant."""
    folder = Path(os.environ.pop(FOLDER))
    plan = json.loads((folder / "plan.json").read_text())
    if plan["database"] == "sqlite":
        _wrap_sqlite(Calls(folder, SQLITE_KINDS))
    else:
        _wrap_postgresql(Calls(folder, POSTGRESQL_KINDS))
    if plan["mutant"]:
        mutants = runpy.run_path(str(Path(__file__).with_name("mutants.py")))
        mutants["MUTANTS"][plan["mutant"]].apply()


if __name__ == "__main__":
    # What follows is `python -m module arguments…`.
    _, _, _, module_name, *arguments = sys.argv
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
    prepare()
    sys.argv = [module_name, *arguments]
    runpy.run_module(module_name, run_name="__main__", alter_sys=True)
