"""The store of a service at one moment, read by plain SQL, and what must be true of it."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Self

import psycopg
from runrecovery_service.domain.run import TERMINAL, Profile, RunStatus
from runrecovery_service.domain.transitions import REOPENED, is_legal
from support.service import Home

Row = Mapping[str, Any]
TABLES: Final = (
    "run", "interaction", "run_event", "recovery_event", "reconciliation", "process_lease",
    "instance", "trust_entry", "webhook_delivery",
)  # fmt: skip
Acknowledged = tuple[str, str, int]
"""A call that was answered: the word, the run, and the number of the question."""
ANSWERS: Final = ("yes", "allow")
REOPENED_RULE: Final = "reopened_by_caller"
UNCLOSED: Final = frozenset({"INTENT", "GATED", "RUNNING"})


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that does not hold: its name, as in `recovery.md`'s invariants, and the facts."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every row of the tables, all of the same moment."""

    tables: Mapping[str, list[Row]]

    @classmethod
    def read(cls, home: Home) -> Self:
        """Read the store of a home, which a service may use meanwhile."""
        url = str(home.settings.get("database", ""))
        if url:
            with psycopg.connect(url) as server:
                server.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                return cls(_rows(server))
        if not home.database.exists():
            return cls({table: [] for table in TABLES})
        path = f"file:{home.database}?mode=ro"
        with closing(sqlite3.connect(path, uri=True, timeout=5.0)) as store:
            store.execute("BEGIN")
            return cls(_rows(store))

    def runs(self) -> dict[int, Row]:
        """Return the runs by key."""
        return {row["id"]: row for row in self.tables["run"]}

    def epochs(self) -> dict[str, int]:
        """Return the epoch of each instance."""
        return {row["name"]: row["epoch"] for row in self.tables["instance"]}

    def live(self) -> list[Row]:
        """Return the runs that have not ended."""
        return [run for run in self.tables["run"] if run["status"] not in TERMINAL]

    def violations(self) -> Iterator[Violation]:
        """Yield what must never be, whether a service runs or not."""
        yield from self._torn_runs()
        yield from self._torn_launches()
        yield from self._histories()
        yield from self._repeated_decisions()
        yield from self._early_reports()

    def undecided(self, instance: str) -> Iterator[Violation]:
        """Yield runs of earlier epochs of an instance, for which no decision was made."""
        epoch = self.epochs()[instance]
        for run in self.live():
            if run["owner"] == instance and run["owner_epoch"] < epoch:
                yield Violation("undecided", _text(run))

    def lost(
        self, acknowledged: Iterable[Acknowledged], outcomes: Mapping[str, str]
    ) -> Iterator[Violation]:
        """Yield acknowledged calls without their effect, and ends of runs that have changed."""
        runs = {row["run_id"]: row for row in self.tables["run"]}
        replied = {
            (row["run"], row["no"])
            for row in self.tables["interaction"]
            if row["response"] is not None and json.loads(row["response"]) in ANSWERS
        }
        reopened = {
            row["run"] for row in self.tables["recovery_event"]
            if row["rule"] == REOPENED_RULE
        }  # fmt: skip
        for word, run_id, number in acknowledged:
            run = runs.get(run_id)
            is_kept = run is not None and (
                word == "create"
                or (word == "reply" and (run["id"], number) in replied)
                or (word == "reopen" and run["id"] in reopened)
                or (word == "cancel" and _is_canceled(run))
            )
            if not is_kept:
                yield Violation("lost", f"{word} {run_id}: {run and run['status']}")
        for run_id, status in outcomes.items():
            run = runs.get(run_id)
            if run is None or (run["status"] != status and run["id"] not in reopened):
                yield Violation("changed end", f"{run_id} was {status}: {run and run['status']}")

    # -- the single promises -------------------------------------------------------------------

    def _torn_runs(self) -> Iterator[Violation]:
        questions = defaultdict(list)
        for row in self.tables["interaction"]:
            if row["state"] == "OPEN":
                questions[row["run"]].append(row["no"])
        for run in self.tables["run"]:
            has_ended = run["status"] in TERMINAL
            waits = run["status"] == "WAITING_USER"
            agrees = (
                questions[run["id"]] == ([run["interaction_count"]] if waits else [])
                and has_ended == (run["ended_at"] is not None)
                and (run["status"] == "FAILED") == (run["error_code"] is not None)
                and (run["status"] == "SUCCEEDED") == (run["output"] is not None)
                and not (has_ended and run["session_value"] is not None)
            )
            if not agrees:
                yield Violation("torn", f"{_text(run)}, open questions {questions[run['id']]}")

    def _torn_launches(self) -> Iterator[Violation]:
        runs, seen = self.runs(), Counter[int]()
        for launch in self.tables["process_lease"]:
            if launch["state"] not in UNCLOSED:
                continue
            run = runs[launch["run"]]
            seen[launch["run"]] += 1
            is_at_work = run["status"] == "RUNNING" or (
                run["status"] == "WAITING_USER" and run["profile"] == Profile.STICKY_PROCESS
            )
            is_its_turn = (run["attempt"], run["turn"]) == (launch["attempt"], launch["turn"])
            if not is_at_work or not is_its_turn:
                yield Violation("torn", f"{_text(run)} has the open launch {launch['id']}")
        yield from (
            Violation("two launches", _text(runs[key])) for key, count in seen.items() if count > 1
        )

    def _histories(self) -> Iterator[Violation]:
        events: dict[int, list[tuple[int, str | None, str, str]]] = defaultdict(list)
        for row in self.tables["run_event"]:
            events[row["run"]].append((row["no"], None, row["status"], row["kind"]))
        for row in self.tables["recovery_event"]:
            events[row["run"]].append(
                (row["sequence"], row["status_before"], row["status_after"], row["rule"])
            )
        for run in self.tables["run"]:
            history = sorted(events[run["id"]], key=lambda event: event[0])
            numbers = [number for number, *_ in history]
            if numbers != list(range(2, run["event_count"] + 1)):
                yield Violation("history", f"{_text(run)} has the events {numbers}")
            status = "QUEUED"
            for _, before, after, kind in history:
                if before not in (None, status) or not _may_follow(status, after, kind):
                    yield Violation("history", f"{_text(run)}: {status} to {after} by {kind}")
                status = after
            if status != run["status"]:
                yield Violation("history", f"{_text(run)} ends with {status}")

    def _repeated_decisions(self) -> Iterator[Violation]:
        reports = {row["id"]: row for row in self.tables["reconciliation"]}
        made = Counter(
            (row["run"], report["instance"], report["epoch"], report["cause"])
            for row in self.tables["recovery_event"]
            if (report := reports.get(row["reconciliation"])) is not None
            and report["cause"] == "STARTUP"
            and row["rule"] != REOPENED_RULE
        )
        runs = self.runs()
        for (run, *start), count in made.items():
            if count > 1:
                yield Violation("two decisions", f"{_text(runs[run])} in {start}")

    def _early_reports(self) -> Iterator[Violation]:
        """Yield reports of the present epochs that are complete before their decisions."""
        done = {
            (row["instance"], row["epoch"])
            for row in self.tables["reconciliation"]
            if row["state"] == "COMPLETED" and row["cause"] == "STARTUP"
        }
        epochs = self.epochs()
        for run in self.live():
            epoch = epochs[run["owner"]]
            if run["owner_epoch"] < epoch and (run["owner"], epoch) in done:
                yield Violation("early report", _text(run))


def _is_canceled(run: Row) -> bool:
    return run["status"] in TERMINAL or run["cancel_requested_at"] is not None


def _may_follow(status: str, after: str, kind: str) -> bool:
    before, now = RunStatus(status), RunStatus(after)
    if before in TERMINAL:
        return now in REOPENED.get(before, ()) and kind == REOPENED_RULE
    return before is now or is_legal(before, now)


def _text(run: Row) -> str:
    names = (
        "run_id", "status", "owner", "owner_epoch", "attempt", "turn", "error_code",
        "recovery_reason", "ended_at", "session_value",
    )  # fmt: skip
    return ", ".join(f"{name} {run[name]}" for name in names)


def _rows(store: Any) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for table in TABLES:
        cursor = store.execute(f"SELECT * FROM {table}")  # noqa: S608 - the store's own names
        names = [column[0] for column in cursor.description]
        found[table] = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return found
