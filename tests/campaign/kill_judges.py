"""What must not be after a SIGKILL of the service, at its next start, and in the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from campaign.judges import LOST, TWICE, Rows, Violation, lost_writes, overlapping_agents, rows_of
from campaign.kill_load import SESSION_LOST
from campaign.load import Journal
from campaign.witness import STARTS
from support.owner_history import OVERLAPPING

SLOTS: Final = 4
ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "CANCELED"})
DECISIONS: Final = "decisions"
LAUNCHES: Final = "launches"
EVENTS: Final = "events"
_EVENTS: Final = (
    "(SELECT run, no, kind FROM run_event"
    " UNION ALL SELECT run, sequence, CASE rule WHEN 'reopened_by_caller' THEN 'REOPENED'"
    " ELSE 'RECOVERED' END FROM recovery_event UNION ALL SELECT id, 1, 'CREATED' FROM run) e"
)
QUERIES: Final = {
    "created twice": TWICE,
    LAUNCHES: OVERLAPPING,
    EVENTS: "SELECT r.run_id, r.event_count, count(*), count(DISTINCT e.no), max(e.no)"  # noqa: S608
    f" FROM run r JOIN {_EVENTS} ON e.run = r.id GROUP BY r.run_id, r.event_count"
    " HAVING count(*) <> r.event_count OR count(DISTINCT e.no) <> r.event_count"
    " OR max(e.no) <> r.event_count",
    "slots": "SELECT epoch, count(*) FROM process_lease"  # noqa: S608
    " WHERE state IN ('INTENT', 'GATED', 'RUNNING') AND epoch = (SELECT epoch FROM instance)"
    f" GROUP BY epoch HAVING count(*) > {SLOTS}",
    DECISIONS: "SELECT reconciliation, run, count(*) FROM recovery_event"
    " WHERE rule <> 'reopened_by_caller' GROUP BY reconciliation, run HAVING count(*) > 1",
}
"""No query may find a row, at any time."""
UNFINISHED: Final = {
    "not ended": "SELECT run_id, status, recovery_state FROM run WHERE ended_at IS NULL",
    LAUNCHES: "SELECT run, attempt, turn, state FROM process_lease WHERE state <> 'CLOSED'",
}
"""Nor may these once the service has been left in peace."""
EVENTS_OF_RUNS: Final = (
    "SELECT r.run_id, e.no, e.kind FROM run r"  # noqa: S608
    f" JOIN {_EVENTS} ON e.run = r.id ORDER BY r.id, e.no"
)


class StoredRun(NamedTuple):
    """The row of a run, as far as a recovery goes by it."""

    run_id: str
    status: str
    owner_epoch: int
    version: int
    decided_version: int | None

    @property
    def is_live(self) -> bool:
        """Whether a recovery must decide about the run."""
        return self.status not in ENDED


def stored_runs(rows: Rows) -> dict[int, StoredRun]:
    """Return all runs, by key."""
    sql = "SELECT id, run_id, status, owner_epoch, version, recovered_version FROM run"
    return {key: StoredRun(*run) for key, *run in rows(sql)}


class Report(NamedTuple):
    """The report of a recovery."""

    key: int
    epoch: int
    state: str
    total: int
    scanned: int
    unchanged: int


def newest_report(rows: Rows) -> Report | None:
    """Return the report of the latest recovery."""
    found = rows(
        "SELECT id, epoch, state, runs_total, runs_scanned, runs_unchanged FROM reconciliation"
        " ORDER BY id DESC LIMIT 1"
    )
    return Report(*found[0]) if found else None


def wrong_decisions(
    before: dict[int, StoredRun], report: Report, lost: str | None, rows: Rows
) -> Iterator[Violation]:
    """Yield the runs that a recovery did not give exactly one decision.

    A decision stands while its run has the same version, and is then not repeated.

    Args:
        before: the runs at the kill before the recovery.
        report: its report.
        lost: a run that has lost its session before it; None: none has.
    """
    live = {key: run for key, run in before.items() if run.is_live}
    decided: dict[int, str] = dict(
        rows(
            f"SELECT run, rule FROM recovery_event WHERE reconciliation = {report.key}"  # noqa: S608
            " AND rule <> 'reopened_by_caller'"
        )
    )
    for key in decided.keys() - live.keys():
        yield Violation(DECISIONS, f"report {report.key} decided about run {key}, which had ended")
    if report.state != "COMPLETED":
        return
    now = stored_runs(rows)
    for key, run in live.items():
        changed = run.version != run.decided_version
        if (changed and key not in decided) or now[key].owner_epoch < report.epoch:
            yield Violation(DECISIONS, f"report {report.key} has none for {run}: {now[key]}")
        if run.run_id == lost and decided.get(key) != SESSION_LOST:
            yield Violation(DECISIONS, f"{lost} has lost its session: {decided.get(key)}")
    counts = (report.total, report.scanned, report.unchanged)
    if counts != (len(live), len(live), len(live) - len(decided)):
        yield Violation(DECISIONS, f"{report}: {len(live)} live runs, {len(decided)} decisions")


def violations_now(journal: Journal, rows: Rows, folder: Path) -> Iterator[Violation]:
    """Yield what must not be at any time.

    Args:
        journal: of the clients, read before the store.
        rows: returns the rows of a query.
        folder: where the agents leave their notes.
    """
    yield from (Violation("answer", text) for text in journal.violations)
    yield from lost_writes(journal, rows)
    yield from _lost_reopenings(journal, rows)
    yield from _unasked(journal, rows)
    yield from rows_of(QUERIES, rows)
    yield from overlapping_agents(folder)
    yield from _wrong_starts(rows, folder)
    yield from _wrongly_watched(journal, rows)


def violations_in_the_end(journal: Journal, rows: Rows, folder: Path) -> Iterator[Violation]:
    """Yield what must not be once every run could end."""
    yield from violations_now(journal, rows, folder)
    yield from rows_of(UNFINISHED, rows)
    runs = {run.run_id: run for run in stored_runs(rows).values()}
    for run_id in journal.cancels:
        if runs[run_id].status != "CANCELED":
            yield Violation(LOST, f"cancel of {run_id}, which is {runs[run_id].status}")
    yield from _undelivered(journal, rows)


def _lost_reopenings(journal: Journal, rows: Rows) -> Iterator[Violation]:
    reopened = {
        run_id
        for (run_id,) in rows(
            "SELECT r.run_id FROM recovery_event e JOIN run r ON r.id = e.run"
            " WHERE e.rule = 'reopened_by_caller'"
        )
    }
    for run_id in journal.reopens - reopened:
        yield Violation(LOST, f"reopening of {run_id}")


def _unasked(journal: Journal, rows: Rows) -> Iterator[Violation]:
    """Yield runs and replies for which no client has asked."""
    for run_id, labels in rows("SELECT run_id, labels FROM run"):
        if json.loads(labels).get("nonce") not in journal.asked:
            yield Violation("not asked", f"run {run_id}")
    for run, response in rows("SELECT run, response FROM interaction WHERE response IS NOT NULL"):
        if json.loads(response) not in journal.asked:
            yield Violation("not asked", f"reply {response} to run {run}")


def _undelivered(journal: Journal, rows: Rows) -> Iterator[Violation]:
    """Yield replies that are missing in the output of a run which never started again."""
    outputs: dict[str, str] = dict(
        rows("SELECT run_id, output FROM run WHERE status = 'SUCCEEDED' AND attempt = 1")
    )
    for (run_id, question), nonce in journal.replies.items():
        output = outputs.get(run_id)
        if output is not None and json.loads(output)["answers"][question - 1 : question] != [nonce]:
            yield Violation(LOST, f"reply to {run_id} {question} is not in its output {output}")


def _wrong_starts(rows: Rows, folder: Path) -> Iterator[Violation]:
    """Yield what agents have noted of their starts, and no launch record allows."""
    notes = folder / STARTS
    lines = notes.read_text().splitlines() if notes.exists() else []
    starts = [line.split() for line in lines]
    known = {
        str(key): (run_id, str(attempt))
        for key, run_id, attempt in rows(
            "SELECT l.id, r.run_id, l.attempt FROM process_lease l JOIN run r ON r.id = l.run"
        )
    }
    for launch, run_id, attempt, _ in starts:
        if known.get(launch) != (run_id, attempt):
            yield Violation(LAUNCHES, f"{launch} of {run_id} has no record: {known.get(launch)}")
    for launch, count in Counter(launch for launch, *_ in starts).items():
        if count > 1:
            yield Violation(LAUNCHES, f"{launch} has started {count} agents")
    begun = Counter((run_id, attempt) for _, run_id, attempt, kind in starts if kind == "start")
    for (run_id, attempt), count in begun.items():
        if count > 1:
            yield Violation(LAUNCHES, f"attempt {attempt} of {run_id} has begun {count} times")


def _wrongly_watched(journal: Journal, rows: Rows) -> Iterator[Violation]:
    """Yield the runs whose watcher did not get each stored event once and in order."""
    stored: dict[str, list[tuple[int, str]]] = {}
    for run_id, no, kind in rows(EVENTS_OF_RUNS):
        stored.setdefault(run_id, []).append((no, kind))
    for run_id, seen in journal.seen.items():
        events = stored.get(run_id, [])
        if seen != events[: len(seen)]:
            yield Violation(EVENTS, f"a watcher of {run_id} got {seen}, stored are {events}")
        elif run_id in journal.watched and seen != events and not _was_reopened(events):
            yield Violation(EVENTS, f"a watch of {run_id} ended after {seen} of {events}")


def _was_reopened(events: list[tuple[int, str]]) -> bool:
    return any(kind == "REOPENED" for _, kind in events)
