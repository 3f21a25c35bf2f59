"""What must not be after faults of replicas: each judge finds one kind of violation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from campaign.replica_load import Journal
from campaign.replica_process import ALIVE, OVERLAPS
from support.owner_history import (
    FENCED_LAUNCHES,
    OVERLAPPING,
    STALE_WRITERS,
    TAKEN_WHILE_STOPPING,
    WRONG_MOVES,
)

Rows: TypeAlias = Callable[[str], list[tuple[Any, ...]]]

STALE_WRITE: Final = "stale write"
TAKEN_BY_STOPPING: Final = "taken while stopping"
TWO_OWNERS: Final = "two owners"
LOST: Final = "lost write"
OUTLIVED: Final = "agent outlived its lease"
STORED_RUNS: Final = "SELECT run_id, engine, labels, status, cancel_requested_at FROM run"
STORED_REPLIES: Final = (
    "SELECT r.run_id, q.no, q.response FROM interaction q JOIN run r ON r.id = q.run"
    " WHERE q.response IS NOT NULL"
)
UNENDED: Final = "SELECT run_id, status, owner FROM run WHERE ended_at IS NULL"
TWICE: Final = "SELECT labels, count(*) FROM run GROUP BY labels HAVING count(*) > 1"
QUERIES: Final = {
    STALE_WRITE: STALE_WRITERS,
    TWO_OWNERS: WRONG_MOVES,
    TAKEN_BY_STOPPING: TAKEN_WHILE_STOPPING,
    "overlapping launches": OVERLAPPING,
    "created twice": TWICE,
}


class Violation(NamedTuple):
    """Something that must not be, and the judge that found it."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def violations_now(rows: Rows, folder: Path) -> Iterator[Violation]:
    """Yield what must not be at any time, also amid the faults.

    Args:
        rows: returns the rows of a query.
        folder: where agents lock their runs.
    """
    for kind, sql in QUERIES.items():
        yield from (Violation(kind, str(row)) for row in rows(sql))
    if (overlaps := folder / OVERLAPS).exists():
        yield from (Violation("two agents at a time", run) for run in overlaps.read_text().split())
    for launch, fenced_at in rows(FENCED_LAUNCHES):
        alive = folder / f"{ALIVE}{launch}"
        if alive.exists() and (late_s := float(alive.read_text() or 0) - fenced_at) > 0:
            yield Violation(OUTLIVED, f"launch {launch} by at least {late_s:.3f} s")


def lost_writes(journal: Journal, rows: Rows) -> Iterator[Violation]:
    """Yield what was acknowledged to clients and is not in the store."""
    stored = {run_id: run for run_id, *run in rows(STORED_RUNS)}
    replies = {(run_id, no): response for run_id, no, response in rows(STORED_REPLIES)}
    for run_id, (engine, nonce) in journal.runs.items():
        run = stored.get(run_id)
        if run is None:
            yield Violation(LOST, f"create of {run_id}")
        elif (run[0], json.loads(run[1])) != (engine, {"nonce": nonce}):
            yield Violation(LOST, f"create of {run_id} became another run")
        elif run_id in journal.cancels and run[2] != "CANCELED" and run[3] is None:
            yield Violation(LOST, f"cancel of {run_id}")
    for (run_id, question), nonce in journal.replies.items():
        if replies.get((run_id, question)) != json.dumps(nonce):
            yield Violation(LOST, f"reply to {run_id} {question}")
