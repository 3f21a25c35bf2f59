"""The two kinds of database, and the differences in hand-written SQL between them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass


class DatabaseKind(StrEnum):
    """The kinds of database that can contain the store."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlDialect:
    """The parts of hand-written SQL that depend on the kind of database.

    Attributes:
        param: the driver's placeholder for a parameter.
        now_us: an expression for the current time of the database's clock, in microseconds UTC. In
            PostgreSQL the time advances within a transaction.
        log_position: the columns for `commit_history.position_of`.
    """

    kind: DatabaseKind
    param: str
    now_us: str
    log_position: str

    def is_json(self, expression: str) -> str:
        """Return an SQL condition: the text is valid JSON."""
        if self.kind is DatabaseKind.SQLITE:
            return f"json_valid({expression})"
        return f"({expression}) IS JSON"


NO_POSITION: Final = "'', 0, 0"
"""`SqlDialect.log_position` for a database that does not report positions."""
SQLITE: Final = SqlDialect(
    kind=DatabaseKind.SQLITE,
    param="?",
    now_us="CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)",
    log_position=NO_POSITION,
)
_POSTGRESQL_NOW_US: Final = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"
POSTGRESQL: Final = SqlDialect(
    kind=DatabaseKind.POSTGRESQL,
    param="%s",
    now_us=_POSTGRESQL_NOW_US,
    log_position="pg_walfile_name(pg_current_wal_insert_lsn()),"
    f" CAST(pg_current_wal_insert_lsn() - '0/0' AS BIGINT), {_POSTGRESQL_NOW_US}",
)
