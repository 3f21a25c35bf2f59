"""What must not be after faults of replicas: each judge finds one kind of violation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from campaign.judges import TWICE, Rows, Violation, overlapping_agents, rows_of
from campaign.replica_process import ALIVE
from support.owner_history import (
    FENCED_LAUNCHES,
    OVERLAPPING,
    STALE_WRITERS,
    TAKEN_WHILE_STOPPING,
    WRONG_MOVES,
)

STALE_WRITE: Final = "stale write"
TAKEN_BY_STOPPING: Final = "taken while stopping"
TWO_OWNERS: Final = "two owners"
OUTLIVED: Final = "agent outlived its lease"
UNENDED: Final = "SELECT run_id, status, owner FROM run WHERE ended_at IS NULL"
QUERIES: Final = {
    STALE_WRITE: STALE_WRITERS,
    TWO_OWNERS: WRONG_MOVES,
    TAKEN_BY_STOPPING: TAKEN_WHILE_STOPPING,
    "overlapping launches": OVERLAPPING,
    "created twice": TWICE,
}


def violations_now(rows: Rows, folder: Path) -> Iterator[Violation]:
    """Yield what must not be at any time, also amid the faults.

    Args:
        rows: returns the rows of a query.
        folder: where agents lock their runs.
    """
    yield from rows_of(QUERIES, rows)
    yield from overlapping_agents(folder)
    for launch, fenced_at in rows(FENCED_LAUNCHES):
        alive = folder / f"{ALIVE}{launch}"
        if alive.exists() and (late_s := float(alive.read_text() or 0) - fenced_at) > 0:
            yield Violation(OUTLIVED, f"launch {launch} by at least {late_s:.3f} s")
