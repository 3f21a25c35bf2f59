"""One life of a service whose database fails, and what clients had from it.

The service starts on the store of a killed one, which had runs of every kind. Clients repeat each
call until it succeeds. The life ends with a planned stop while runs work, wait and are queued. Then
the service starts once more, without faults.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import grpc
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import ENDED, Api, refusal_of, status_word, struct, value
from support.defects import DEFECTS
from support.engines import GOOD_ENGINES, script
from support.service import Home, ServiceProcess
from support.stores import change, key_of, query
from support.waiting import until
from support.webhook_receiver import SECRET, Receiver

from bench.postgres import ScratchPostgres

Answer = TypeVar("Answer")
Database = Literal["sqlite", "postgresql"]

PROGRAM: Final = Path(__file__).with_name("database_calls.py")
CALL_S: Final = 60.0
"""How long a client repeats a call. Longer than any fault lasts, and than the service's pauses."""
REPEATED: Final = frozenset(
    {"RECONCILIATION_IN_PROGRESS", "SHUTTING_DOWN", "STORAGE_BUSY", "STORAGE_FULL",
     "STORAGE_UNAVAILABLE"}
)  # fmt: skip
"""The reasons with which the service may refuse a call because its database fails."""
FAULTY_STARTS: Final = 4
"""The most starts of one life whose database may fail."""
SLOTS: Final = 3
REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
RESUME: Final = run_pb2.RESTART_POLICY_RESUME
OLD_US: Final = 3_600_000_000
PLAYER: Final = script(
    """
import json, signal, sys, time
message = json.loads(sys.stdin.readline())
given, first = message["input"], message["type"] == "start" and message["attempt"] == 1
say = lambda **fields: print(json.dumps(fields), flush=True)
reply = message.get("interrupted", message).get("reply")
if given.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(type="session", value="s")
say(type="progress", message="worked")
if given.get("holds") and first:
    time.sleep(600)
if given.get("asks") and reply is None:
    say(type="ask", kind="open_text", prompt="?")
else:
    say(type="result", output={"answer": reply and reply["response"], "tag": given.get("tag")})
""",
    resumes_interrupted=True,
)
HURRIED: Final = replace(
    PLAYER, more={**PLAYER.more, "session_timeout_s": 1.0, "require_user_reply": False}
)
ENGINES: Final = {**GOOD_ENGINES, "player": PLAYER, "hurried": HURRIED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A call of the service to its database that fails, and for how many seconds later ones do."""

    site: str
    nth: int
    kind: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the database of one life fails, and by which mutant the service is broken."""

    database: Database
    faults: tuple[Fault, ...] = ()
    mutant: str = ""


@dataclass(slots=True)
class Journal:
    """What clients had from one life.

    Attributes:
        replies, canceled: the run ids of accepted calls; for replies with the answer.
        created: the run ids of acknowledged creates.
        answers: how often each refusal was received, as `CODE REASON`.
        exits: how the services ended, in order: `starting`, `serving` or `stopping`; exit code.
        problems: what a client had that no page promises.
    """

    created: set[str] = field(default_factory=set)
    replies: dict[str, str] = field(default_factory=dict)
    canceled: set[str] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    exits: list[tuple[str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class ServiceEnded(Exception):
    """The service ended while a client called it."""


class Undocumented(Exception):
    """A client had an answer that no page promises."""


class Client:
    """Calls one service, and repeats each call until it succeeds."""

    def __init__(self, service: ServiceProcess, journal: Journal) -> None:
        self._service = service
        self._api = Api(service.address, timeout_s=10.0)
        self.journal = journal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.channel.close()

    def call(self, method: str, request: Any, read: Callable[[Any], Any] = lambda _: _) -> Any:
        """Return the answer of a call.

        Args:
            read: reads the answer; needed for a stream.

        Raises:
            ServiceEnded: there is no service any more.
            Undocumented: the call was refused in a way that a failing database does not explain.
        """
        stub = getattr(self._api.runs, method, None) or getattr(self._api.recovery, method)

        def attempt() -> Any:
            try:
                return read(stub(request, timeout=CALL_S))
            except grpc.RpcError as error:
                self._note(method, error)
                return None

        return until(attempt, f"{method} succeeds", timeout_s=CALL_S)

    def _note(self, method: str, error: grpc.RpcError) -> None:
        refusal = refusal_of(error)
        answer = f"{refusal.code.name} {refusal.reason}".strip()
        if not refusal.reason and refusal.code is grpc.StatusCode.UNAVAILABLE:
            if self._service.popen.poll() is not None:
                raise ServiceEnded
            return  # it is just starting or ending
        self.journal.answers[answer] += 1
        if refusal.reason not in REPEATED:
            raise Undocumented(f"{method}: {answer}: {refusal.message}")

    def watch(self, run_id: str) -> None:
        """Watch a run until its end, and resume the watch after each error."""
        latest = 1

        def read(stream: Any) -> bool:
            nonlocal latest
            for answer in stream:
                match answer.WhichOneof("update"):
                    case "event":
                        if answer.sequence != latest + 1:
                            raise Undocumented(f"event {answer.sequence} came after {latest}")
                        latest = request.after_sequence = answer.sequence
                        is_ended = answer.event.status in ENDED
                    case _:
                        is_ended = False
                if is_ended:
                    stream.cancel()
                    return True
            return False

        request = pb.WatchRunRequest(run_id=run_id, after_sequence=latest)

        def look() -> bool:
            return bool(self.call("WatchRun", request, read))

        until(look, f"the watch of {run_id} has its end", timeout_s=CALL_S)

    def create(self, run_id: str, engine: str = "player", **given: Any) -> None:
        """Create a run."""
        policy = given.pop("restart_policy", None)
        request = pb.CreateRunRequest(
            engine=engine,
            run_id=run_id,
            input=struct(given),
            restart_policy=policy,
            request_id=_request_id(f"create {run_id}"),
        )
        self.call("CreateRun", request)
        self.journal.created.add(run_id)

    def create_nameless(self, tag: str) -> None:
        """Create a run whose id the service chooses, so that only the request_id names the run."""
        request = pb.CreateRunRequest(
            engine="player",
            input=struct({"tag": tag}),
            request_id=_request_id(tag),
            labels={"tag": tag},
        )
        self.journal.created.add(self.call("CreateRun", request).run.run_id)

    def reply(self, run_id: str) -> None:
        """Answer the question of a run."""
        if not self.until(run_id, "WAITING_USER") and self.journal.exits:
            return  # its process was lost with an earlier service
        request = pb.SubmitReplyRequest(
            run_id=run_id,
            interaction_id=1,
            response=value(run_id),
            request_id=_request_id(f"reply {run_id}"),
        )
        self.call("SubmitReply", request)
        self.journal.replies[run_id] = run_id

    def cancel(self, run_id: str) -> None:
        """Cancel a run."""
        self.call(
            "CancelRun",
            pb.CancelRunRequest(run_id=run_id, request_id=_request_id(f"cancel {run_id}")),
        )
        self.journal.canceled.add(run_id)

    def until(self, run_id: str, status: str) -> bool:
        """Wait until a run has a status, or has ended. Return whether it has the status."""
        request = pb.GetRunRequest(run_id=run_id)

        def look() -> run_pb2.Run | None:
            run: run_pb2.Run = self.call("GetRun", request).run
            return run if run.status in ENDED or status_word(run) == status else None

        found = until(look, f"{run_id} is {status}", timeout_s=CALL_S)
        return found is not None and status_word(found) == status


def _first(stream: Any) -> Any:
    answer = next(stream)
    stream.cancel()
    return answer


def _request_id(call: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, call))


# -- the store of the killed service ---------------------------------------------------------------

LIVE: Final = ("waits", "loses", "replied", "sticky", "works", "again", "canceling", "resumes",
               "queued", "queued-again")  # fmt: skip
"""The runs that the killed service left unfinished."""


def leave_runs(home: Home) -> dict[str, bytes]:
    """Run a service with runs of every kind, and kill it. Return the files of a lost session."""
    home.write_config(max_concurrent=5, cancel_grace_s=2.0)
    service, api = home.start()
    api.create("player", {"tag": "old"}, run_id="old")
    api.until_ended("old")
    api.create("resumable", {"questions": [{"prompt": "?"}]}, run_id="loses")
    for run_id in ("waits", "replied"):
        api.create("player", {"asks": True}, run_id=run_id)
    for run_id in ("loses", "waits", "replied"):
        api.until_status(run_id, "WAITING_USER")
    api.create("sticky", {"questions": [{"prompt": "?"}]}, run_id="sticky")
    api.until_status("sticky", "WAITING_USER")
    api.create("player", {"holds": True}, run_id="works")
    api.create("player", {"holds": True}, run_id="again", restart_policy=REQUEUE)
    api.create("player", {"holds": True}, run_id="resumes", restart_policy=RESUME)
    api.create("player", {"holds": True, "stubborn": True}, run_id="canceling")
    for run_id in ("works", "again", "resumes", "canceling"):
        until(partial(_has_worked, api, run_id), f"{run_id} is at work")
    api.create("player", {}, run_id="queued")
    api.create("player", {}, run_id="queued-again", restart_policy=REQUEUE)
    api.reply("replied", 1, "replied")
    api.cancel("canceling")
    service.kill()
    until(lambda: not home.agents(), "the shims have ended the agents")
    folder = home.data / "runs" / str(key_of(home, "loses"))
    lost = {str(file.relative_to(home.data)): file.read_bytes()
            for file in folder.rglob("session-*.json")}  # fmt: skip
    for name in lost:
        (home.data / name).unlink()
    change(home, "UPDATE run SET ended_at = ended_at - ?, created_at = created_at - ?"
                 " WHERE run_id = 'old'", OLD_US, OLD_US)  # fmt: skip
    change(
        home, "UPDATE process_lease SET closed_at = closed_at - ? WHERE state = 'CLOSED'", OLD_US
    )
    home.write_config(max_concurrent=SLOTS, cancel_grace_s=0.5)
    return lost


def _has_worked(api: Api, run_id: str) -> bool:
    started = api.get(run_id).attempt > 0
    return started and b"worked" in b"".join(piece.data for piece in api.output(run_id))


class Arena:
    """A folder in which lives are played one after another, each on a copy of the same store."""

    def __init__(self, home: Home, receiver: Receiver, restore: Callable[[], None],
                 lost: dict[str, bytes]) -> None:  # fmt: skip
        self.home = home
        self.home.expected_defects |= DEFECTS  # the judge finds them
        self.receiver = receiver
        self.lost = lost
        self._restore = restore
        self.plan_folder = home.path / "plan"
        self.plan_folder.mkdir()

    def play(self, plan: Plan) -> Journal:
        """Play one life, and return what clients had from it."""
        self._restore()
        self.receiver.received.clear()
        self.home.services.clear()
        journal = Journal()
        text = json.dumps(asdict(plan) | {"database": plan.database})
        (self.plan_folder / "plan.json").write_text(text)
        (self.plan_folder / "journal.jsonl").unlink(missing_ok=True)
        try:
            self._play(journal)
        except (AssertionError, Undocumented) as error:
            journal.problems.append(str(error))
        self.home.clear()
        return journal

    def _play(self, journal: Journal) -> None:
        # A service that has ended starts again with the faults that were not made yet.
        self.home.prepare, self.home.env = PROGRAM, {"FAULTS": str(self.plan_folder)}
        lived = any(self._live(journal) for _ in range(FAULTY_STARTS))
        self.home.prepare, self.home.env = None, {}
        assert lived or self._live(journal), f"ended without faults:\n{self.home.services[-1].text}"
        service = self._started()
        assert service is not None, f"not started without faults:\n{self.home.services[-1].text}"
        with Client(service, journal) as client:
            client.create("last")
            for run_id in (*LIVE, "last", "late", "late-again"):
                client.until(run_id, "ENDED")
            until(lambda: query(self.home, "SELECT count(*) FROM webhook_delivery") == [(0,)],
                  "every webhook is delivered")  # fmt: skip
        code = service.stop()
        assert code == 0, f"stopped with {code} without faults:\n{service.text}"

    def _live(self, journal: Journal) -> bool:
        """Start the service, play, and stop it. Return whether it lived to its planned stop."""
        service = self._started()
        if service is None:
            journal.exits.append(("starting", self.home.services[-1].exit_code()))
            return False
        try:
            with Client(service, journal) as client:
                self._call(client)
        except ServiceEnded:
            journal.exits.append(("serving", service.exit_code()))
            return False
        journal.exits.append(("stopping", service.stop()))
        return True

    def _started(self) -> ServiceProcess | None:
        """Start the service, and return it once it serves; None: it has ended."""
        service = self.home.spawn()

        def look() -> str:
            if service.popen.poll() is not None:
                return "ended"
            return "serving" if service.events("service.serving") else ""

        if until(look, "the service serves or ends", timeout_s=CALL_S) == "ended":
            return None
        service.address = service.events("service.listening")[0]["address"]
        return service

    def _call(self, client: Client) -> None:
        """Call every method, and give runs every kind of end."""
        with ThreadPoolExecutor(1) as watcher:
            watching = watcher.submit(client.watch, "waits")
            self._work(client)
            watching.result()

    def _work(self, client: Client) -> None:
        client.create("plain", tag="plain")
        client.create_nameless("nameless")
        client.create("asks", asks=True)
        client.create("asks-sticky", "sticky", questions=[{"prompt": "?"}])
        client.create("decided", "hurried", asks=True)
        client.create("canceled", holds=True)
        client.reply("waits")
        self._reopen(client)
        client.cancel("canceled")
        client.reply("asks")
        client.reply("asks-sticky")
        self._read(client)
        for run_id in (*LIVE, "plain", "asks", "asks-sticky", "decided", "canceled"):
            client.until(run_id, "ENDED")
        client.call("Prune", recovery_pb.PruneRequest())
        # Every slot is free again.
        for number in range(SLOTS):
            client.create(f"held-{number}", holds=True)
        for number in range(SLOTS):
            client.until(f"held-{number}", "RUNNING")
        client.create("late")
        client.create("late-again", restart_policy=REQUEUE)

    def _reopen(self, client: Client) -> None:
        for name, text in self.lost.items():
            (self.home.data / name).write_bytes(text)
        request = pb.ReopenRunRequest(
            run_id="loses", keep_session=True, request_id=_request_id("reopen")
        )
        client.call("ReopenRun", request)
        client.reply("loses")

    @staticmethod
    def _read(client: Client) -> None:
        run_id, recovery = "waits", recovery_pb
        client.call("ListRuns", pb.ListRunsRequest(page_size=5))
        client.call("ListInteractions", pb.ListInteractionsRequest(run_id=run_id))
        client.call("GetRecoveryInfo", recovery.GetRecoveryInfoRequest(run_id=run_id))
        client.call("ExplainRecovery", recovery.ExplainRecoveryRequest(run_id=run_id))
        client.call("PlanRecovery", recovery.PlanRecoveryRequest())
        client.call("ListRecovered", recovery.ListRecoveredRequest())
        client.call("ListReconciliations", recovery.ListReconciliationsRequest())
        client.call("GetRecoveryStatus", recovery.GetRecoveryStatusRequest())
        client.call("GetInstances", recovery.GetInstancesRequest())
        client.call("ListWebhooks", recovery.ListWebhooksRequest())
        client.call("StreamOutput", pb.StreamOutputRequest(run_id="plain"), lambda each: [*each])
        client.call("WatchRecovered", recovery.WatchRecoveredRequest(), _first)


@contextmanager
def arena(folder: Path, server: ScratchPostgres | None) -> Iterator[Arena]:
    """Make an arena in a new folder; with a server its store is there, else it is a SQLite file."""
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        secret = folder / "secret"
        (folder / "home").mkdir(parents=True)
        secret.write_text(SECRET)
        hook = {"name": "hook", "url": receiver.url, "secret_file": str(secret),
                "allow_private": True,
                "events": ["WAITING_USER", "ENDED", "RECOVERED"]}  # fmt: skip
        url = "" if server is None else server.create(folder.name)
        home = stack.enter_context(
            Home(folder / "home", engines=ENGINES, database=url, lease_ttl_s=9.0, min_free_bytes=0,
                 recovery_backoff_s=0.05, webhooks=[hook], retention={"ended_runs": "1m"})
        )  # fmt: skip
        lost = leave_runs(home)
        kept = folder / "kept"
        shutil.copytree(home.data, kept, symlinks=True, ignore=shutil.ignore_patterns("lock"))
        if server is not None:
            server.create(f"{folder.name}-kept", template=folder.name)

        def restore() -> None:
            # The lock stays the same file, which proves that the killed service is gone.
            for entry in home.data.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
            shutil.copytree(kept, home.data, symlinks=True, dirs_exist_ok=True)
            if server is not None:
                server.drop(folder.name)
                server.create(folder.name, template=f"{folder.name}-kept")

        yield Arena(home, receiver, restore, lost)
