"""The promises of the service, checked against its store, its processes and its answers.

I1 durability, I2 convergence, I3 atomicity, I4 legality, I5 no orphan, I7 single owner, I8 single
launch, I9 slots, I11 idempotence, I12 order of health.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from runrecovery_service.domain.recovery_matrix import REOPEN_RULE
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.transitions import NEXT, REOPENED
from simulation.agents import Agents
from simulation.clients import Call, Clients
from simulation.world import Violation, World

TERMINAL: Final = ("SUCCEEDED", "FAILED", "CANCELED")
EXACT_US: Final = 2
_EVENTS: Final = """
    SELECT 1 AS no, 'CREATED' AS kind, 'QUEUED' AS status
    UNION ALL SELECT no, kind, status FROM run_event WHERE run = ?
    UNION ALL SELECT sequence, rule, status_after FROM recovery_event WHERE run = ?
    ORDER BY no
"""
_COLUMNS: Final = (
    "id", "run_id", "status", "profile", "owner_epoch", "version", "event_count",
    "interaction_count", "cancel_requested_at", "error_code", "output", "wait_due_us",
    "run_due_us", "run_deadline_at", "due_clock",
)  # fmt: skip


@dataclass
class Judge:
    """Reads the store of one history by a connection of its own, and knows its earlier states."""

    path: Path
    world: World
    agents: Agents
    clients: Clients
    before: dict[int, dict[str, Any]] = field(default_factory=dict)
    deadlines: dict[tuple[int, int], int] = field(default_factory=dict)
    is_recovering: bool = False

    def __post_init__(self) -> None:
        self._db = sqlite3.connect(self.path, check_same_thread=False)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def rows(self, sql: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a query."""
        return self._db.execute(sql, params).fetchall()

    def read_runs(self) -> dict[int, dict[str, Any]]:
        """Return every run by its key."""
        found = self.rows(f"SELECT {', '.join(_COLUMNS)} FROM run ORDER BY id")  # noqa: S608 - our own words
        return {row[0]: dict(zip(_COLUMNS, row, strict=True)) for row in found}

    def live_keys(self) -> set[int]:
        """Return the keys of runs that have not ended."""
        return {key for key, run in self.read_runs().items() if run["status"] not in TERMINAL}

    # -- at any time ---------------------------------------------------------------------------

    def check(self) -> None:
        """Check everything that must always be true.

        Raises:
            Violation: a promise is broken.
        """
        if self.world.defects:
            raise Violation(self.world.defects[0])
        runs = self.read_runs()
        questions = self.rows(
            "SELECT run, no, state, response, auto_decided, wait_deadline_at FROM interaction"
        )
        for key, run in runs.items():
            self._check_run(run, [one for one in questions if one[0] == key])
            self._check_history(run, self.before.get(key))
        if lost := self.before.keys() - runs.keys():
            raise Violation(f"I1: runs {lost} are gone")
        for tree in self.agents.living:
            state = self.rows("SELECT state FROM process_lease WHERE id = ?", tree.launch_key)
            if state in ([], [("CLOSED",)]):
                raise Violation(f"I5: {tree} lives, its launch is closed")
        self._check_answers(runs, {(one[0], one[1]): one for one in questions})
        for key, run in runs.items():
            if run["status"] != self.before.get(key, {}).get("status"):
                self.world.note(f"{run['run_id']} is {run['status']} {run['error_code'] or ''}")
        self.before = runs

    def _check_run(self, run: dict[str, Any], questions: list[tuple[Any, ...]]) -> None:
        name, status = run["run_id"], run["status"]
        is_open = [number for _, number, state, *_ in questions if state == "OPEN"]
        if is_open and (status != "WAITING_USER" or is_open != [run["interaction_count"]]):
            raise Violation(f"I3: {name} is {status} with the open questions {is_open}")
        is_resumable = run["profile"] == "RESUMABLE"
        if status == "WAITING_USER" and is_resumable and not is_open:
            raise Violation(f"I3: {name} waits without a question")
        # A recovery closes launches before it decides on runs.
        is_busy = self.world.is_alive and not self.is_recovering
        if is_busy and status == "RUNNING" and self._unclosed(run) == 0:
            raise Violation(f"I3: {name} is RUNNING without a launch record")
        if status == "QUEUED" and self._unclosed(run, "INTENT", "GATED", "RUNNING"):
            raise Violation(f"I3: {name} is QUEUED, but its launch is not closed")
        self._check_deadlines(run, questions)

    def _unclosed(self, run: dict[str, Any], *states: str) -> int:
        marks = ", ".join("?" for _ in states)
        which = f"state IN ({marks})" if states else "state <> 'CLOSED'"
        sql = f"SELECT count(*) FROM process_lease WHERE run = ? AND {which}"  # noqa: S608 - our own words
        return int(self.rows(sql, run["id"], *states)[0][0])

    def _check_deadlines(self, run: dict[str, Any], questions: list[tuple[Any, ...]]) -> None:
        """A deadline never moves, and is the same moment on both clocks."""
        latest = {number: at for _, number, *_, at in questions}.get(run["interaction_count"])
        for kind, due_us, at in (
            (0, run["run_due_us"], run["run_deadline_at"]),
            (run["interaction_count"] or -1, run["wait_due_us"], latest),
        ):
            if at is None:
                continue
            first = self.deadlines.setdefault((run["id"], kind), at)
            if first != at and not self._was_reopened(run):
                raise Violation(
                    f"the deadline {kind} of {run['run_id']} has moved: {at - first} us"
                )
            if due_us is None or run["due_clock"] != f"boot-{self.world.boot}":
                continue
            offset = due_us - at
            if min(abs(offset - one) for one in self.world.offsets_us) > EXACT_US:
                raise Violation(f"the deadline {kind} of {run['run_id']} is at another time")

    def _was_reopened(self, run: dict[str, Any]) -> bool:
        sql = "SELECT 1 FROM recovery_event WHERE run = ? AND rule = ?"
        return bool(self.rows(sql, run["id"], REOPEN_RULE))

    def _check_history(self, run: dict[str, Any], before: dict[str, Any] | None) -> None:
        name, key = run["run_id"], run["id"]
        if before is not None and run["version"] == before["version"]:
            return
        events = self.rows(_EVENTS, key, key)
        if [number for number, *_ in events] != list(range(1, run["event_count"] + 1)):
            raise Violation(f"I3: the events of {name} have a gap")
        if events[-1][2] != run["status"]:
            raise Violation(f"I3: {name} is {run['status']}, its last event says {events[-1][2]}")
        for (*_, first), (_, kind, then) in pairwise(events):
            legal = NEXT[RunStatus(first)]
            if kind == REOPEN_RULE:
                legal = REOPENED.get(RunStatus(first), frozenset())
            if first != then and RunStatus(then) not in legal:
                raise Violation(f"I4: {name} went from {first} to {then}")
        if before is not None:
            self._check_change(run, before, events)

    def _check_change(
        self, run: dict[str, Any], before: dict[str, Any], events: list[tuple[Any, ...]]
    ) -> None:
        name = run["run_id"]
        if run["version"] < before["version"] or run["event_count"] < before["event_count"]:
            raise Violation(f"I1: {name} has lost a change")
        if run["owner_epoch"] < before["owner_epoch"]:
            raise Violation(f"I7: the epoch of {name} has fallen")
        new_kinds = {kind for _, kind, _ in events[before["event_count"] :]}
        facts = ("status", "output", "error_code")
        is_final = before["status"] in TERMINAL and REOPEN_RULE not in new_kinds
        if is_final and any(run[fact] != before[fact] for fact in facts):
            raise Violation(f"I4: {name} had ended as {before['status']} and has changed")

    # -- what callers were told ----------------------------------------------------------------

    def _check_answers(
        self, runs: dict[int, dict[str, Any]], questions: dict[tuple[int, int], tuple[Any, ...]]
    ) -> None:
        by_id = {run["run_id"]: run for run in runs.values()}
        for call in self.clients.of("CreateRun"):
            assert call.answer is not None
            if call.answer.run_id not in by_id:
                raise Violation(f"I1: the created {call.answer.run_id} is gone")
        for call in self.clients.of("SubmitReply"):
            self._check_reply(call, by_id[call.run_id], questions)
        for call in self.clients.of("CancelRun"):
            run = by_id[call.run_id]
            if run["cancel_requested_at"] is None:
                raise Violation(f"I1: the cancel of {call.run_id} is gone")
            if run["status"] in ("SUCCEEDED", "FAILED"):
                raise Violation(f"I1: {call.run_id} was canceled and is {run['status']}")

    def _check_reply(
        self, call: Call, run: dict[str, Any], questions: dict[tuple[int, int], tuple[Any, ...]]
    ) -> None:
        number, response = call.number, call.arguments[2]
        found = questions.get((run["id"], number))
        if found is None or found[2] == "OPEN" or json.loads(found[3]) != response:
            raise Violation(f"I1: the reply to question {number} of {call.run_id} is gone: {found}")
        read = self.agents.memories[call.run_id].replies
        if found[2] == "DELIVERED" and read.get(number) != response:
            raise Violation(f"I1: no agent has read the reply {number} of {call.run_id}: {read}")

    # -- at the moment of SERVING --------------------------------------------------------------

    def check_serving(self, epoch: int, live_before: set[int]) -> None:
        """Check what a recovery has done, before anything else happens.

        Args:
            live_before: the runs that had not ended at the claim of the epoch.
        """
        if late := self.rows(
            "SELECT run_id FROM run WHERE owner_epoch < ?"
            " AND status NOT IN ('SUCCEEDED', 'FAILED', 'CANCELED')",
            epoch,
        ):
            raise Violation(f"I2: SERVING, but nothing was decided on {late}")
        decisions = dict(
            self.rows(
                "SELECT e.run, count(*) FROM recovery_event e JOIN reconciliation r"
                " ON r.id = e.reconciliation WHERE r.epoch = ? AND r.cause = 'STARTUP'"
                " AND e.rule <> ? GROUP BY e.run",
                epoch,
                REOPEN_RULE,
            )
        )
        # A decision of an earlier recovery stands while its run has not changed since.
        standing = {
            key
            for (key,) in self.rows("SELECT id FROM run WHERE recovered_version = version")
            if key not in decisions
        }
        if decisions != dict.fromkeys(live_before - standing, 1):
            raise Violation(f"I2, I11: decisions {decisions}, live before: {live_before}")
        alive = [
            str(tree) for tree in self.agents.living if tree.launch_key not in self.agents.unendable
        ]
        if alive:
            raise Violation(f"I5: SERVING, but {alive} live")
        if self.rows(
            "SELECT 1 FROM process_lease"
            " WHERE epoch < ? AND state NOT IN ('CLOSED', 'KILL_PENDING')",
            epoch,
        ):
            raise Violation("I12: SERVING, but launches of earlier epochs are open")

    # -- at the end ----------------------------------------------------------------------------

    def check_end(self, slots_in_use: int) -> None:
        """Check what must be true once nothing happens any more."""
        runs = self.read_runs()
        now_us = self.world.now_ns() // 1000
        for run in runs.values():
            name, status = run["run_id"], run["status"]
            if status not in (*TERMINAL, "WAITING_USER"):
                raise Violation(f"{name} is {status} for ever")
            if status == "SUCCEEDED":
                results = self.agents.memories[name].results
                if json.loads(run["output"]) not in results:
                    raise Violation(f"the output of {name} is none of {results}")
            for column in ("wait_due_us", "run_due_us"):
                due_us = run[column]
                if status == "WAITING_USER" and due_us is not None and due_us < now_us - 5_000_000:
                    raise Violation(f"{column} of {name} has passed without effect")
        waiting = sum(
            run["status"] == "WAITING_USER" and run["profile"] == "STICKY_PROCESS"
            for run in runs.values()
        )
        if slots_in_use != waiting:
            raise Violation(f"I9: {slots_in_use} slots in use, {waiting} processes wait")
        living = len(self.agents.living)
        if living != waiting:
            raise Violation(f"I9: {living} trees live, {waiting} processes wait")
        creates = [call for call in self.clients.calls if call.method == "CreateRun"]
        done = {call.answer.run_id for call in creates if call.answer is not None}
        if done != {run["run_id"] for run in runs.values()}:
            raise Violation("I1: a create was recorded twice, or not at all")
