"""Databases of the shared PostgreSQL that tests use one after another.

A copy of the template and its removal cost more CPU time than most tests. To empty the tables of a
test costs a few milliseconds, on a connection that stays open: a new one reads the catalogs anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg

from bench.postgres import ScratchPostgres

_END_OTHERS: Final = (
    b"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
    b" WHERE datname = current_database() AND pid <> pg_backend_pid()"
    b" AND backend_type = 'client backend'"
)
_OWN: Final = "(SELECT oid FROM pg_database WHERE datname = current_database())"
_SOURCES: Final = (
    *("pg_class", "pg_attribute", "pg_attrdef", "pg_constraint", "pg_index", "pg_namespace"),
    *("pg_proc", "pg_rewrite", "pg_trigger", "migration_checksum", "schema_migration"),
    f"pg_database WHERE oid = {_OWN}",
    f"pg_db_role_setting WHERE setdatabase = {_OWN}",
)
_DEFINITION: Final = " UNION ALL ".join(
    f"SELECT count(*), max(xmin::text::bigint) FROM {source}"  # noqa: S608
    for source in _SOURCES
).encode()
_USED_TABLES: Final = (
    b"SELECT quote_ident(relname) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    b" AND relkind = 'r' AND relname NOT IN ('migration_checksum', 'schema_migration')"
    b" AND pg_relation_size(oid) > 0"
)
_RESTART_KEYS: Final = b"SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"


def definition_of(connection: psycopg.Connection[Any]) -> list[Any]:
    """Return what every change of a database's schema, privileges, settings and history changes.

    For each table of such facts: the number of rows, and the latest transaction that wrote one.
    """
    return connection.execute(_DEFINITION).fetchall()


@dataclass(frozen=True, slots=True, eq=False)
class _Lent:
    """A database, a connection to it, and its definition when it was lent."""

    name: str
    connection: psycopg.Connection[Any]
    definition: list[Any]


class PostgresPool:
    """The databases of one worker.

    Attributes:
        template: the name of the migrated database that the others are copies of.
    """

    def __init__(self, server: ScratchPostgres, names: Iterator[str], template: str) -> None:
        self._server = server
        self._names = names
        self.template = template
        self._free: list[_Lent] = []

    @contextmanager
    def database(self) -> Iterator[str]:
        """Lend the URL of a migrated database without a row. It lasts as long as the server."""
        lent = self._free.pop() if self._free else self._make()
        yield self._server.url(lent.name)
        if (emptied := _emptied(lent)) is not None:
            self._free.append(emptied)
        else:
            lent.connection.close()
            self._server.drop(lent.name)

    def close(self) -> None:
        """Close the connections to the databases that are not lent."""
        for free in self._free:
            free.connection.close()

    def _make(self) -> _Lent:
        name = next(self._names)
        url = self._server.create(name, template=self.template)
        connection = psycopg.connect(url, autocommit=True)
        filled = connection.execute(_USED_TABLES).fetchall()
        assert filled == [], "a migration fills a table, which would be emptied"
        return _Lent(name, connection, definition_of(connection))


def _emptied(lent: _Lent) -> _Lent | None:
    """Remove the rows of a database; return it, None if its definition is not as it was."""
    connection = lent.connection
    try:
        connection.execute(_END_OTHERS)
        if definition_of(connection) != lent.definition:
            return None
        if used := [table for (table,) in connection.execute(_USED_TABLES)]:
            connection.execute(f"TRUNCATE {', '.join(used)}".encode())
        connection.execute(_RESTART_KEYS)  # also those of rows that were refused
        # A table that was emptied has another file.
        return replace(lent, definition=definition_of(connection))
    except psycopg.OperationalError:  # the test has ended the connection
        return None
