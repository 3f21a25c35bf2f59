"""The client of one trial: it calls services, notes answers, and starts services that were killed.

The notes are outside of the service. A service is killed by its crash points, at the points that
the trial names, one after the other.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from crash_points import points
from crash_points.kills import Kill
from crash_points.snapshot import UNCLOSED, Acknowledged, Snapshot, Violation
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.domain.run import TERMINAL
from support.api import Api, refusal_of, status_word
from support.processes import (
    environment_of,
    living_process,
    processes_below,
    send_signal_if_alive,
)
from support.service import Home, ServiceProcess
from support.waiting import until

T = TypeVar("T")

LEASE: Final = "RUNRECOVERY_LEASE"
"""The environment variable of a process tree that names its launch: the key and the cookie."""
NAMES: Final = uuid.UUID("0b7f8a52-6f9e-4c43-9d1f-0d8fb6b5f0c1")


class Broken(Exception):
    """A promise was found to be broken. What follows from that is of no interest."""


class Crashed(Exception):
    """The service of a world was killed by a crash point."""

    def __init__(self, world: World) -> None:
        self.world = world


@dataclass(slots=True, eq=False)
class World:
    """One home, its present service, and what the client knows.

    Attributes:
        kills: the kills that are still to come; the first is armed.
        unreached: kills whose point was not passed.
        acknowledged: the calls that were answered: the word, the run, and the question.
        outcomes: the status of each run that the client has seen ended.
        problems: the violations found.
        end_s: the latest end of the trial, as of `monotonic`.
        instance: the name of the service's instance.
    """

    home: Home
    folder: Path
    kills: list[Kill]
    end_s: float
    unreached: list[Kill] = field(default_factory=list)
    fired: list[Kill] = field(default_factory=list)
    acknowledged: list[Acknowledged] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    problems: list[Violation] = field(default_factory=list)
    instance: str = "default"
    service: ServiceProcess | None = None
    api: Api | None = None
    epoch: int = 0
    _armed: int = 0

    def __post_init__(self) -> None:
        self.home.prepare = Path(points.__file__)
        self.home.env[points.FOLDER] = str(self.folder)
        self.arm()

    # -- crash points --------------------------------------------------------------------------

    def arm(self) -> None:
        """Let the next kill happen at its point."""
        if self.kills:
            self._armed += 1
            kill = self.kills[0]
            facts = f"{kill.times} {int(kill.with_shims)} {self._armed}"
            new = self.folder / "armed.new"
            new.write_text("\n".join([facts, *kill.points]), "utf-8")
            new.rename(self.folder / "armed")

    @property
    def passed(self) -> list[tuple[str, str]]:
        """What services have passed, in order: the pid, and the point."""
        lines = (self.folder / "passed").read_text("utf-8").splitlines()
        return [(pid, point) for pid, _, point in (line.partition("\t") for line in lines)]

    def _has_crashed(self) -> bool:
        service = self.service
        if service is None or service.popen.poll() is None:
            return False
        if not (self.folder / f"fired-{service.pid}").exists():
            raise AssertionError(f"the service exited by itself:\n{service.text[-6000:]}")
        return True

    def look(self) -> None:
        """Raise Crashed if the service was killed, and Broken if a violation was found."""
        if self.problems:
            raise Broken
        if self._has_crashed():
            raise Crashed(self)
        if time.monotonic() > self.end_s:
            text = "" if self.service is None else self.service.text[-6000:]
            raise AssertionError(f"the trial takes too long:\n{text}")

    def until(self, condition: Callable[[], T], what: str) -> T:
        """Wait for a condition, or raise Crashed."""

        def check() -> T:
            self.look()
            return condition()

        return until(check, what, timeout_s=max(0.0, self.end_s - time.monotonic()))

    # -- starts and ends -----------------------------------------------------------------------

    def start(self) -> None:
        """Start a service, and start it again while it is killed before it serves; then judge."""
        while True:
            try:
                self._start_once()
            except Crashed:
                self.bury()
            else:
                return

    def _start_once(self) -> None:
        self.service = service = self.home.spawn()
        listening = self.until(lambda: service.events("service.listening"), "it listens")
        service.address = listening[0]["address"]
        self.api = service.api()
        self.until(self._is_serving, "it serves")
        self.problems += self.judge_serving()
        self.look()

    def _is_serving(self) -> bool:
        assert self.api is not None
        try:
            return self.api.health_of() == "SERVING"
        except grpc.RpcError:
            return False

    def bury(self) -> None:
        """After a kill: judge what it has left, and arm the next kill."""
        assert self.service is not None
        point = (self.folder / f"fired-{self.service.pid}").read_text("utf-8")
        self.fired.append(replace(self.kills.pop(0), points=(point,)))
        self._close()
        self.problems += self.judge_store()
        self.arm()

    def _close(self) -> None:
        assert self.service is not None
        self.service.popen.wait()
        self.service.close()
        self.service = self.api = None

    def recover(self) -> None:
        """After a kill: start services until one serves. Kills that it has not met are void."""
        self.bury()
        self.start()
        self.disarm()

    def disarm(self) -> None:
        """Let no further kill happen."""
        self.unreached += self.kills
        self.kills.clear()
        (self.folder / "armed").unlink(missing_ok=True)

    def kill(self) -> None:
        """Kill service and shims from outside, so that the agents become orphans."""
        assert self.service is not None
        self.look()
        found = map(living_process, points.shims_of(self.service.pid))
        shims = [shim for shim in found if shim is not None]
        for shim in shims:  # a shim that runs would end its agents
            send_signal_if_alive(shim, signal.SIGSTOP)
        self.service.popen.kill()
        self.service.popen.wait()
        for shim in shims:
            send_signal_if_alive(shim, signal.SIGKILL)
        if self._fired_meanwhile():
            raise Crashed(self)
        self._close()
        self.problems += self.judge_store()

    def _fired_meanwhile(self) -> bool:
        assert self.service is not None
        return (self.folder / f"fired-{self.service.pid}").exists()

    def stop(self) -> None:
        """Stop the service as an operator does."""
        assert self.service is not None
        service = self.service
        self.look()
        service.terminate()
        until(lambda: service.popen.poll() is not None, "the service stops", timeout_s=60)
        if self._fired_meanwhile():
            raise Crashed(self)
        if (code := service.popen.wait()) != 0:
            self.problems.append(Violation("exit", f"{code}: {service.text[-2000:]}"))
        self._close()
        self.problems += self.judge_store()

    # -- calls ---------------------------------------------------------------------------------

    def call(self, do: Callable[[Api], T]) -> T:
        """Call the service; raise Crashed if it was killed meanwhile."""
        assert self.api is not None
        try:
            return do(self.api)
        except grpc.RpcError:
            assert self.service is not None
            ends = time.monotonic() + 1.0
            while time.monotonic() < ends and self.service.popen.poll() is None:
                time.sleep(0.01)
            self.look()
            raise

    def create(self, engine: str, run_id: str, given: dict[str, Any], **fields: Any) -> None:
        """Create a run, once."""
        request_id = str(uuid.uuid5(NAMES, f"create {run_id}"))
        self.call(lambda api: api.create(
            engine, given, run_id=run_id, request_id=request_id, **fields
        ))  # fmt: skip
        self._acknowledge("create", run_id)

    def get(self, run_id: str) -> run_pb2.Run:
        """Return a run. Its end is noted."""
        run = self.call(lambda api: api.get(run_id))
        if status_word(run) in TERMINAL:
            self.outcomes[run_id] = status_word(run)
        return run

    def reply(self, run: run_pb2.Run, answer: str) -> None:
        """Answer the question of a waiting run, unless it is too late."""
        number = run.pending_interaction.interaction_id
        request_id = str(uuid.uuid5(NAMES, f"reply {run.run_id} {number} {run.attempt}"))
        try:
            self.call(lambda api: api.reply(run.run_id, number, answer, request_id=request_id))
        except grpc.RpcError as error:
            if refusal_of(error).reason not in LATE:
                raise
        else:
            self._acknowledge("reply", run.run_id, number)

    def cancel(self, run_id: str) -> None:
        """Cancel a run, unless it has ended."""
        if status_word(self.get(run_id)) in TERMINAL:
            return
        self.call(lambda api: api.cancel(run_id))
        self._acknowledge("cancel", run_id)

    def reopen(self, run_id: str) -> None:
        """Reopen a run that has lost its session, if it is reopenable."""
        run = self.get(run_id)
        if not run.HasField("reopenable_until"):
            return
        request = pb.ReopenRunRequest(run_id=run_id, keep_session=True)
        self.call(lambda api: api.runs.ReopenRun(request, timeout=10))
        self.outcomes.pop(run_id, None)
        self._acknowledge("reopen", run_id)

    def _acknowledge(self, word: str, run_id: str, number: int = 0) -> None:
        if (word, run_id, number) not in self.acknowledged:
            self.acknowledged.append((word, run_id, number))

    # -- judging -------------------------------------------------------------------------------

    def judge_store(self) -> Iterator[Violation]:
        """Yield what is wrong in the store, at any time."""
        store = Snapshot.read(self.home)
        yield from store.violations()
        yield from store.lost(self.acknowledged, self.outcomes)

    def judge_serving(self) -> Iterator[Violation]:
        """Yield what is wrong at the moment from which on a service serves."""
        before = Snapshot.read(self.home)
        yield from before.violations()
        yield from before.undecided(self.instance)
        yield from before.lost(self.acknowledged, self.outcomes)
        yield from self._orphans(before)
        epoch = before.epochs()[self.instance]
        if epoch <= self.epoch:
            yield Violation("epoch", f"{epoch} after {self.epoch}")
        self.epoch = epoch
        reports = [
            row for row in before.tables["reconciliation"]
            if (row["instance"], row["epoch"]) == (self.instance, epoch)
            and (row["cause"], row["state"]) == ("STARTUP", "COMPLETED")
        ]  # fmt: skip
        if len(reports) != 1:
            yield Violation("serves early", f"{len(reports)} complete reports of epoch {epoch}")

    def _orphans(self, before: Snapshot) -> Iterator[Violation]:
        """Yield processes of launches that were over when the snapshot was read."""
        epochs = before.epochs()
        over = {
            row["id"]: row["state"] for row in before.tables["process_lease"]
            if row["state"] not in UNCLOSED
            or (row["instance"] == self.instance and row["epoch"] < epochs[self.instance])
        }  # fmt: skip
        cookies = {row["cookie"] for row in before.tables["process_lease"]}
        found = _launched(self.home, cookies)
        known = {row["id"] for row in Snapshot.read(self.home).tables["process_lease"]}
        for pid, key in found.items():
            if key in over or key not in known:
                yield Violation("orphan", f"process {pid} of launch {key}, {over.get(key)}")


def _launched(home: Home, cookies: set[str]) -> dict[int, int]:
    """Return the key of the launch of each living process of a home."""
    found = {}
    below = set(processes_below(home.data / "runs"))
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        key, _, cookie = environment_of(pid).get(LEASE, "").partition(".")
        if (cookie in cookies or (key and pid in below)) and living_process(pid) is not None:
            found[pid] = int(key, 16)
    return found


LATE: Final = frozenset({"INTERACTION_SUPERSEDED", "RUN_NOT_WAITING"})
"""The reasons of refusals of a reply to a run that does not wait any more."""
