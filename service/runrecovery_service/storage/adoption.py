"""Takes over the runs and launches of other instance names in a SQLite store.

Only one service at a time can lock a SQLite store. The holder of the lock therefore knows that
every service which used the store under another name has ended. In PostgreSQL, which instances
share, nothing is adopted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.tables import LIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """The runs and launches that were adopted from one instance name.

    Attributes:
        runs: the number of runs that had not ended.
        launches: the number of launches that were not CLOSED.

    The numbers do not include rows that an earlier, interrupted adoption has renamed.
    """

    instance: str
    runs: int
    launches: int


ROWS: Final = 5_000
_UNFINISHED: Final = (LIVE, "recovered_at IS NOT NULL AND recovery_state = 'QUARANTINED'")
# Ended runs in which a start still has something to clear. All other ended runs keep the old
# instance name, because renaming them would rewrite the whole table.
_HOLDING: Final = (
    "session_value IS NOT NULL AND status IN ('CANCELED', 'FAILED', 'SUCCEEDED')",
    "wait_due_us IS NOT NULL",
    "run_due_us IS NOT NULL",
    "reopen_due_us IS NOT NULL",
)


RecordAdopted = Callable[[Database, Sequence[Adopted]], object]
"""Records the adoption, in the transaction that completes it."""


def adopt(
    db: Database,
    owner: Owner,
    *,
    record: RecordAdopted,
    stopping: Callable[[], bool],
    rows: int = ROWS,
) -> Sequence[Adopted]:
    """Make `owner` the owner of all rows of other instances, and delete these instances.

    If an adoption is interrupted, the next start completes it. A deleted instance that is still
    alive is fenced, because each of its writes requires its own row.

    Args:
        record: records the adoption; called in the last transaction.
        rows: the most rows that one transaction changes. Renewals of the lease run between
            transactions.

    Raises:
        Fenced: a newer epoch of this instance has started.
        RecoveryInterrupted: `stopping` has returned True.
    """
    if db.dialect.kind is not DatabaseKind.SQLITE:
        return ()
    others = db.fetch_all(
        "SELECT name FROM instance WHERE name <> ? ORDER BY name", (owner.instance,)
    )
    if not others:
        return ()
    renaming = _Renaming(db, owner, rows, stopping)
    adopted = [
        Adopted(
            instance=name, runs=renaming.rename_runs(name), launches=renaming.rename_launches(name)
        )
        for (name,) in others
    ]
    for (name,) in others:
        renaming.rename_deliveries(name)
    with db.transaction():
        instances.demand_current(db, owner)
        for table in ("instance", "instance_epoch"):
            db.execute(f"DELETE FROM {table} WHERE name <> ?", (owner.instance,))
        record(db, adopted)
    return adopted


@dataclass(frozen=True, slots=True)
class _Renaming:
    """Renames rows of other instances, in several transactions."""

    db: Database
    owner: Owner
    rows: int
    stopping: Callable[[], bool]

    def rename_runs(self, other: str) -> int:
        """Rename an instance's runs, and return how many of them had not ended."""
        # One statement per condition: each can use an index.
        unfinished = sum(self._rename("run", "owner", other, which) for which in _UNFINISHED)
        for which in _HOLDING:
            self._rename("run", "owner", other, which)
        return unfinished

    def rename_launches(self, other: str) -> int:
        """Rename an instance's launches that are not CLOSED, and return their number."""
        return self._rename("process_lease", "instance", other, "state <> 'CLOSED'")

    def rename_deliveries(self, other: str) -> None:
        """Rename the webhook deliveries that an instance still had to make."""
        self._rename("webhook_delivery", "instance", other, "1 = 1")

    def _rename(self, table: str, column: str, other: str, which: str) -> int:
        found = f"SELECT id FROM {table} WHERE {column} = ? AND {which} LIMIT ?"
        renamed = 0
        while True:
            if self.stopping():
                raise RecoveryInterrupted
            with self.db.transaction():
                instances.demand_current(self.db, self.owner)
                count = self.db.execute(
                    f"UPDATE {table} SET {column} = ? WHERE id IN ({found})",
                    (self.owner.instance, other, self.rows),
                ).rowcount
            if not count:
                return renamed
            renamed += count
