"""Reads the store of a running service from its SQLite file."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final, TypeAlias

AT_REST: Final = ("SUCCEEDED", "FAILED", "CANCELED")

Key: TypeAlias = tuple[object, ...]
Rows: TypeAlias = dict[Key, tuple[object, int]]
"""By table and primary key: the key of the run that a row belongs to, and a digest of all of it."""


class Store:
    """The SQLite file of a running service, opened for reading only."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)
        self._connection.text_factory = bytes
        names = self._all(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            # The lease is renewed all the time, and each renewal is counted.
            " AND name NOT IN ('instance', 'commit_count')"
        )
        self._tables = [_Table(self._connection, name.decode()) for (name,) in names]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def version(self) -> int:
        """Return a number that is another one after every commit of the service."""
        ((version,),) = self._all("PRAGMA data_version")
        return int(version)

    def rows(self) -> Rows:
        """Return every row of every table that calls change."""
        return {
            (table.name, *(row[at] for at in table.keys)): (
                None if table.run is None else row[table.run],
                hash(tuple(row)),
            )
            for table in self._tables
            for row in self._all(f"SELECT * FROM {table.name}")  # noqa: S608 - names of its own
        }

    def keys_of(self, *run_ids: str) -> set[int]:
        """Return the keys of those of these runs that exist."""
        marks = ", ".join("?" * len(run_ids))
        found = self._all(f"SELECT id FROM run WHERE run_id IN ({marks})", *run_ids)  # noqa: S608
        return {int(key) for (key,) in found}

    def restless(self) -> dict[str, int]:
        """Return, by id, the keys of the runs of our engines that are not terminal."""
        found = self._all(
            "SELECT run_id, id FROM run WHERE status NOT IN (?, ?, ?) AND engine <> 'seeded'"
            " AND recovery_state <> 'QUARANTINED'",
            *AT_REST,
        )
        return {run_id.decode(): int(key) for run_id, key in found}

    def unaccounted(self) -> int:
        """Return how many launches are under way, or over and not closed yet."""
        ((count,),) = self._all(
            "SELECT count(*) FROM process_lease l JOIN run r ON r.id = l.run"
            " WHERE l.closed_at IS NULL AND (l.state <> 'RUNNING' OR r.status IN (?, ?, ?)"
            " OR r.status = 'WAITING_USER' AND r.profile = 'RESUMABLE')",
            *AT_REST,
        )
        return int(count)

    def _all(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, values).fetchall()


class _Table:
    """Which columns of a table are its key, and which one names a run."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self.name = name
        columns = connection.execute(f"PRAGMA table_info({name})").fetchall()
        names = [column[1].decode() for column in columns]
        self.keys = [at for at, column in enumerate(columns) if column[5]]
        owner = "id" if name == "run" else "run"
        self.run = names.index(owner) if owner in names else None


def changed(before: Rows, after: Rows) -> dict[Key, object]:
    """Return the rows that differ, with the key of the run that each belongs to."""
    differ = {key for key, _ in before.items() ^ after.items()}
    return {key: (after.get(key) or before[key])[0] for key in differ}
