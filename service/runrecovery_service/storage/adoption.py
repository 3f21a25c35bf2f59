"""Takes over what services under other instance names left in a SQLite store.

A SQLite store has one service at a time, which holds the store's lock: every service that wrote
into the store under another name has ended. PostgreSQL is shared; nothing is adopted there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database, Kind
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.tables import LIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """What was adopted from one instance name: `runs` had not ended, `launches` were not known to
    be gone."""

    instance: str
    runs: int
    launches: int


_UNFINISHED: Final = (LIVE, "recovered_at IS NOT NULL AND recovery_state = 'QUARANTINED'")
# Of ended runs only those that a start still acts on. The others keep the name under which they
# ended: renaming them would rewrite the whole table.
_HOLDING: Final = (
    "session_value IS NOT NULL AND status IN ('CANCELED', 'FAILED', 'SUCCEEDED')",
    "wait_due_us IS NOT NULL",
    "run_due_us IS NOT NULL",
    "reopen_due_us IS NOT NULL",
)


def adopt(db: Database, owner: Owner) -> tuple[Adopted, ...]:
    """Make `owner` the owner of everything that other instances left, and forget these instances.

    A forgotten instance that is somehow alive is fenced: every write of it demands a row.

    Raises:
        Fenced: a newer epoch of this instance has started.
    """
    if db.dialect.kind is not Kind.SQLITE:
        return ()
    with db.transaction():
        instances.demand_current(db, owner)
        others = db.fetch_all(
            "SELECT name FROM instance WHERE name <> ? ORDER BY name", (owner.instance,)
        )
        adopted = tuple(_adopt(db, other, owner.instance) for (other,) in others)
        for table in ("instance", "instance_epoch"):
            db.execute(f"DELETE FROM {table} WHERE name <> ?", (owner.instance,))
    return adopted


def _adopt(db: Database, other: str, name: str) -> Adopted:
    def rename(which: str) -> int:
        # One statement for each condition, so that each finds its rows by an index.
        changed: int = db.execute(
            f"UPDATE run SET owner = ? WHERE owner = ? AND {which}", (name, other)
        ).rowcount
        return changed

    runs = sum(map(rename, _UNFINISHED))
    for which in _HOLDING:
        rename(which)
    launches: int = db.execute(
        "UPDATE process_lease SET instance = ? WHERE instance = ? AND state <> 'CLOSED'",
        (name, other),
    ).rowcount
    return Adopted(instance=other, runs=runs, launches=launches)
