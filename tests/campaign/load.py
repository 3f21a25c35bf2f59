"""Clients of one service or of several replicas, and the journal of what they asked and got."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, TypeAlias

import grpc
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import ENDED, Api, refusal_of

TRIES: Final = 8
THINK_S: Final = 0.05
RETRY_S: Final = 0.15
WATCH_S: Final = 2.0
OUTAGES: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
    }
)
"""The client does not know whether the call had an effect, and repeats it with its request_id."""
REFUSALS: Final = frozenset(
    {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION}
)
QUESTION: Final = {"kind": "open_text", "prompt": "What?"}
INPUTS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("quick", {}),
    ("works", {}),
    ("resumable", {"questions": [QUESTION]}),
    ("resumable", {"questions": [QUESTION, QUESTION]}),
    ("sticky", {"questions": [QUESTION]}),
)
POLICIES: Final = (run_pb2.RESTART_POLICY_REQUEUE, run_pb2.RESTART_POLICY_FAIL)
ASKING: Final = ("resumable", "sticky")
ACKNOWLEDGED: Final = "acknowledged"
UNSYNCED: Final = frozenset({"count", "end", "see"})
"""Entries whose loss would not weaken a judge."""

Call: TypeAlias = Callable[[Api], Any]


class Journal:
    """What services have acknowledged, outside of them.

    With a file, each entry is one line that is on the disk before the method returns, so that
    another process can follow the journal.

    Attributes:
        runs: the engine and the nonce of each acknowledged run, by run_id.
        replies: the acknowledged reply for each question, by run_id and interaction_id.
        cancels, reopens: the runs with an acknowledged cancel, or reopening.
        ended: the runs that a client has seen to end.
        asked: the nonces of all creates and replies that were sent.
        seen: the events that watchers have got, in their order: sequence and kind, by run_id.
        watched: the runs whose watch has come to its end.
        violations: answers that a client must not get, one sentence each.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Begin a journal, in a new file if one is named."""
        self.runs: dict[str, tuple[str, str]] = {}
        self.replies: dict[tuple[str, int], str] = {}
        self.cancels: set[str] = set()
        self.reopens: set[str] = set()
        self.ended: set[str] = set()
        self.asked: set[str] = set()
        self.seen: dict[str, list[tuple[int, str]]] = {}
        self.watched: set[str] = set()
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self._file = None if file is None else file.open("xb", buffering=0)
        self._lock = threading.Lock()

    def note(self, entry: str, *facts: Any) -> None:
        """Make an entry: the name of a method, and its arguments."""
        with self._lock:
            getattr(self, f"_{entry}")(*facts)
            if self._file is not None:
                self._file.write(json.dumps([entry, *facts]).encode() + b"\n")
                if entry not in UNSYNCED:
                    os.fsync(self._file.fileno())

    @property
    def answers(self) -> int:
        """The number of acknowledged calls, reads included."""
        return sum(count for name, count in self.counts.items() if name.endswith(ACKNOWLEDGED))

    def repeat(self, line: bytes) -> None:
        """Make the entry of a line of another journal's file."""
        self.note(*json.loads(line))

    def _ask(self, nonce: str) -> None:
        self.asked.add(nonce)

    def _add_run(self, run_id: str, engine: str, nonce: str) -> None:
        if run_id in self.runs:
            self.violations.append(f"two creates got the run {run_id}")
        self.runs[run_id] = engine, nonce

    def _add_reply(self, run_id: str, question: int, nonce: str) -> None:
        if (run_id, question) in self.replies:
            self.violations.append(f"two replies to {run_id} {question} were accepted")
        self.replies[run_id, question] = nonce

    def _add_cancel(self, run_id: str) -> None:
        self.cancels.add(run_id)

    def _add_reopen(self, run_id: str) -> None:
        self.reopens.add(run_id)

    def _end(self, run_id: str) -> None:
        self.ended.add(run_id)

    def _see(self, run_id: str, sequence: int, kind: str) -> None:
        self.seen.setdefault(run_id, []).append((sequence, kind))

    def _end_watch(self, run_id: str) -> None:
        self.watched.add(run_id)

    def _violate(self, text: str) -> None:
        self.violations.append(text)

    def _count(self, name: str) -> None:
        self.counts[name] += 1

    def add_run(self, run_id: str, engine: str, nonce: str) -> None:
        """Record an acknowledged create."""
        self.note("add_run", run_id, engine, nonce)

    def add_reply(self, run_id: str, question: int, nonce: str) -> None:
        """Record an acknowledged reply."""
        self.note("add_reply", run_id, question, nonce)

    def add_cancel(self, run_id: str) -> None:
        """Record an acknowledged cancel."""
        self.note("add_cancel", run_id)

    def count(self, name: str) -> None:
        """Count one call or outcome."""
        self.note("count", name)

    def begin_watch(self, run_id: str) -> bool:
        """Return whether nobody has watched a run yet; from now on somebody has."""
        with self._lock:
            begun = run_id in self.seen
            self.seen.setdefault(run_id, [])
        return not begun

    def violate(self, text: str) -> None:
        """Record an answer that a client must not get."""
        self.note("violate", text)

    def pick(self, random: Random, *engines: str) -> str | None:
        """Return a recent run that no client has seen to end, of some engines or any."""
        with self._lock:
            alive = [run for run in self.runs.items() if run[0] not in self.ended]
        able = [run_id for run_id, (engine, _) in alive[-40:] if not engines or engine in engines]
        return random.choice(able) if able else None


class Client(threading.Thread):
    """Calls random replicas until `stop` is set.

    Attributes:
        inputs: the engines of its runs, and what they get.
        weights: how often it creates, replies, cancels, reads and watches.
        retry_s: the pause before it repeats a call.
    """

    inputs: Sequence[tuple[str, Mapping[str, Any]]] = INPUTS
    weights = (5, 8, 1, 4, 2)
    retry_s = RETRY_S

    def __init__(
        self,
        number: int,
        seed: int,
        journal: Journal,
        apis: Callable[[], Sequence[Api]],
        *,
        tries: int = TRIES,
    ) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._random = Random(f"{seed}-{number}")  # noqa: S311 - a plan, no secret
        self._journal = journal
        self._apis = apis
        self._tries = tries
        self.stop = threading.Event()

    def pause_s(self) -> float:
        """Return the seconds until the next call."""
        return THINK_S

    def run(self) -> None:
        """Call until `stop` is set."""
        works = (self.create, self.reply, self.cancel, self.read, self.watch)
        while not self.stop.wait(self.pause_s()):
            (work,) = self._random.choices(works, weights=self.weights)
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a defect of the campaign is no success
                self._journal.violate(f"client: {type(error).__name__}: {error}")

    def _call(self, name: str, call: Call) -> Any:
        """Return the answer of a call that is repeated through other replicas; None: none."""
        for _ in range(self._tries):
            apis = self._apis()
            if not apis:
                self.stop.wait(self.retry_s)
                continue
            try:
                answer = call(self._random.choice(apis))
            except ValueError:  # the channel was closed: its replica has ended
                continue
            except grpc.RpcError as error:
                refusal = refusal_of(error)
                if refusal.code in REFUSALS:
                    self._journal.count(f"{name} refused")
                    return None
                if refusal.code not in OUTAGES:
                    self._journal.violate(f"{name}: {refusal.code} {refusal.message}")
                    return None
                self._journal.count(f"{name} repeated")
                time.sleep(self.retry_s)
            else:
                self._journal.count(f"{name} {ACKNOWLEDGED}")
                return answer
        self._journal.count(f"{name} unknown")
        return None

    def create(self) -> None:
        """Create a run of any engine."""
        self.create_run(*self._random.choice(self.inputs))

    def create_run(self, engine: str, given: Mapping[str, Any]) -> bool:
        """Create a run of an engine; return whether it was acknowledged."""
        nonce, request_id = uuid.uuid4().hex, str(uuid.uuid4())
        policy = self._random.choice(self.policies(engine))
        self._journal.note("ask", nonce)
        run = self._call(
            "create",
            lambda api: api.create(
                engine,
                dict(given),
                labels={"nonce": nonce},
                request_id=request_id,
                restart_policy=policy,
            ),
        )
        if run is not None:
            self._journal.add_run(run.run_id, engine, nonce)
        return run is not None

    def policies(self, _: str) -> Sequence[run_pb2.RestartPolicy.ValueType]:
        """Return the restart policies from which a run of an engine gets one."""
        return POLICIES

    def reply(self) -> None:
        """Answer the open question of a run."""
        if (run_id := self._journal.pick(self._random, *ASKING)) is None:
            return
        run = self.get(run_id)
        if run is not None and run.status == run_pb2.RUN_STATUS_WAITING_USER:
            self.reply_to(run_id, run.pending_interaction.interaction_id)

    def reply_to(self, run_id: str, question: int) -> None:
        """Answer a question of a run."""
        nonce = str(uuid.uuid4())
        self._journal.note("ask", nonce)
        answered = self._call(
            "reply", lambda api: api.reply(run_id, question, nonce, request_id=nonce)
        )
        if answered is not None:
            self._journal.add_reply(run_id, question, nonce)

    def cancel(self) -> None:
        """Cancel a run."""
        if (run_id := self._journal.pick(self._random)) is None:
            return
        request_id = str(uuid.uuid4())
        if self._call("cancel", lambda api: api.cancel(run_id, request_id=request_id)) is not None:
            self._journal.add_cancel(run_id)

    def read(self) -> None:
        """Read a run, which must be there."""
        if (run_id := self._journal.pick(self._random)) is not None:
            self.get(run_id)

    def get(self, run_id: str) -> run_pb2.Run | None:
        """Return a run; None: no replica answered."""
        run: run_pb2.Run | None = self._call("get", lambda api: api.get(run_id))
        if run is not None and self.is_over(run):
            self._journal.note("end", run_id)
        return run

    def is_over(self, run: run_pb2.Run) -> bool:
        """Return whether nothing more can happen to a run."""
        return run.status in ENDED

    def watch(self) -> None:
        """Watch a run through two replicas. Sequences must have no gap."""
        if (run_id := self._journal.pick(self._random)) is None:
            return
        last: int | None = None
        for _ in range(2):
            apis = self._apis()
            if not apis:
                return
            request = pb.WatchRunRequest(run_id=run_id, after_sequence=last)
            try:
                for message in self._random.choice(apis).runs.WatchRun(request, timeout=WATCH_S):
                    if message.WhichOneof("update") == "event":
                        if last is not None and message.sequence != last + 1:
                            self._journal.violate(
                                f"watch of {run_id}: {message.sequence} after {last}"
                            )
                        self._journal.count("watched events")
                    last = max(last or 0, message.sequence)
            except (grpc.RpcError, ValueError):
                self._journal.count("watch ended")
