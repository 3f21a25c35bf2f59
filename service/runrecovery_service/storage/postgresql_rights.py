"""Checks the privileges that the service's role needs in PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import tables
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.migrate import HISTORY, demand_known, known_migrations
from runrecovery_service.storage.sql_dialects import DatabaseKind

TABLES: Final = tuple(table._meta.table_name for table in tables.EVERY)  # noqa: SLF001 - peewee has no other way
"""The tables that the service reads and writes, except those that record migrations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A relation in the service's schema, and the role's privileges on it.

    Attributes:
        is_own: whether the role owns the relation, or is a member of the owner.
        lacks: the privileges that the service needs and the role does not have.
    """

    name: str
    is_own: bool
    lacks: tuple[str, ...]


_TABLES_SQL: Final = """
SELECT c.relname, pg_has_role(c.relowner, 'USAGE'),
  CASE WHEN c.relkind IN ('r', 'p') THEN concat_ws(',',
    CASE WHEN NOT has_table_privilege(c.oid, 'SELECT') THEN 'SELECT' END,
    CASE WHEN NOT has_table_privilege(c.oid, 'INSERT') THEN 'INSERT' END,
    CASE WHEN NOT has_table_privilege(c.oid, 'UPDATE') THEN 'UPDATE' END,
    CASE WHEN NOT has_table_privilege(c.oid, 'DELETE') THEN 'DELETE' END
  ) ELSE '' END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = current_schema() ORDER BY c.relname"""
"""Queries every relation of the schema. Keys are identity columns, whose sequences need no
privilege."""


class Rights:
    """The privileges of the role in the schema in which it creates tables."""

    def __init__(self, fetch_all: Callable[[str], Sequence[Sequence[Any]]]) -> None:
        """Query the privileges. Every role that can connect can run these queries."""
        ((self.role, self._schema, self._path, may_create),) = fetch_all(
            "SELECT current_user, current_schema(), current_setting('search_path'),"
            " has_schema_privilege(current_schema(), 'CREATE')"
        )
        self._may_create = bool(may_create)
        self.tables = {
            name: Table(name=name, is_own=is_own, lacks=tuple(filter(None, lacks.split(","))))
            for name, is_own, lacks in fetch_all(_TABLES_SQL)
        }

    def no_schema(self) -> str | None:
        """Return why no schema is usable for the role; None if one is."""
        if self._schema is not None:
            return None
        return (
            f"the search_path ({self._path}) has no schema that the role {self.role!r} may use"
            " (GRANT USAGE ON SCHEMA …)"
        )

    def cannot_migrate(self, names: Iterable[str]) -> str | None:
        """Return why the role cannot create and alter these tables; None if it can."""
        foreign = [name for name in names if name in self.tables and not self.tables[name].is_own]
        if foreign:
            return (
                f"the table `{foreign[0]}` belongs to another role than {self.role!r}, and only its"
                " owner can migrate it"
            )
        if self._may_create:
            return None
        return (
            f"the role {self.role!r} may not create tables in the schema `{self._schema}`"
            f" (GRANT CREATE ON SCHEMA {self._schema} TO …)"
        )

    def cannot_use(self, name: str, needed: Sequence[str] = ()) -> str | None:
        """Return why the service cannot use a table; None if it can.

        Args:
            needed: the privileges to check; empty: all privileges that the service uses.
        """
        table = self.tables.get(name)
        if table is None:
            return f"the table `{name}` is gone; restore a backup"
        lacks = ", ".join(one for one in table.lacks if not needed or one in needed)
        return f"the role {self.role!r} lacks {lacks} on the table `{name}`" if lacks else None


def missing_for_start(db: Database) -> str | None:
    """Return which privileges for migrations and service are missing, as one text; None if none is.

    A start and the command `check` both use this function, so that `check` reports the same
    problems.
    """
    rights = Rights(db.fetch_all)
    if reason := rights.no_schema():
        return reason
    if not all(name in rights.tables for name in HISTORY):
        foreign = [name for name in TABLES if name in rights.tables]
        if foreign:
            return f"has a table `{foreign[0]}` that is not of runrecovery"
        return rights.cannot_migrate(HISTORY)
    for name in HISTORY:
        if reason := rights.cannot_use(name, ("SELECT",)):
            return reason
    known = known_migrations()
    if known.keys() - demand_known(db, known).keys():
        return rights.cannot_migrate((*HISTORY, *TABLES))
    return _unusable_table(rights)


def missing_for_work(db: Database) -> str | None:
    """Return which privileges on the tables are missing, as one text; None if none is."""
    if db.dialect.kind is DatabaseKind.SQLITE:
        return None
    rights = Rights(db.fetch_all)
    return rights.no_schema() or _unusable_table(rights)


def _unusable_table(rights: Rights) -> str | None:
    return next(filter(None, map(rights.cannot_use, TABLES)), None)
