"""Compiles peewee queries to SQL once, instead of at every use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peewee as pw

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind


class Statement:
    """A peewee query that is compiled once per kind of database. `param` marks its parameters.

    Building a peewee query takes 230 µs; running its compiled SQL takes 17 µs.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._compiled: dict[DatabaseKind, tuple[str, tuple[object, ...]]] = {}

    def run(self, db: Database, **values: object) -> Any:
        """Execute the query with these parameters and return the driver's cursor."""
        compiled = self._compiled.get(db.dialect.kind)
        if compiled is None:
            sql, params = db.peewee.get_sql_context().parse(self._build())
            compiled = self._compiled[db.dialect.kind] = (sql, tuple(params))
        sql, params = compiled
        return db.peewee.execute_sql(
            sql, [values[p.name] if type(p) is _Param else p for p in params]
        )


@dataclass(frozen=True, slots=True)
class _Param:
    name: str


def param(name: str) -> pw.Value:
    """Return the placeholder of a parameter that `Statement.run` gets under this name."""
    return pw.Value(_Param(name), converter=False)
