"""The service as an operator has it: a process with a configuration, a log, an address, an end.

Everything lives below a `Home`, one directory of one test (or of one module). Leaving it ends what
was started there and nothing else: a process is only ever signalled through a pidfd, after its
working directory was seen to lie below that directory.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import grpc
from google.protobuf.struct_pb2 import Struct, Value
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import recovery_service_pb2_grpc, run_pb2, run_service_pb2_grpc
from runrecovery.v1 import run_service_pb2 as pb

from support import waiting
from support.defects import defect_in
from support.processes import Seen, is_alive, is_stopped, strike, strike_if_alive
from support.service_forker import ForkedService, can_be_forked, fork_service

REPOSITORY: Final = Path(__file__).resolve().parents[2]
AGENTS: Final = REPOSITORY / "tests" / "agents"
PATIENCE_S: Final = 30.0  # of a call; conditions are waited for by `until`
NO_RETRY: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 1000),  # of a try that is not refused
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", 64 << 20),
)

ENDED: Final = (
    run_pb2.RUN_STATUS_SUCCEEDED,
    run_pb2.RUN_STATUS_FAILED,
    run_pb2.RUN_STATUS_CANCELED,
)

SHIMS: Final = (
    "SELECT l.pid, l.start_ticks FROM process_lease l JOIN run r ON r.id = l.run"
    " WHERE l.pid IS NOT NULL"
)

until = waiting.until
Json: TypeAlias = dict[str, Any]


# -- engines and configuration -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One `[engines.NAME]` table, as a test writes it."""

    command: Sequence[str]
    profile: str = "resumable"
    more: Mapping[str, object] = field(default_factory=dict)


def _demo_command(profile: str) -> tuple[str, ...]:
    module = "runrecovery_service.engines.demo_agent"
    return (sys.executable, "-m", module, "--profile", profile)


RESUMABLE: Final = EngineSpec(
    command=_demo_command("resumable"), more={"session_file": "{workspace}/session-{value}.json"}
)
STICKY: Final = EngineSpec(command=_demo_command("sticky"), profile="sticky_process")
GOOD_ENGINES: Final[Mapping[str, EngineSpec]] = {"resumable": RESUMABLE, "sticky": STICKY}


def agent(name: str, *, profile: str = "resumable", **more: object) -> EngineSpec:
    """Return the engine of one of tests/agents."""
    command = (sys.executable, "-I", "-S", str(AGENTS / f"{name}.py"))
    return EngineSpec(command=command, profile=profile, more=more)


def script(text: str, *, profile: str = "resumable", **more: object) -> EngineSpec:
    """Return an engine that is a few lines of Python."""
    return EngineSpec(command=(sys.executable, "-I", "-S", "-c", text), profile=profile, more=more)


def config_text(settings: Mapping[str, object], engines: Mapping[str, EngineSpec]) -> str:
    """Return a configuration file."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for name, engine in engines.items():
        table = {"command": list(engine.command), "profile": engine.profile, **engine.more}
        lines += ["", f"[engines.{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


# -- the API, without anybody's retries ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """How a call failed, as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: Mapping[str, str]
    fields: tuple[str, ...]
    details: tuple[str, ...]
    retry_after_s: float | None
    pushback_ms: str | None
    resource: str


def refusal_of(error: grpc.RpcError) -> Refusal:
    """Decode the details of an error."""
    call: Any = error  # a failed call is an RpcError and a Call at once; the types do not say so
    trailers = dict(call.trailing_metadata() or ())
    status = status_pb2.Status()
    status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, resource = error_details_pb2.RetryInfo(), error_details_pb2.ResourceInfo()
    found = []
    for detail in status.details:
        found.append(detail.type_url.rpartition(".")[2])
        for message in (info, bad, retry, resource):
            detail.Unpack(message)
    has_retry = "RetryInfo" in found
    return Refusal(
        code=call.code(),
        message=call.details() or "",
        reason=info.reason,
        domain=info.domain,
        metadata=dict(info.metadata),
        fields=tuple(violation.field for violation in bad.field_violations),
        details=tuple(found),
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if has_retry else None,
        pushback_ms=trailers.get("grpc-retry-pushback-ms"),
        resource=resource.resource_name,
    )


def refused(call: Callable[[], object]) -> Refusal:
    """Return how the call failed; fail when it did not."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"the call was not refused: {answer}")


def struct(values: Mapping[str, Any]) -> Struct:
    """Return a Struct."""
    made = Struct()
    made.update(values)
    return made


def value(of: Any) -> Value:
    """Return a Value: None, a bool, a number, a text, a list or an object."""
    holder = Struct()
    holder.update({"v": of})
    return holder.fields["v"]


class Api:
    """A channel to one service and its stubs."""

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        self.channel = grpc.insecure_channel(address, options=NO_RETRY)
        self.runs = run_service_pb2_grpc.RunServiceStub(self.channel)
        self.recovery = recovery_service_pb2_grpc.RecoveryServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def create(self, engine: str, given: Json | None = None, **fields: Any) -> run_pb2.Run:
        """Create a run."""
        request = pb.CreateRunRequest(engine=engine, input=struct(given or {}), **fields)
        return self.runs.CreateRun(request, timeout=self._timeout_s).run

    def get(self, run_id: str) -> run_pb2.Run:
        """Return a run."""
        return self.runs.GetRun(pb.GetRunRequest(run_id=run_id), timeout=self._timeout_s).run

    def reply(self, run_id: str, interaction_id: int, answer: Any, **more: Any) -> run_pb2.Run:
        """Answer a question."""
        request = pb.SubmitReplyRequest(
            run_id=run_id, interaction_id=interaction_id, response=value(answer), **more
        )
        return self.runs.SubmitReply(request, timeout=self._timeout_s).run

    def cancel(self, run_id: str, **more: Any) -> run_pb2.Run:
        """Cancel a run."""
        request = pb.CancelRunRequest(run_id=run_id, **more)
        return self.runs.CancelRun(request, timeout=self._timeout_s).run

    def interactions(self, run_id: str) -> list[run_pb2.Interaction]:
        """Return the questions of a run (at most 1000)."""
        request = pb.ListInteractionsRequest(run_id=run_id, page_size=1000)
        answer = self.runs.ListInteractions(request, timeout=self._timeout_s)
        return list(answer.interactions)

    def output(self, run_id: str, **more: Any) -> list[pb.StreamOutputResponse]:
        """Return the pieces of a run's output."""
        request = pb.StreamOutputRequest(run_id=run_id, **more)
        return list(self.runs.StreamOutput(request, timeout=self._timeout_s))

    def recovery_info(self, run_id: str) -> recovery_pb.GetRecoveryInfoResponse:
        """Return what restarts decided for a run."""
        request = recovery_pb.GetRecoveryInfoRequest(run_id=run_id)
        return self.recovery.GetRecoveryInfo(request, timeout=self._timeout_s)

    def status(self) -> recovery_pb.GetRecoveryStatusResponse:
        """Return what the service is doing."""
        request = recovery_pb.GetRecoveryStatusRequest()
        return self.recovery.GetRecoveryStatus(request, timeout=self._timeout_s)

    def recovered(self, **wanted: Any) -> list[run_pb2.Run]:
        """Return recovered runs (at most 1000)."""
        request = recovery_pb.ListRecoveredRequest(
            filter=recovery_pb.RecoveredFilter(**wanted), page_size=1000
        )
        return list(self.recovery.ListRecovered(request, timeout=self._timeout_s).runs)

    def health_of(self, name: str = "") -> str:
        """Return what health says of a name, as the word of the contract."""
        request = health_pb2.HealthCheckRequest(service=name)
        answer = self.health.Check(request, timeout=self._timeout_s)
        word: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return word

    def until_status(self, run_id: str, *statuses: str) -> run_pb2.Run:
        """Wait until a run is in one of these statuses and return it."""
        wanted = {run_pb2.RunStatus.Value(f"RUN_STATUS_{status}") for status in statuses}

        def look() -> run_pb2.Run | None:
            run = self.get(run_id)
            assert run.status in wanted or run.status not in ENDED, f"it ended: {run}"
            return run if run.status in wanted else None

        return until(look, f"run {run_id} is {' or '.join(statuses)}")  # type: ignore[return-value]

    def until_ended(self, run_id: str) -> run_pb2.Run:
        """Wait until a run is terminal and return it."""
        return self.until_status(run_id, "SUCCEEDED", "FAILED", "CANCELED")


def status_word(run: run_pb2.Run) -> str:
    """Return the status of a run without its prefix."""
    return run_pb2.RunStatus.Name(run.status).removeprefix("RUN_STATUS_")


def state_word(info: run_pb2.RecoveryInfo) -> str:
    """Return the recovery state without its prefix."""
    return run_pb2.RecoveryState.Name(info.recovery_state).removeprefix("RECOVERY_STATE_")


# -- processes, seen from outside -----------------------------------------------------------------


def _is_below(pid: int, place: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(place)
    except OSError:
        return False


def _is_dead(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] in b"ZXx"


def _are_dead(pids: Sequence[int]) -> bool:
    return all(_is_dead(pid) for pid in pids)


def processes_below(place: Path) -> list[int]:
    """Return the living processes that work below a directory."""
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    return sorted(pid for pid in pids if _is_below(pid, place) and not _is_dead(pid))


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = [entry.decode("utf-8", "replace").partition("=") for entry in raw.split(b"\0") if entry]
    return {name: text for name, _, text in pairs}


def kill_below(place: Path) -> list[int]:
    """End whoever works below a directory, and return who that was.

    The working directory is looked at after the pidfd is open: the process that is signalled is
    the one that was looked at.
    """
    ended = []
    for pid in processes_below(place):
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if _is_below(pid, place):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    ended.append(pid)
            finally:
                os.close(pidfd)
    return ended


# -- the service ----------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class ServiceProcess:
    """One start of the service."""

    popen: subprocess.Popen[bytes] | ForkedService
    log: Path
    address: str = ""
    _apis: list[Api] = field(default_factory=list)
    _parsed: list[Json] = field(default_factory=list)
    _parsed_size: int = -1

    @property
    def pid(self) -> int:
        """The pid of the service itself."""
        return self.popen.pid

    @property
    def text(self) -> str:
        """All that it wrote so far."""
        return self.log.read_text("utf-8", "replace")

    def events(self, name: str | None = None) -> list[Json]:
        """Return the complete log lines so far, of one event or all."""
        size = self.log.stat().st_size
        if size != self._parsed_size:  # `until_event` looks again and again
            *lines, _ = self.text.split("\n")
            self._parsed = [json.loads(line) for line in lines if line.startswith("{")]
            self._parsed_size = size
        return [event for event in self._parsed if name is None or event["event"] == name]

    def until_event(self, name: str) -> Json:
        """Wait until it has logged an event and return the first one."""

        def look() -> list[Json]:
            events = self.events(name)
            if not events and self.popen.poll() is not None:
                raise AssertionError(f"the service ended without {name}:\n{self.text}")
            return events

        return until(look, f"the service logs {name}")[0]

    def api(self) -> Api:
        """Return a channel to it that lives as long as this object is used."""
        api = Api(self.address)
        self._apis.append(api)
        return api

    def until_serving(self) -> Api:
        """Wait until health says SERVING and return a channel."""
        api = self.api()

        def look() -> bool:
            if self.popen.poll() is not None:
                raise AssertionError(f"the service ended:\n{self.text}")
            try:
                return api.health_of() == "SERVING"
            except grpc.RpcError:
                return False

        until(look, "health says SERVING")
        return api

    def kill(self) -> None:
        """End it as an out-of-memory killer would."""
        self.popen.kill()
        self.popen.wait()
        self.close()

    def terminate(self) -> None:
        """Ask it to stop, as an orchestrator does."""
        self.popen.terminate()

    def exit_code(self, *, timeout_s: float | None = None) -> int:
        """Wait for its end and return the exit code."""
        return self.popen.wait(waiting.patience_s() if timeout_s is None else timeout_s)

    def stop(self) -> int:
        """Ask it to stop and return its exit code."""
        self.terminate()
        try:
            return self.exit_code()
        finally:
            self.close()

    def close(self) -> None:
        """Close the channels to it."""
        while self._apis:
            self._apis.pop().channel.close()


class Home:
    """A directory with a configuration, in which services start one after another."""

    def __init__(
        self,
        path: Path,
        *,
        engines: Mapping[str, EngineSpec] = GOOD_ENGINES,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        may_fork: bool = True,
        **settings: object,
    ) -> None:
        """Make the configuration.

        Args:
            prefix: words before the command of each service, of a program that becomes it.
            may_fork: whether services may start without their imports (`service_forker.py`).
        """
        self.prefix = tuple(prefix)
        self.may_fork = may_fork
        self.path = path.resolve()
        self.data = self.path / "data"
        self.env = dict(env or {})
        self.services: list[ServiceProcess] = []
        self.expected_defects: set[str] = set()
        defaults = {"cancel_grace_s": 1.0, "orphan_grace_s": 0.5, "max_concurrent": 4}
        self.settings: dict[str, object] = {**defaults, **settings}
        self.engines = dict(engines)
        self.write_config()

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.path / "runrecovery.toml"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.data / "runrecovery.db"

    def write_config(self, **settings: object) -> None:
        """Write the configuration (again), with some settings changed."""
        self.settings |= settings
        self.config.write_text(config_text(self.settings, self.engines), "utf-8")

    def spawn(self, *arguments: str, stderr: int | None = None) -> ServiceProcess:
        """Start the service and do not wait for anything.

        Args:
            stderr: a descriptor to use instead of the log file.
        """
        log = self.path / f"service-{len(self.services)}.log"
        words = ["serve", "--config", str(self.config), "--data-dir", str(self.data)]
        words += ["--listen", "127.0.0.1:0", "--log-format", "json", *arguments]
        with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), output.fileno(), stderr or output.fileno())
            popen = self._spawn(words, streams)
        service = ServiceProcess(popen=popen, log=log)
        self.services.append(service)
        return service

    def _spawn(
        self, words: Sequence[str], streams: tuple[int, int, int]
    ) -> subprocess.Popen[bytes] | ForkedService:
        env = {**os.environ, **self.env}
        if self.may_fork and not self.prefix and can_be_forked(self.env):
            return fork_service(words, cwd=self.path, env=env, streams=streams)
        stdin, stdout, stderr = streams
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "runrecovery_service", *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=self.path,
            env=env,
            start_new_session=True,
        )

    def listen(self, *arguments: str) -> ServiceProcess:
        """Start the service and wait until its port answers."""
        service = self.spawn(*arguments)
        service.address = service.until_event("service.listening")["address"]
        return service

    def start(self, *arguments: str) -> tuple[ServiceProcess, Api]:
        """Start the service, wait until it is SERVING, and return it with a channel."""
        service = self.listen(*arguments)
        return service, service.until_serving()

    def seed(self, runs: int, *, mix: str = "", instance: str = "default") -> None:
        """Fill the store with live runs, as a service that was killed would leave them.

        Their engine, `seeded`, is not configured, so that their sessions are not looked for.
        """
        subprocess.run(
            [
                sys.executable, str(REPOSITORY / "bench" / "seed.py"),
                "--data-dir", str(self.data), "--runs", str(runs), "--instance", instance,
                "--engine", "seeded", *(["--mix", mix] if mix else []),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE_S + waiting.patience_s(),
        )  # fmt: skip

    def agents(self) -> list[int]:
        """Return the living processes of all runs: whoever works below the runs' folder."""
        return processes_below(self.data / "runs")

    def agents_of(self, run_id: str) -> list[int]:
        """Return the living processes whose environment names the run."""
        return [
            pid for pid in self.agents() if environment_of(pid).get("RUNRECOVERY_RUN_ID") == run_id
        ]

    def watermark_of(self, run_id: str) -> int:
        """Return the watermark of a run's latest launch."""
        ((watermark,),) = self.rows(
            "SELECT l.watermark FROM process_lease l JOIN run r ON r.id = l.run"
            " WHERE r.run_id = ? ORDER BY l.id DESC LIMIT 1",
            run_id,
        )
        return int(watermark)

    def shims(self) -> list[Seen]:
        """Return the shims that are on record and alive."""
        return self._shims(self.rows(SHIMS) if self.database.exists() else [])

    def shims_of(self, run_id: str) -> list[Seen]:
        """Return the shims of one run that are on record and alive."""
        return self._shims(self.rows(f"{SHIMS} AND r.run_id = ?", run_id))

    @staticmethod
    def _shims(rows: list[tuple[int, int]]) -> list[Seen]:
        return [shim for shim in (Seen(*row) for row in rows) if is_alive(shim)]

    def kill_with_shims(self, service: ServiceProcess) -> None:
        """End a service and the guards of its trees at once: the trees stay, as orphans."""
        # A shim may end by itself before a signal reaches it.
        shims = [shim for shim in self.shims() if strike_if_alive(shim, signal.SIGSTOP)]
        until(
            lambda: all(is_stopped(shim) or not is_alive(shim) for shim in shims),
            "the shims stand still",
        )
        service.kill()
        for shim in shims:
            strike_if_alive(shim, signal.SIGKILL)
        until(lambda: not self.shims(), "the shims are gone")

    @contextmanager
    def store(self, *, writable: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the SQLite file beside the service; to read only, unless told otherwise."""
        mode = "rw" if writable else "ro"
        connection = sqlite3.connect(f"file:{self.database}?mode={mode}", uri=True, timeout=5.0)
        with closing(connection):
            yield connection
            if writable:
                connection.commit()

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with self.store() as connection:
            return connection.execute(sql, values).fetchall()

    def logs(self) -> str:
        """Return all that every service here has written."""
        return "".join(service.text for service in self.services)

    def defects(self) -> list[str]:
        """Return which defects an edge of a service here caught, and in which event."""
        events = (event for service in self.services for event in service.events())
        return [f"{name} in {event['event']}" for event in events if (name := defect_in(event))]

    def clear(self) -> list[int]:
        """End the services and whoever works here still; return the pids of the latter.

        Fail if a service caught a defect and went on; a test that causes one expects it.
        """
        for service in self.services:
            if service.popen.poll() is None:
                service.popen.kill()
            service.popen.wait()
            service.close()
        with suppress(sqlite3.DatabaseError):  # what a test put in its place
            for shim in self.shims():  # one that was stopped would stay
                with suppress(AssertionError, ProcessLookupError):
                    strike(shim, signal.SIGKILL)
        left: list[int] = []
        while ended := kill_below(self.path):
            left += ended
            until(partial(_are_dead, ended), "the processes are gone")
        assert [one for one in self.defects() if one.split()[0] not in self.expected_defects] == []
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
