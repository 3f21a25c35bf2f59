"""Who waits for a run, or for a decision, to change. On the event loop only.

What this process writes is announced as soon as it is committed. Of a store that others write to as
well, `follow_shared` asks once a second, in one query for all who wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import structlog

from runrecovery_service.storage.database import Database

log = structlog.get_logger()

KEYS_PER_LOOK: Final = 500


class Changes:
    """The waiting, by what they wait for. Each is an event of its own, set with a change."""

    def __init__(self) -> None:
        self._by_run: dict[int, set[asyncio.Event]] = {}
        self._of_decisions: set[asyncio.Event] = set()

    @property
    def runs_watched(self) -> list[int]:
        """Keys of the runs that somebody waits for."""
        return list(self._by_run)

    @property
    def decisions_watched(self) -> bool:
        """True while somebody waits for decisions."""
        return bool(self._of_decisions)

    @contextmanager
    def of_run(self, run_key: int, event: asyncio.Event) -> Iterator[None]:
        """Have the event set with every change of a run."""
        waiting = self._by_run.setdefault(run_key, set())
        waiting.add(event)
        try:
            yield
        finally:
            waiting.discard(event)
            if not waiting and self._by_run.get(run_key) is waiting:
                del self._by_run[run_key]

    @contextmanager
    def of_decisions(self, event: asyncio.Event) -> Iterator[None]:
        """Have the event set when there may be new decisions."""
        self._of_decisions.add(event)
        try:
            yield
        finally:
            self._of_decisions.discard(event)

    def announce(self, run_keys: Collection[int]) -> None:
        """Wake whoever waits for one of these runs."""
        for key in run_keys:
            for event in self._by_run.get(key, ()):
                event.set()

    def announce_decisions(self) -> None:
        """Wake whoever waits for decisions."""
        for event in self._of_decisions:
            event.set()


def event_counts(db: Database, run_keys: Collection[int]) -> dict[int, int]:
    """Return how many events each of these runs has had."""
    keys = list(run_keys)
    found: dict[int, int] = {}
    for at in range(0, len(keys), KEYS_PER_LOOK):
        some = keys[at : at + KEYS_PER_LOOK]
        marks = ", ".join("?" for _ in some)
        found |= dict(db.fetch_all(f"SELECT id, event_count FROM run WHERE id IN ({marks})", some))
    return found


def decisions_stamp(db: Database) -> tuple[int, int]:
    """Return a value that changes when a recovery has decided on more runs, or ended."""
    row = db.fetch_one(
        "SELECT COALESCE(max(id), 0), COALESCE(sum(runs_scanned), 0)"
        " + COALESCE(sum(CASE WHEN state = 'RUNNING' THEN 0 ELSE 1 END), 0) FROM"
        " (SELECT id, runs_scanned, state FROM reconciliation ORDER BY id DESC LIMIT 100) AS latest"
    )
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


class SharedLook:
    """What was seen of a shared store at the last look."""

    def __init__(self) -> None:
        self._counts: Mapping[int, int] = {}
        self._stamp = (0, 0)

    def changed(self, counts: Mapping[int, int]) -> list[int]:
        """Return the runs that have had events since the last look, or were not in it."""
        before, self._counts = self._counts, counts
        return [key for key, count in counts.items() if before.get(key) != count]

    def has_decided(self, stamp: tuple[int, int]) -> bool:
        """True when the stamp of the decisions is a new one."""
        before, self._stamp = self._stamp, stamp
        return before != stamp
