"""What must be true of a life whose database failed, by the store, the log and the clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from faults.life import LIVE, SLOTS, Arena, Journal
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.domain.recovery_matrix import REOPEN_RULE
from standardwebhooks import Webhook
from support.stores import query
from support.webhook_receiver import SECRET

RESTART: Final = "ORCHESTRATOR_RESTART_INTERRUPTED"
SUCCEEDED: Final = ("SUCCEEDED", None)
STOPPED: Final = ("FAILED", RESTART)
FIRST_RULES: Final = {
    "waits": "resumable_waiting_preserved",
    "loses": "session_handle_lost",
    "replied": "accepted_reply_redriven",
    "sticky": "sticky_process_lost",
    "works": "running_interrupted",
    "again": "requeued",
    "canceling": "cancel_completed",
    "resumes": "interrupted_turn_resumed",
    "queued": "queued_interrupted",
    "queued-again": "requeued",
}
"""The rule by which the first recovery decides on each run that the killed service left."""
ENDS: Final = {
    **dict.fromkeys(("waits", "loses", "replied", "again", "resumes", "queued-again"), SUCCEEDED),
    **dict.fromkeys(("plain", "asks", "asks-sticky", "decided", "last", "late-again"), SUCCEEDED),
    **dict.fromkeys(("works", "queued", "late"), STOPPED),
    **{f"held-{number}": STOPPED for number in range(SLOTS)},
    "sticky": ("FAILED", "INTERACTION_PROCESS_LOST"),
    "canceling": ("CANCELED", None),
    "canceled": ("CANCELED", None),
}
"""How each run ends if no service ends before its planned stop."""
_EXITS: Final = {
    "starting": {ExitCode.STORAGE, ExitCode.UNAVAILABLE},
    "serving": set(),
    "stopping": {ExitCode.OK},
}
"""The exit codes that the service may have when single calls fail, by what it was doing."""
_OUTAGE_EXITS: Final = {
    "starting": {*_EXITS["starting"], ExitCode.RECOVERY, ExitCode.FENCED},
    "serving": {ExitCode.FENCED},
    "stopping": {ExitCode.OK, ExitCode.FENCED},
}
"""The same when all calls fail for a while."""


def judge(arena: Arena, journal: Journal, *, is_outage: bool) -> list[str]:
    """Return every broken promise of a life that was just played.

    Args:
        is_outage: whether the database failed for a while, and not only once.
    """
    if journal.problems:
        return journal.problems
    home = arena.home
    return [
        *_exits(journal, is_outage=is_outage),
        *_log(arena),
        *_acknowledged(arena, journal),
        *_ends(arena, is_whole=all(doing != "serving" for doing, _ in journal.exits)),
        *_records(arena),
        *_deliveries(arena),
        *(f"the process {pid} is left" for pid in home.agents()),
    ]


def _exits(journal: Journal, *, is_outage: bool) -> Iterator[str]:
    """A service that ends by itself says so by a documented exit code."""
    allowed = _OUTAGE_EXITS if is_outage else _EXITS
    for doing, code in journal.exits:
        if code not in allowed[doing]:
            yield f"exit code {code} while {doing}"


def _log(arena: Arena) -> Iterator[str]:
    """No part of the service took a failure of its database for a defect of its code."""
    for service in arena.home.services:
        for event in service.events():
            if "exception" in event:
                yield f"a traceback in {event['event']}: {event['exception']}"
    yield from arena.home.defects()


def _acknowledged(arena: Arena, journal: Journal) -> Iterator[str]:
    """Every acknowledged call took effect once."""
    runs = {run_id for (run_id,) in query(arena.home, "SELECT run_id FROM run")}
    yield from (f"the created run {run_id} is lost" for run_id in journal.created - runs)
    replies = (
        "SELECT r.run_id, i.response FROM interaction i JOIN run r ON r.id = i.run WHERE i.no = 1"
    )
    stored: dict[str, str | None] = dict(query(arena.home, replies))
    for run_id, answer in journal.replies.items():
        if json.loads(stored.get(run_id) or "null") != answer:
            yield f"the reply to {run_id} is lost: {stored.get(run_id)}"
    for run_id in journal.canceled:
        if _status(arena, run_id) != ("CANCELED", None):
            yield f"the cancel of {run_id} is lost: {_status(arena, run_id)}"
    tagged = query(arena.home, "SELECT count(*) FROM run_label WHERE key = 'tag'")
    if tagged != [(1,)]:
        yield f"one request created {tagged[0][0]} runs"


def _status(arena: Arena, run_id: str) -> Any:
    rows = query(arena.home, "SELECT status, error_code FROM run WHERE run_id = ?", run_id)
    return rows[0] if rows else None


def _ends(arena: Arena, *, is_whole: bool) -> Iterator[str]:
    """Every run has ended for its reason; the first recovery decided on each run by its rule."""
    rows = query(arena.home, "SELECT run_id, status, error_code, output FROM run")
    for run_id, status, code, output in rows:
        wanted = ENDS.get(run_id, SUCCEEDED)
        lost_with_service = code in {RESTART, "INTERACTION_PROCESS_LOST"} and not is_whole
        if (status, code) != wanted and run_id != "old" and not lost_with_service:
            yield f"{run_id} ended as {status} {code}"
        tag = output and json.loads(output).get("tag")
        if status == "SUCCEEDED" and run_id == "plain" and tag != "plain":
            yield f"{run_id} has the output {output}"
    first: dict[str, str] = dict(query(arena.home, "SELECT r.run_id, e.rule FROM recovery_event e"
                                   " JOIN run r ON r.id = e.run WHERE e.no = 1"))  # fmt: skip
    for run_id in LIVE:
        if first.get(run_id) != FIRST_RULES[run_id]:
            yield f"the recovery decided on {run_id} by {first.get(run_id)}"


def _records(arena: Arena) -> Iterator[str]:
    """The rows of each run agree with each other."""
    home = arena.home
    for (count,) in query(home, "SELECT count(*) FROM process_lease WHERE state <> 'CLOSED'"):
        if count:
            yield f"{count} launches are not closed"
    stored = query(
        home,
        "SELECT r.run_id, e.no FROM run_event e JOIN run r ON r.id = e.run UNION ALL"
        " SELECT r.run_id, v.sequence FROM recovery_event v JOIN run r ON r.id = v.run",
    )
    for run_id, count in query(home, "SELECT run_id, event_count FROM run"):
        # The first event, CREATED, has no row. Retention may have removed a part of `old`.
        numbers = sorted(number for name, number in stored if name == run_id)
        if run_id != "old" and numbers != list(range(2, count + 1)):
            yield f"{run_id} has the events {numbers} of {count}"
    once = ("SELECT r.run_id, e.kind, e.interaction, count(*) FROM run_event e JOIN run r"
            " ON r.id = e.run WHERE e.kind IN ('CREATED', 'ASKED', 'ANSWERED', 'AUTO_DECIDED',"
            " 'SUCCEEDED', 'CANCELED', 'CANCEL_REQUESTED') GROUP BY r.run_id, e.kind, e.interaction"
            " HAVING count(*) > 1")  # fmt: skip
    for run_id, kind, about, count in query(home, once):
        yield f"{run_id} has {count} events {kind} {about}"
    unended = query(home, "SELECT count(*) FROM reconciliation WHERE state = 'RUNNING'")
    if unended != [(0,)]:
        yield "a report is not closed"
    if not home.settings["database"]:
        damage = home.rows("PRAGMA integrity_check")
        if damage != [("ok",)]:
            yield f"the file is damaged: {damage}"


def _deliveries(arena: Arena) -> Iterator[str]:
    """Every event of a run was delivered, and each run's in order."""
    events = (
        "SELECT r.run_id, e.no, 'WAITING_USER' FROM run_event e JOIN run r ON r.id = e.run"
        " WHERE e.kind = 'ASKED' UNION ALL SELECT r.run_id, e.no, 'ENDED' FROM run_event e"
        " JOIN run r ON r.id = e.run WHERE e.kind IN ('SUCCEEDED', 'FAILED', 'CANCELED')"
        " UNION ALL SELECT r.run_id, e.sequence, 'RECOVERED' FROM recovery_event e"
        " JOIN run r ON r.id = e.run WHERE e.rule <> ?"
    )
    wanted = {row for row in query(arena.home, events, REOPEN_RULE) if row[0] != "old"}
    first: dict[str, tuple[str, int, str]] = {}
    for request in arena.receiver.received:
        facts = Webhook(SECRET).verify(request.body, dict(request.headers))
        first.setdefault(request.id, (facts["run_id"], facts["sequence"], facts["type"]))
    # The killed service has delivered the earliest events before the life.
    yield from (f"{missing} was not delivered" for missing in wanted - set(first.values())
                if not (missing[0] in LIVE and missing[2] == "WAITING_USER"))  # fmt: skip
    for run_id in {run_id for run_id, *_ in first.values()}:
        sequences = [no for run, no, _ in first.values() if run == run_id]
        if sequences != sorted(sequences):
            yield f"the events of {run_id} were delivered in the order {sequences}"
