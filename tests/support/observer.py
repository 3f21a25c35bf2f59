"""A minimal watcher of runs, which resumes by `after_sequence` alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from runrecovery.v1 import run_pb2, run_service_pb2_grpc
from runrecovery.v1 import run_service_pb2 as pb

from support.api import NO_RETRY

AGAIN_S: Final = 0.02
"""Between two tries to reach a service that is not there."""


@dataclass(slots=True, kw_only=True, eq=False)
class Observer:
    """Collects the events of one run, from the first to the end of the stream.

    Attributes:
        address: returns the current address of the service.
        events: the events so far.
        breaks: how often the stream broke.
        ended: whether the service ended the stream with OK.
    """

    run_id: str
    address: Callable[[], str]
    events: list[tuple[int, run_pb2.RunEvent]] = field(default_factory=list)
    breaks: int = 0
    ended: bool = False
    broken: BaseException | None = None
    _gone: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the stream; raise its failure."""
        self._thread.join(timeout_s)
        self._gone.set()
        if self.broken is not None:
            raise self.broken
        assert self.ended, f"the watch of {self.run_id} did not end: {kinds(self.events)[-3:]}"

    def leave(self) -> None:
        """Stop watching when the stream breaks."""
        self._gone.set()

    def _work(self) -> None:
        while not (self.ended or self._gone.is_set()):
            try:
                self._read_on()
                self.ended = True
            except grpc.RpcError as error:
                call: Any = error
                if call.code() is not grpc.StatusCode.UNAVAILABLE:
                    self.broken = error
                    return
                self.breaks += 1
                self._gone.wait(AGAIN_S)
            except BaseException as error:  # noqa: BLE001 - told by `join`
                self.broken = error
                return

    def _read_on(self) -> None:
        seen = self.events[-1][0] if self.events else 0
        request = pb.WatchRunRequest(run_id=self.run_id, after_sequence=seen)
        with grpc.insecure_channel(self.address(), options=NO_RETRY) as channel:
            for update in run_service_pb2_grpc.RunServiceStub(channel).WatchRun(request):
                if not update.HasField("bookmark"):
                    self.events.append((update.sequence, update.event))


Events = list[tuple[int, run_pb2.RunEvent]]

# From one event to the next; the same status again is a decision, a cancel, or a new question.
FOLLOWS: Final[Mapping[str, frozenset[str]]] = {
    "QUEUED": frozenset({"QUEUED", "RUNNING", "FAILED", "CANCELED"}),
    "RUNNING": frozenset({"RUNNING", "QUEUED", "WAITING_USER", "SUCCEEDED", "FAILED", "CANCELED"}),
    "WAITING_USER": frozenset({"WAITING_USER", "QUEUED", "RUNNING", "FAILED", "CANCELED"}),
    "SUCCEEDED": frozenset(),
    "FAILED": frozenset(),
    "CANCELED": frozenset(),
}
LEAVES: Final[Mapping[str, frozenset[str]]] = {
    "CREATED": frozenset({"QUEUED"}),
    "STARTED": frozenset({"RUNNING"}),
    "ASKED": frozenset({"WAITING_USER"}),
    "ANSWERED": frozenset({"QUEUED", "RUNNING"}),
    "AUTO_DECIDED": frozenset({"QUEUED", "RUNNING"}),
    "QUEUED": frozenset({"QUEUED"}),
    "CANCEL_REQUESTED": frozenset({"RUNNING", "WAITING_USER"}),
    "SUCCEEDED": frozenset({"SUCCEEDED"}),
    "FAILED": frozenset({"FAILED"}),
    "CANCELED": frozenset({"CANCELED"}),
    # SUCCEEDED: its result was found in the kept output.
    "RECOVERED": frozenset({"QUEUED", "WAITING_USER", "SUCCEEDED", "FAILED", "CANCELED"}),
}


def kinds(events: Events) -> list[str]:
    """Return the kinds of the events."""
    names = [run_pb2.RunEventKind.Name(event.kind) for _, event in events]
    return [name.removeprefix("RUN_EVENT_KIND_") for name in names]


def statuses(events: Events) -> list[str]:
    """Return the status of the run after each event."""
    names = [run_pb2.RunStatus.Name(event.status) for _, event in events]
    return [name.removeprefix("RUN_STATUS_") for name in names]


def assert_whole(events: Events) -> None:
    """Assert that no event is missing, doubled, or impossible after the one before."""
    assert [sequence for sequence, _ in events] == list(range(1, len(events) + 1))
    happened, became = kinds(events), statuses(events)
    assert happened[0] == "CREATED"
    assert "CREATED" not in happened[1:]
    for kind, status in zip(happened, became, strict=True):
        assert status in LEAVES[kind], (kind, status)
    for before, after in itertools.pairwise(became):
        assert after in FOLLOWS[before], (before, after, happened)
    attempts = [event.attempt for _, event in events]
    assert attempts == sorted(attempts)
