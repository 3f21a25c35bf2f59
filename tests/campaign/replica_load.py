"""Clients of several replicas, and the journal of what was acknowledged to them."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Final, TypeAlias

import grpc
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refusal_of

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
ASKING: Final = ("resumable", "sticky")

Call: TypeAlias = Callable[[Api], Any]


class Journal:
    """What replicas have acknowledged, outside of the service.

    Attributes:
        runs: the engine and the nonce of each acknowledged run, by run_id.
        replies: the acknowledged reply for each question, by run_id and interaction_id.
        cancels: the runs with an acknowledged cancel.
        violations: answers that a client must not get, one sentence each.
    """

    def __init__(self) -> None:
        self.runs: dict[str, tuple[str, str]] = {}
        self.replies: dict[tuple[str, int], str] = {}
        self.cancels: set[str] = set()
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add_run(self, run_id: str, engine: str, nonce: str) -> None:
        """Record an acknowledged create."""
        with self._lock:
            if run_id in self.runs:
                self.violations.append(f"two creates got the run {run_id}")
            self.runs[run_id] = engine, nonce

    def add_reply(self, run_id: str, question: int, nonce: str) -> None:
        """Record an acknowledged reply."""
        with self._lock:
            if (run_id, question) in self.replies:
                self.violations.append(f"two replies to {run_id} {question} were accepted")
            self.replies[run_id, question] = nonce

    def add_cancel(self, run_id: str) -> None:
        """Record an acknowledged cancel."""
        with self._lock:
            self.cancels.add(run_id)

    def count(self, name: str) -> None:
        """Count one call or outcome."""
        with self._lock:
            self.counts[name] += 1

    def pick(self, random: Random, *engines: str) -> str | None:
        """Return a recent run, of some engines or any."""
        with self._lock:
            recent = list(self.runs.items())[-40:]
        able = [run_id for run_id, (engine, _) in recent if not engines or engine in engines]
        return random.choice(able) if able else None


class Client(threading.Thread):
    """Calls random replicas until `stop` is set."""

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

    def run(self) -> None:
        """Call until `stop` is set."""
        works = (self.create, self.reply, self.cancel, self.read, self.watch)
        while not self.stop.wait(THINK_S):
            (work,) = self._random.choices(works, weights=(5, 8, 1, 4, 2))
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a defect of the campaign is no success
                self._journal.violations.append(f"client: {type(error).__name__}: {error}")

    def _call(self, name: str, call: Call) -> Any:
        """Return the answer of a call that is repeated through other replicas; None: none."""
        for _ in range(self._tries):
            apis = self._apis()
            if not apis:
                self.stop.wait(RETRY_S)
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
                    self._journal.violations.append(f"{name}: {refusal.code} {refusal.message}")
                    return None
                self._journal.count(f"{name} repeated")
                time.sleep(RETRY_S)
            else:
                self._journal.count(f"{name} acknowledged")
                return answer
        self._journal.count(f"{name} unknown")
        return None

    def create(self) -> None:
        """Create a run of any engine."""
        self.create_run(*self._random.choice(INPUTS))

    def create_run(self, engine: str, given: Mapping[str, Any]) -> bool:
        """Create a run of an engine; return whether it was acknowledged."""
        nonce, request_id = uuid.uuid4().hex, str(uuid.uuid4())
        policy = self._random.choice((run_pb2.RESTART_POLICY_REQUEUE, run_pb2.RESTART_POLICY_FAIL))
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
        return run

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
                            self._journal.violations.append(
                                f"watch of {run_id}: {message.sequence} after {last}"
                            )
                        self._journal.count("watched events")
                    last = max(last or 0, message.sequence)
            except (grpc.RpcError, ValueError):
                self._journal.count("watch ended")
