"""Watches that a scripted server serves from a record of events, and breaks as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import grpc
from runrecovery.v1 import recovery_service_pb2, run_pb2, run_service_pb2

from support.scripted_server import Fail, Stream

Update: TypeAlias = run_service_pb2.WatchRunResponse
Decision: TypeAlias = recovery_service_pb2.WatchRecoveredResponse
Fault: TypeAlias = Callable[[Sequence[Any]], Stream]

BEFORE: Final = 3
"""The sequence of the last event before the watch began."""
EVENTS: Final = 8
BOOKMARK: Final = run_pb2.WatchBookmark()
GONE: Final = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="SHUTTING_DOWN")
_SLOW: Final = Fail(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="SLOW_READER")
_FULL: Final = Fail(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED")
_RECOVERING: Final = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="RECONCILIATION_IN_PROGRESS")
_CANCELLED: Final = Fail(code=grpc.StatusCode.CANCELLED)

FAULTS: Final[Mapping[str, Fault]] = {
    "nothing": lambda _: Stream([], then=GONE),
    "recovering": lambda _: Stream([], then=_RECOVERING),
    "full": lambda _: Stream([], then=_FULL),
    "broken": lambda sent: Stream(sent[:2], then=GONE),
    "cancelled": lambda sent: Stream(sent[:2], then=_CANCELLED),
    "slow": lambda sent: Stream(sent[:2], then=_SLOW),
    "doubled": lambda sent: Stream([m for m in sent[:3] for _ in "ab"], then=GONE),
    "repeated": lambda sent: Stream([*sent[:3], *sent[:3]], then=GONE),
    "silent": lambda sent: Stream(sent[:2], hold=True),
}
"""Ways to break a stream of these messages."""
FAULT_LISTS: Final = [[], *([name] for name in FAULTS), [*FAULTS]]
"""No fault, each fault, and all faults one after another."""


def event(sequence: int) -> Update:
    """Return an event of a run."""
    return Update(sequence=sequence, event=run_pb2.RunEvent(kind=run_pb2.RUN_EVENT_KIND_ASKED))


def snapshot(sequence: int) -> Update:
    """Return a run as the first message of a watch."""
    return Update(sequence=sequence, snapshot=run_pb2.Run(run_id="r"))


def bookmark(sequence: int) -> Update:
    """Return a bookmark."""
    return Update(sequence=sequence, bookmark=BOOKMARK)


def decision(number: int) -> Decision:
    """Return a decision for a run."""
    return Decision(
        cursor=f"c{number}", decision=recovery_service_pb2.RecoveredRun(run_id=f"r{number}")
    )


def kinds_and_sequences(updates: Sequence[Update]) -> list[tuple[str | None, int]]:
    """Return the kind and the sequence of each update."""
    return [(update.WhichOneof("update"), update.sequence) for update in updates]


class RecordedEvents:
    """Answers each watch from a record of `EVENTS` events.

    The first streams have the given faults, in order. Later streams send the rest and end with OK.

    Attributes:
        opened: set when the first stream begins.
    """

    def __init__(self, *faults: Fault) -> None:
        self.opened = threading.Event()
        self._faults = list(faults)

    def watch_run(self, request: run_service_pb2.WatchRunRequest, _context: object) -> Stream:
        """Answer WatchRun."""
        known = request.after_sequence if request.HasField("after_sequence") else None
        begin = [snapshot(BEFORE)] if known is None else []
        after = BEFORE if known is None else known
        return self._answer([*begin, *map(event, range(after + 1, EVENTS + 1))])

    def watch_recovered(
        self, request: recovery_service_pb2.WatchRecoveredRequest, _context: object
    ) -> Stream:
        """Answer WatchRecovered."""
        number = int(request.after_cursor[1:] or BEFORE)
        begin = Decision(cursor=f"c{number}", bookmark=BOOKMARK)
        return self._answer([begin, *map(decision, range(number + 1, EVENTS + 1))])

    def _answer(self, messages: Sequence[Any]) -> Stream:
        self.opened.set()
        return self._faults.pop(0)(messages) if self._faults else Stream(messages)
