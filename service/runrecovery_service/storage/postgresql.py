"""PostgreSQL: settings of connections, requirements on the server, and cutting of connections."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final
from weakref import WeakKeyDictionary

import peewee as pw

PSYCOPG: Final = getattr(pw, "psycopg", None)
"""The driver, as peewee has imported it; None if the extra `postgres` is not installed."""

MIN_SERVER_VERSION: Final = 160000
"""PostgreSQL 16, the first version with IS JSON."""

CONNECTION_SETTINGS: Final = {
    "synchronous_commit": "on",
    "default_transaction_isolation": "read committed",
    "standard_conforming_strings": "on",
    "TimeZone": "UTC",
    "statement_timeout": "1min",
    "lock_timeout": "10s",
    # Below lock_timeout, so that a takeover gets the locks of a frozen service.
    "idle_in_transaction_session_timeout": "5s",
}
"""Settings that every connection makes, in place of those of the server, the database and the role.
The values have the form in which the server shows them."""

CONNECTION_PARAMETERS: Final = {
    "client_encoding": "UTF8",
    "target_session_attrs": "read-write",  # never a standby
    "connect_timeout": 5,
    # Notices within some 20 s that the network drops packets, even during a statement.
    "tcp_user_timeout": 10_000,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
}
"""Connection parameters of libpq."""

_REQUIRED_SETTINGS: Final = {
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "integer_datetimes": "on",
    **CONNECTION_SETTINGS,  # checked, because a pooler may drop them
}
_CONFLICTS: Final = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_FULL: Final = (
    "too many clients already",
    "connection slots are reserved",
    "too many connections for",  # the limit of a role or a database
    "no more connections allowed",  # PgBouncer
)
WORDS_MOST: Final = 500
STANDBY: Final = "the pooler leads to a standby"


class Unreadable(Exception):
    """The URL cannot be parsed. The error does not quote the URL, which may have a password."""


class _ChangedRows(threading.local):
    rows = 0


class PostgreSQL(pw.PostgresqlDatabase):
    """A database that can cut connections which hang because the network is silent.

    Attributes:
        is_pooled: whether a pooler can replace the server behind an open connection.
    """

    is_pooled = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Replaces peewee's lock. State is per thread, and one hanging connect would block all
        # threads.
        self._lock = contextlib.nullcontext()
        # By connection: the time (`monotonic`) at which its last statement began.
        self._connections: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._listed = threading.Lock()
        self._is_abandoned = False
        self._changed = _ChangedRows()

    def _connect(self) -> Any:
        self._demand_not_abandoned()
        connection = super()._connect()  # type: ignore[misc] # peewee's types lack it
        with self._listed:
            self._connections[connection] = monotonic()
        if self._is_abandoned:
            connection.close()
        self._demand_not_abandoned()
        return connection

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        connection = self.connection()  # type: ignore[no-untyped-call]
        with self._listed:
            self._connections[connection] = monotonic()
        cursor = super().execute_sql(sql, params)  # type: ignore[no-untyped-call]
        if cursor.rowcount > 0 and not cursor.statusmessage.startswith("SELECT"):
            self._changed.rows += cursor.rowcount
        return cursor

    async def connect_async(self) -> Any:
        """Return a new connection for the event loop, with the settings of all connections."""
        from psycopg import AsyncConnection  # noqa: PLC0415 - an extra

        self._demand_not_abandoned()
        return await AsyncConnection.connect(self.database, autocommit=True, **self.connect_params)

    def find_pooler(self) -> None:
        """Set `is_pooled`: whether a connection leads to a pooler, not to the server itself."""
        (server_pid,) = self.execute_sql("SELECT pg_backend_pid()").fetchone()
        connection: Any = self.connection()  # type: ignore[no-untyped-call]
        self.is_pooled = server_pid != connection.info.backend_pid

    def demand_primary(self) -> None:
        """Raise the error of a write to a standby if a pooler now leads to a standby."""
        if not self.is_pooled or PSYCOPG is None:
            return
        if self.execute_sql("SELECT pg_is_in_recovery()").fetchone() == (True,):
            raise PSYCOPG.errors.ReadOnlySqlTransaction(STANDBY)

    @property
    def changed_rows(self) -> int:
        """Return how many rows the calling thread's statements have changed so far."""
        return self._changed.rows

    def last_begun(self, connection: Any) -> float:
        """Return the time, as of `monotonic`, at which a connection's last statement began."""
        with self._listed:
            return self._connections.get(connection, 0.0)

    def _demand_not_abandoned(self) -> None:
        if self._is_abandoned and PSYCOPG is not None:
            raise PSYCOPG.OperationalError("the service has abandoned the database")

    def abandon(self) -> None:
        """Cut every connection, and refuse to open new ones."""
        self._is_abandoned = True
        with self._listed:
            connections = list(self._connections)
        for connection in connections:
            cut(connection)


def is_idle(connection: Any) -> bool:
    """Return whether a connection is open and not in a transaction."""
    return not connection.closed and int(connection.info.transaction_status) == 0  # IDLE


def cut(connection: Any) -> None:
    """Make a connection's running statement fail at once. Any thread may call this."""
    with (
        contextlib.suppress(Exception),  # a closed connection runs no statement
        socket.socket(fileno=os.dup(connection.fileno())) as wire,
    ):
        wire.shutdown(socket.SHUT_RDWR)


def prepare(url: str) -> PostgreSQL:
    """Return the database of a URL, without connecting to it.

    Raises:
        Unreadable: the URL cannot be parsed.
    """
    from psycopg import ProgrammingError  # noqa: PLC0415 - an extra
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    try:
        given = conninfo_to_dict(url)
    except ProgrammingError:
        raise Unreadable from None
    # If a password has an unescaped `@`, `:` or `/`, the rest of the password is parsed as host or
    # port.
    hosts, ports = (str(given.get(name) or "").split(",") for name in ("host", "port"))
    if any("@" in host[1:] for host in hosts) or not all(p.isdigit() for p in ports if p):
        raise Unreadable
    ours = " ".join(
        f"-c {name}={value.replace(' ', chr(92) + ' ')}"
        for name, value in CONNECTION_SETTINGS.items()
    )
    options = f"{given.get('options') or ''} {ours}".strip()
    return PostgreSQL(
        url, prefer_psycopg3=True, options=options, prepare_threshold=None, **CONNECTION_PARAMETERS
    )


def server_problem(fetch_one: Callable[[str], Sequence[Any] | None]) -> str | None:
    """Return why the store cannot use this server; None if it can."""
    columns = ", ".join(
        f"current_setting('{name}')" for name in ("server_version_num", *_REQUIRED_SETTINGS)
    )
    row = fetch_one(f"SELECT {columns}")
    if row is None:
        return "does not say its version"
    if (version := int(row[0])) < MIN_SERVER_VERSION:
        return f"PostgreSQL 16 or newer is needed, and this is {version // 10000}"
    for (name, wanted), found in zip(_REQUIRED_SETTINGS.items(), row[1:], strict=True):
        if found == wanted:
            continue
        if name == "server_encoding":
            return (
                f"has the encoding {found}, UTF8 is needed"
                " (CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0)"
            )
        reason = f"{name} is {found}, not {wanted}, although the connection sets it"
        return (
            f"{reason}; behind a pooler, set it for the role"
            if name in CONNECTION_SETTINGS
            else reason
        )
    return None


def refused_as_read_only(error: BaseException) -> bool:
    """Return whether the driver refused a connection because the server is read-only.

    The text comes from the driver (`target_session_attrs`), and is English in every locale of the
    server.
    """
    return "session is read-only" in str(error)


def refused_as_full(error: BaseException) -> bool:
    """Return whether a server or a pooler refused a connection because too many are open.

    The driver passes on no SQLSTATE of a refused connection. A server with messages in another
    language is not recognized.
    """
    return any(words in str(error) for words in _FULL)


def is_conflict(error: BaseException) -> bool:
    """Return whether PostgreSQL has rolled back a transaction that may be retried at once."""
    return getattr(error, "sqlstate", None) in _CONFLICTS


def words_of(error: BaseException) -> str | None:
    """Return the driver's message in one line, without values of rows; None: not a driver's error.

    Only the primary message is used. Parts with values, such as `DETAIL:`, have labels in the
    server's language, so they cannot be found and removed.
    """
    if PSYCOPG is None or not isinstance(error, PSYCOPG.Error):
        return None
    primary = error.diag.message_primary
    words = primary if primary is not None else str(error)
    return " ".join(words.split())[:WORDS_MOST]
