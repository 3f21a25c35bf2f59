"""`runrecovery demo`: agents run, the service dies by SIGKILL, comes back, and explains itself.

Real processes, a data directory of its own, nothing left behind. Every claim that it prints is
checked; the exit code says whether all of them were true.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from runrecovery import RunRecoveryClient, ServingStatus
from runrecovery.errors import RunRecoveryClientError, Unavailable
from runrecovery.v1 import recovery_pb2 as recovery
from runrecovery.v1 import run_pb2 as pb

from runrecovery_service.process import procfs, signals
from runrecovery_service.process.launch import SHIM

READY_S: Final = 20.0
STEP_S: Final = 15.0
HEALTH_EVERY_S: Final = 0.002
CAPACITY: Final = 4
CONFIG: Final = """\
max_concurrent = {capacity}
cancel_grace_s = 1.0
orphan_grace_s = 1.0

[engines.resumable]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "resumable"]
profile = "resumable"
session_file = "{{workspace}}/session-{{value}}.json"

[engines.sticky]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "sticky"]
profile = "sticky_process"
"""
QUESTION: Final = {"kind": "confirm", "prompt": "Deploy to production?", "options": ["yes", "no"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """One run of the demo: what it is given, where the crash shall find it, what is to follow."""

    name: str
    engine: str
    given: Mapping[str, object]
    found: pb.RunStatus.ValueType
    becomes: pb.RunStatus.ValueType
    rule: str
    policy: pb.RestartPolicy.ValueType = pb.RESTART_POLICY_UNSPECIFIED


# The order matters: the first ones leave the slots again, the next four hold them.
CAST: Final = (
    Cast(
        name="finished",
        engine="resumable",
        given={"result": {"summary": "all tests pass"}},
        found=pb.RUN_STATUS_SUCCEEDED,
        becomes=pb.RUN_STATUS_SUCCEEDED,
        rule="",
    ),
    Cast(
        name="waiting",
        engine="resumable",
        given={"questions": [QUESTION], "result": {"deployed": True}},
        found=pb.RUN_STATUS_WAITING_USER,
        becomes=pb.RUN_STATUS_WAITING_USER,
        rule="resumable_waiting_preserved",
    ),
    Cast(
        name="waiting-longer",
        engine="resumable",
        given={"questions": [QUESTION]},
        found=pb.RUN_STATUS_WAITING_USER,
        becomes=pb.RUN_STATUS_WAITING_USER,
        rule="resumable_waiting_preserved",
    ),
    Cast(
        name="session-lost",
        engine="resumable",
        given={"questions": [QUESTION]},
        found=pb.RUN_STATUS_WAITING_USER,
        becomes=pb.RUN_STATUS_FAILED,
        rule="session_handle_lost",
    ),
    Cast(
        name="sticky",
        engine="sticky",
        given={"questions": [QUESTION]},
        found=pb.RUN_STATUS_WAITING_USER,
        becomes=pb.RUN_STATUS_FAILED,
        rule="sticky_process_lost",
    ),
    Cast(
        name="process-tree",
        engine="resumable",
        given={"hold": True, "children": 3},
        found=pb.RUN_STATUS_RUNNING,
        becomes=pb.RUN_STATUS_FAILED,
        rule="running_interrupted",
    ),
    Cast(
        name="stubborn",
        engine="resumable",
        given={"hold": True, "ignore_sigterm": True},
        found=pb.RUN_STATUS_RUNNING,
        becomes=pb.RUN_STATUS_FAILED,
        rule="running_interrupted",
    ),
    Cast(
        name="again",
        engine="resumable",
        given={"work_s": 6.0, "result": {"tried": "again"}},
        found=pb.RUN_STATUS_RUNNING,
        becomes=pb.RUN_STATUS_QUEUED,
        rule="requeued",
        policy=pb.RESTART_POLICY_REQUEUE,
    ),
    Cast(
        name="queued",
        engine="resumable",
        given={},
        found=pb.RUN_STATUS_QUEUED,
        becomes=pb.RUN_STATUS_FAILED,
        rule="queued_interrupted",
    ),
)
SESSION_LOST: Final = "session-lost"
SHIM_KILLED: Final = ("process-tree", "stubborn")
"""Runs whose shim dies with the service: what the next start finds alive are theirs."""


class Untrue(Exception):
    """The demo could not go on: something that it relies on is not so."""


@dataclass(slots=True)
class Claims:
    """What was claimed, and whether it was true."""

    console: Console
    broken: list[str] = field(default_factory=list)

    def check(self, *, that: str, holds: bool) -> None:
        """Print the claim with a tick or a cross, and remember a false one."""
        self.console.print(f"  [green]✓[/] {that}" if holds else f"  [bold red]✗ {that}[/]")
        if not holds:
            self.broken.append(that)


# -- the service as a process ------------------------------------------------------------------


@dataclass(slots=True)
class ServiceProcess:
    """One start of the service, as an operator would start it."""

    popen: subprocess.Popen[bytes]
    log: Path
    address: str

    @classmethod
    def start(cls, home: Path, number: int) -> ServiceProcess:
        """Start it and wait until its port answers."""
        log = home / f"service-{number}.log"
        command = [sys.executable, "-m", "runrecovery_service", "serve"]
        options = ["--config", str(home / "runrecovery.toml"), "--data-dir", str(home / "data")]
        with log.open("wb") as output:
            popen = subprocess.Popen(  # noqa: S603 - our own program
                [*command, *options, "--listen", "127.0.0.1:0", "--log-format", "json"],
                stderr=output,
                stdout=output,
                cwd=home,
                start_new_session=True,
            )
        service = cls(popen, log, "")
        try:
            service.address = str(service.wait_for_log("service.listening")["address"])
        except BaseException:  # also Ctrl-C, and the exit that a signal asks for
            service.kill()
            raise
        return service

    def wait_for_log(self, event: str) -> dict[str, object]:
        """Return the first log line of that event."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            for line in self.log.read_text("utf-8", "replace").splitlines():
                if f'"{event}"' in line:
                    found: dict[str, object] = json.loads(line)
                    return found
            if self.popen.poll() is not None:
                break
            time.sleep(0.005)
        raise Untrue(f"the service did not say {event}; its log is\n{self.log.read_text()}")

    def kill(self) -> None:
        """End it the hard way, as an out-of-memory killer would."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.popen.terminate()
        try:
            return self.popen.wait(STEP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


def watch_health(client: RunRecoveryClient) -> list[tuple[float, str]]:
    """Poll health until it says SERVING; return every change of the answer, in ms from now."""
    began = time.monotonic()
    changes: list[tuple[float, str]] = []
    while time.monotonic() - began < READY_S:
        try:
            answer = client.health.check(timeout_s=1.0).name
        except Unavailable:
            answer = "no answer"
        if not changes or changes[-1][1] != answer:
            changes.append(((time.monotonic() - began) * 1000, answer))
        if answer == ServingStatus.SERVING.name:
            return changes
        time.sleep(HEALTH_EVERY_S)
    raise Untrue("the service did not become SERVING")


# -- processes, seen without the service -------------------------------------------------------


def processes_of(home: Path, run_ids: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the living processes of each run below `home`, by what their environment says."""
    found: dict[str, list[int]] = {name: [] for name in run_ids}
    names = {f"RUNRECOVERY_RUN_ID={run_id}".encode(): name for name, run_id in run_ids.items()}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            for variable in _environment(Path(entry.path), home) & names.keys():
                found[names[variable]].append(int(entry.name))
    return found


def _environment(process: Path, home: Path) -> set[bytes]:
    """Return the variables of a process that works below `home`; of any other one, none."""
    try:
        if not (process / "cwd").readlink().is_relative_to(home):
            return set()
        return set((process / "environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


@dataclass(frozen=True, slots=True)
class Shim:
    """The shim above an agent of the demo's own service."""

    proc: procfs.Proc

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still is what it was."""
        pidfd = os.pidfd_open(self.proc.pid)
        try:
            outcome = signals.send(
                self.proc.pid, pidfd, number, prove=self._still, audit=lambda *_: None
            )
        finally:
            os.close(pidfd)
        if outcome != signals.SENT:
            raise Untrue(f"the shim {self.proc.pid} could not be signalled: {outcome}")

    def _still(self) -> str | None:
        now = procfs.read_proc(self.proc.pid)
        return "shim" if now is not None and now.identity == self.proc.identity else None


def _shim_of(stage: Stage, name: str) -> Shim:
    """Find the shim of a run: a parent in its tree that is the shim's program."""
    for pid in stage.processes[name]:
        agent = procfs.read_proc(pid)
        above = None if agent is None else procfs.read_proc(agent.ppid)
        if above is not None and SHIM.encode() in procfs.read(f"/proc/{above.pid}/cmdline"):
            return Shim(above)
    raise Untrue(f"run {name} has no shim")


# -- acts --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """What the acts share."""

    console: Console
    claims: Claims
    home: Path
    ids: dict[str, str] = field(default_factory=dict)
    before: dict[str, pb.Run] = field(default_factory=dict)
    processes: dict[str, list[int]] = field(default_factory=dict)

    def headline(self, text: str) -> None:
        """Begin an act."""
        self.console.print(f"\n[bold]{text}[/]")


def run_demo(console: Console | None = None) -> int:
    """Play the demo; 0 when every claim was true, else 1."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    began = time.monotonic()
    with _home() as home:
        stage = Stage(console, Claims(console), home)
        try:
            _play(stage)
        except (Untrue, RunRecoveryClientError) as error:
            stage.claims.check(that=f"the demo could go on: {error}", holds=False)
        finally:
            _clear_away(stage)
    broken = stage.claims.broken
    seconds = time.monotonic() - began
    if broken:
        console.print(f"\n[bold red]{len(broken)} claim(s) did not hold.[/] ({seconds:.1f} s)")
        return 1
    console.print(f"\n[bold green]Every claim held.[/] ({seconds:.1f} s)")
    return 0


@contextmanager
def _home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="runrecovery-demo-"))
    python = json.dumps(sys.executable)
    text = CONFIG.format(capacity=CAPACITY, python=python)
    (home / "runrecovery.toml").write_text(text, "utf-8")
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _play(stage: Stage) -> None:
    stage.headline(f"1. A service with two engines and {CAPACITY} slots; nine runs")
    service = ServiceProcess.start(stage.home, 1)
    try:
        with RunRecoveryClient(service.address) as client:
            client.wait_until_ready(READY_S)
            _create_all(stage, client)
            _show_before(stage)
            stage.headline("2. kill -9 of the service, and of the shims of two of its runs")
            bereft = _stop_shims(stage)
    finally:
        service.kill()
    _show_orphans(stage, bereft)
    stage.headline("3. The service starts again")
    service = ServiceProcess.start(stage.home, 2)
    try:
        with RunRecoveryClient(service.address) as client:
            _show_recovery(stage, client)
            stage.headline("4. The preserved run gets its reply; the requeued one runs again")
            _go_on(stage, client)
            after = {name: client.runs.get(run_id) for name, run_id in stage.ids.items()}
    finally:
        service.kill()
    stage.headline("5. Killed and started once more: nothing is left to decide")
    service = ServiceProcess.start(stage.home, 3)
    try:
        with RunRecoveryClient(service.address) as client:
            _show_nothing_changed(stage, client, after)
    finally:
        code = service.stop()
    stage.claims.check(that="SIGTERM stopped the service with exit code 0", holds=code == 0)


def _create_all(stage: Stage, client: RunRecoveryClient) -> None:
    data = stage.home / "data"
    for cast in CAST:
        sessions = set(data.rglob("session-*.json"))
        run = client.runs.create(
            engine=cast.engine,
            input=dict(cast.given),  # type: ignore[arg-type] # JSON by construction
            run_id=cast.name,
            restart_policy=cast.policy,
        )
        stage.ids[cast.name] = run.run_id
        _wait_for(client, run.run_id, cast.found)
        if cast.name == SESSION_LOST:
            for session in set(data.rglob("session-*.json")) - sessions:
                session.unlink()
    _wait_until(lambda: _tree_is_up(stage), "the process tree is up")
    running = [cast.name for cast in CAST if cast.found == pb.RUN_STATUS_RUNNING]
    _wait_until(
        lambda: all(client.runs.get(name).session.has_handle for name in running),
        "the running agents have named their sessions",
    )


def _tree_is_up(stage: Stage) -> bool:
    stage.processes = processes_of(stage.home, stage.ids)
    return len(stage.processes["process-tree"]) == 1 + 3


def _wait_for(client: RunRecoveryClient, run_id: str, status: pb.RunStatus.ValueType) -> None:
    def reached() -> bool:
        return client.runs.get(run_id).status == status

    _wait_until(reached, f"run {run_id} is {pb.RunStatus.Name(status)}")


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + STEP_S
    while not holds():
        if time.monotonic() > until:
            raise Untrue(f"it did not come to pass that {what}")
        time.sleep(0.02)


def _show_before(stage: Stage) -> None:
    table = Table("run", "engine", "status", "processes")
    with_runs = zip(CAST, stage.processes.values(), strict=True)
    for cast, pids in with_runs:
        table.add_row(cast.name, cast.engine, _status(cast.found), _pids(pids))
    stage.console.print(table)


def _stop_shims(stage: Stage) -> list[Shim]:
    """Stop the shims that are to die with the service: running, each would end its tree first."""
    shims = [_shim_of(stage, name) for name in SHIM_KILLED]
    for shim in shims:
        shim.send(signal.SIGSTOP)
    return shims


def _show_orphans(stage: Stage, bereft: list[Shim]) -> None:
    began = time.monotonic()
    guarded = [name for name in stage.ids if stage.processes[name] and name not in SHIM_KILLED]
    _wait_until(lambda: not _living(stage, guarded), "the shims end the trees that they guard")
    milliseconds = (time.monotonic() - began) * 1000
    for shim in bereft:
        shim.send(signal.SIGKILL)
    stage.claims.check(
        that=f"{', '.join(guarded)}: ended by their shims, {milliseconds:.0f} ms after the service",
        holds=True,
    )
    count = _living(stage, SHIM_KILLED)
    stage.console.print(
        f"  {count} processes live on that nobody owns or guards: {', '.join(SHIM_KILLED)}"
    )
    stage.claims.check(that="the crash left orphans behind", holds=count == 1 + 3 + 1)


def _living(stage: Stage, names: Collection[str]) -> int:
    alive = processes_of(stage.home, stage.ids)
    return sum(len(alive[name]) for name in names)


def _show_recovery(stage: Stage, client: RunRecoveryClient) -> None:
    changes = watch_health(client)
    steps = " → ".join(f"{answer} ({ms:.0f} ms)" for ms, answer in changes)
    stage.console.print(f"  health, polled every 2 ms: {steps}")
    report = client.recovery.status().reconciliation
    left = processes_of(stage.home, {n: i for n, i in stage.ids.items() if n != "again"})
    _show_report(stage, report)
    table = Table("run", "before")
    table.add_column("decision", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("processes")
    for cast in CAST:
        _show_decision(stage, client, cast, len(left.get(cast.name, ())), table)
    stage.console.print(table)
    claims = stage.claims
    order = [answer for _, answer in changes if answer != "no answer"]
    claims.check(
        that="health went from NOT_SERVING to SERVING, and the report was complete by then",
        holds=order == ["NOT_SERVING", "SERVING"]
        and report.state == recovery.RECONCILIATION_STATE_COMPLETED,
    )
    claims.check(
        that="every run is what the matrix says, with its reason",
        holds=all(_is_as_told(client, cast) for cast in CAST),
    )
    claims.check(that="no process of an earlier epoch is alive", holds=not any(left.values()))


def _show_report(stage: Stage, report: recovery.Reconciliation) -> None:
    milliseconds = sum(phase.duration.ToMilliseconds() for phase in report.phases)
    orphans, held = report.orphans, report.bindings
    stage.console.print(
        f"  report {report.reconciliation_id}: epoch {report.epoch},"
        f" {report.runs_scanned} runs in {milliseconds} ms"
    )
    stage.console.print(
        f"  {orphans.ended} orphans ended by their shims or the sweep, {orphans.refused} refused;"
        f" containment {_containment(report)}"
    )
    stage.console.print(
        f"  released: {held.slots} slots, {held.sessions} sessions,"
        f" {held.pending_interactions} questions"
    )


def _show_decision(
    stage: Stage, client: RunRecoveryClient, cast: Cast, alive: int, table: Table
) -> None:
    run = client.runs.get(stage.ids[cast.name])
    before = len(stage.processes[cast.name])
    decision, why = "- (had ended)", ""
    if run.recovery.recovery_reason:
        decision = f"{_status(run.recovery.status_after)}, {_state(run.recovery.recovery_state)}"
        why = f"{run.recovery.recovery_reason}\n{run.recovery.error_code}".strip()
    processes = f"{before} → {alive}" if cast.name != "again" else f"{before} → new"
    table.add_row(cast.name, _status(cast.found), decision, why, processes)


def _is_as_told(client: RunRecoveryClient, cast: Cast) -> bool:
    run = client.runs.get(cast.name)
    if not cast.rule:
        return run.recovery.recovery_state == pb.RECOVERY_STATE_NONE and run.status == cast.becomes
    told = run.recovery
    return (told.recovery_reason, told.status_before, told.status_after) == (
        cast.rule,
        cast.found,
        cast.becomes,
    )


def _go_on(stage: Stage, client: RunRecoveryClient) -> None:
    waiting = client.runs.get(stage.ids["waiting"])
    question = waiting.pending_interaction
    stage.console.print(f"  “{question.prompt}” - yes")
    client.runs.reply(waiting.run_id, question.interaction_id, "yes", etag=waiting.etag)
    replied = client.wait_for_run(waiting.run_id, timeout_s=STEP_S)
    stage.claims.check(
        that=f"run waiting resumed its session and SUCCEEDED: {_output(replied)}",
        holds=replied.status == pb.RUN_STATUS_SUCCEEDED
        and _output(replied) == {"deployed": True, "answers": ["yes"]},
    )
    again = client.wait_for_run(stage.ids["again"], timeout_s=STEP_S)
    stage.claims.check(
        that=f"run again SUCCEEDED in attempt {again.attempt}: {_output(again)}",
        holds=again.status == pb.RUN_STATUS_SUCCEEDED and again.attempt == 2,
    )


def _show_nothing_changed(
    stage: Stage, client: RunRecoveryClient, before: Mapping[str, pb.Run]
) -> None:
    client.wait_until_ready(READY_S)
    report = client.recovery.status().reconciliation
    stage.console.print(
        f"  report {report.reconciliation_id}: {report.runs_scanned} run examined,"
        f" {report.runs_unchanged} unchanged, {len(report.decisions)} decisions"
    )
    now = {name: client.runs.get(run_id) for name, run_id in stage.ids.items()}
    stage.claims.check(
        that="nothing was decided, and every run is to the letter what it was",
        holds=not report.decisions and report.runs_unchanged == 1 and now == before,
    )


def _clear_away(stage: Stage) -> None:
    """End what a broken demo may have left; a demo that held has left nothing."""
    left = [pid for pids in processes_of(stage.home, stage.ids).values() for pid in pids]
    for pid in left:
        stage.console.print(f"  [red]left alive: pid {pid}[/]")
    if stage.ids:
        stage.claims.check(that="no process is left behind", holds=not left)


def _status(status: pb.RunStatus.ValueType) -> str:
    return pb.RunStatus.Name(status).removeprefix("RUN_STATUS_")


def _state(state: pb.RecoveryState.ValueType) -> str:
    return pb.RecoveryState.Name(state).removeprefix("RECOVERY_STATE_")


def _containment(report: recovery.Reconciliation) -> str:
    level = recovery.ContainmentLevel.Name(report.containment.level)
    return level.removeprefix("CONTAINMENT_LEVEL_")


def _pids(pids: list[int]) -> str:
    return " ".join(map(str, pids)) or "-"


def _output(run: pb.Run) -> dict[str, object]:
    output: dict[str, object] = MessageToDict(run.output)
    return output
