"""What must not be after the faults of any campaign, by the journal of its clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from campaign.load import Journal
from campaign.witness import OVERLAPS

Rows: TypeAlias = Callable[[str], list[tuple[Any, ...]]]

LOST: Final = "lost write"
STORED_RUNS: Final = "SELECT run_id, engine, labels, status, cancel_requested_at FROM run"
STORED_REPLIES: Final = (
    "SELECT r.run_id, q.no, q.response FROM interaction q JOIN run r ON r.id = q.run"
    " WHERE q.response IS NOT NULL"
)
TWICE: Final = "SELECT labels, count(*) FROM run GROUP BY labels HAVING count(*) > 1"


class Violation(NamedTuple):
    """Something that must not be, and the judge that found it."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def rows_of(queries: dict[str, str], rows: Rows) -> Iterator[Violation]:
    """Yield a violation for each row that a query finds; the key is its kind."""
    for kind, sql in queries.items():
        yield from (Violation(kind, str(row)) for row in rows(sql))


def overlapping_agents(folder: Path) -> Iterator[Violation]:
    """Yield the runs that had two agents at a time, of which the second has left a note."""
    if (overlaps := folder / OVERLAPS).exists():
        yield from (Violation("two agents at a time", run) for run in overlaps.read_text().split())


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
