"""The five steps of the demo, in the order in which they run."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from runrecovery import RunRecoveryClient
from runrecovery.errors import RunRecoveryClientError
from runrecovery.v1 import recovery_pb2 as recovery
from runrecovery.v1 import run_pb2 as pb

from runrecovery_service.cli.demo.agent_processes import Shim, find_processes, find_shim
from runrecovery_service.cli.demo.scenario import (
    CONFIG,
    MAX_CONCURRENT,
    ORPHANS,
    RUNS,
    SESSION_LOST,
    SHIM_KILLED,
    DemoFailed,
    DemoRun,
)
from runrecovery_service.cli.demo.service_process import (
    READY_TIMEOUT_S,
    ServiceProcess,
    poll_health,
)
from runrecovery_service.cli.printing import word
from runrecovery_service.lazy_dataclass import dataclass

STEP_TIMEOUT_S: Final = 15.0


@dataclass(slots=True)
class Claims:
    """Prints claims and remembers those that are false."""

    console: Console
    broken: list[str] = field(default_factory=list)

    def check(self, claim: str, *, holds: bool) -> None:
        """Print the claim with a tick or a cross."""
        self.console.print(f"  [green]✓[/] {claim}" if holds else f"  [bold red]✗ {claim}[/]")
        if not holds:
            self.broken.append(claim)


@dataclass(slots=True)
class Stage:
    """The objects that the steps share: output, folder, and runs with their first processes."""

    console: Console
    claims: Claims
    folder: Path
    run_ids: dict[str, str] = field(default_factory=dict)
    processes: dict[str, list[int]] = field(default_factory=dict)
    stopped_shims: list[Shim] = field(default_factory=list)

    def print_heading(self, text: str) -> None:
        """Print the heading of a step."""
        self.console.print(f"\n[bold]{text}[/]")

    def find_processes(self) -> dict[str, list[int]]:
        """Return the living processes of each run."""
        return find_processes(self.folder, self.run_ids)


def run_demo(console: Console | None = None) -> int:
    """Run the demo; return 0 if every claim is true, else 1."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    with _temporary_folder() as folder:
        stage = Stage(console, Claims(console), folder)
        try:
            _run_steps(stage)
        except (DemoFailed, RunRecoveryClientError) as error:
            stage.claims.check(f"the demo could continue: {error}", holds=False)
        finally:
            _check_nothing_left(stage)
    broken = stage.claims.broken
    seconds = time.monotonic() - started
    if broken:
        console.print(f"\n[bold red]{len(broken)} claim(s) did not hold.[/] ({seconds:.1f} s)")
        return 1
    console.print(f"\n[bold green]Every claim held.[/] ({seconds:.1f} s)")
    return 0


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="runrecovery-demo-"))
    text = CONFIG.format(max_concurrent=MAX_CONCURRENT, python=json.dumps(sys.executable))
    (folder / "runrecovery.toml").write_text(text, "utf-8")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_steps(stage: Stage) -> None:
    stage.print_heading(f"1. A service with two engines and {MAX_CONCURRENT} slots; nine runs")
    service = ServiceProcess.start(stage.folder, 1)
    try:
        with RunRecoveryClient(service.address) as client:
            client.wait_until_ready(READY_TIMEOUT_S)
            _create_runs(stage, client)
            _print_runs(stage)
            stage.print_heading("2. kill -9 of the service, and of the shims of two runs")
            _stop_shims(stage)
    finally:
        service.crash()
    _check_orphans(stage)
    stage.print_heading("3. The service starts again")
    service = ServiceProcess.start(stage.folder, 2)
    try:
        with RunRecoveryClient(service.address) as client:
            _check_recovery(stage, client)
            stage.print_heading("4. The preserved run gets its reply; the requeued one runs again")
            _finish_runs(stage, client)
            finished = {name: client.runs.get(run_id) for name, run_id in stage.run_ids.items()}
    finally:
        service.crash()
    stage.print_heading("5. Killed and started once more: nothing is left to decide")
    service = ServiceProcess.start(stage.folder, 3)
    try:
        with RunRecoveryClient(service.address) as client:
            _check_nothing_changed(stage, client, finished)
    finally:
        code = service.stop()
    stage.claims.check("SIGTERM stopped the service with exit code 0", holds=code == 0)


# -- 1. runs -----------------------------------------------------------------------------------


def _create_runs(stage: Stage, client: RunRecoveryClient) -> None:
    data = stage.folder / "data"
    for planned in RUNS:
        sessions = set(data.rglob("session-*.json"))
        run = client.runs.create(
            engine=planned.engine,
            input=dict(planned.agent_input),  # type: ignore[arg-type] # JSON by construction
            run_id=planned.name,
            restart_policy=planned.restart_policy,
        )
        stage.run_ids[planned.name] = run.run_id
        _wait_for_status(client, run.run_id, planned.at_crash)
        if planned.name == SESSION_LOST:
            for session in set(data.rglob("session-*.json")) - sessions:
                session.unlink()
    running = [planned.name for planned in RUNS if planned.at_crash == pb.RUN_STATUS_RUNNING]
    _wait_until(
        lambda: all(client.runs.get(name).session.has_handle for name in running),
        "the running agents have named their sessions",
    )
    # Only now: an agent that has named its session has completed its start.
    _wait_until(lambda: _process_tree_is_complete(stage), "the process tree is complete")


def _process_tree_is_complete(stage: Stage) -> bool:
    stage.processes = stage.find_processes()
    return len(stage.processes["process-tree"]) == 1 + 3


def _wait_for_status(
    client: RunRecoveryClient, run_id: str, status: pb.RunStatus.ValueType
) -> None:
    def is_reached() -> bool:
        return client.runs.get(run_id).status == status

    _wait_until(is_reached, f"run {run_id} is {_status(status)}")


def _wait_until(holds: Callable[[], bool], condition: str) -> None:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise DemoFailed(f"not within {STEP_TIMEOUT_S:g} s: {condition}")
        time.sleep(0.02)


def _print_runs(stage: Stage) -> None:
    table = Table("run", "engine", "status", "processes")
    for planned, pids in zip(RUNS, stage.processes.values(), strict=True):
        shown = " ".join(map(str, pids)) or "-"
        table.add_row(planned.name, planned.engine, _status(planned.at_crash), shown)
    stage.console.print(table)


# -- 2. kill -9 --------------------------------------------------------------------------------


def _stop_shims(stage: Stage) -> None:
    """Suspend the shims that will be killed with the service.

    A shim that still runs when the service dies would end the processes of its run.
    """
    shims = [find_shim(name, stage.processes[name]) for name in SHIM_KILLED]
    for shim in shims:
        shim.send(signal.SIGSTOP)
        stage.stopped_shims.append(shim)


def _check_orphans(stage: Stage) -> None:
    started = time.monotonic()
    guarded = [name for name in stage.run_ids if stage.processes[name] and name not in SHIM_KILLED]
    _wait_until(
        lambda: not _count_processes(stage, guarded), "the shims ended the processes of their runs"
    )
    milliseconds = (time.monotonic() - started) * 1000
    while stage.stopped_shims:
        stage.stopped_shims.pop().send(signal.SIGKILL)
    stage.claims.check(
        f"{', '.join(guarded)}: ended by their shims, {milliseconds:.0f} ms after the service",
        holds=True,
    )
    count = _count_processes(stage, SHIM_KILLED)
    stage.console.print(
        f"  {count} processes are still alive without a service or a shim: {', '.join(SHIM_KILLED)}"
    )
    stage.claims.check("the crash left orphans behind", holds=count == ORPHANS)


def _count_processes(stage: Stage, names: Collection[str]) -> int:
    alive = stage.find_processes()
    return sum(len(alive[name]) for name in names)


# -- 3. recovery -------------------------------------------------------------------------------


def _check_recovery(stage: Stage, client: RunRecoveryClient) -> None:
    changes = poll_health(client)
    shown = " → ".join(f"{status} ({ms:.0f} ms)" for ms, status in changes)
    stage.console.print(f"  health, polled every 2 ms: {shown}")
    report = client.recovery.status().reconciliation
    # `again` was requeued: its new process can be running already.
    left = {name: pids for name, pids in stage.find_processes().items() if name != "again"}
    _print_report(stage, report)
    table = Table("run", "before")
    table.add_column("decision", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("processes")
    for planned in RUNS:
        alive = len(left[planned.name]) if planned.name in left else None
        table.add_row(*_decision_cells(stage, client, planned, alive))
    stage.console.print(table)
    claims = stage.claims
    statuses = [status for _, status in changes if status != "no answer"]
    claims.check(
        "health went from NOT_SERVING to SERVING, and the report was complete by then",
        holds=statuses == ["NOT_SERVING", "SERVING"]
        and report.state == recovery.RECONCILIATION_STATE_COMPLETED,
    )
    claims.check(
        "every run got the decision of the published table, with its reason",
        holds=all(_is_decided_as_planned(client, planned) for planned in RUNS),
    )
    claims.check("no process of an earlier epoch is alive", holds=not any(left.values()))


def _print_report(stage: Stage, report: recovery.Reconciliation) -> None:
    milliseconds = sum(phase.duration.ToMilliseconds() for phase in report.phases)
    orphans, cleared = report.orphans, report.bindings
    stage.console.print(
        f"  report {report.reconciliation_id}: epoch {report.epoch},"
        f" {report.runs_scanned} runs in {milliseconds} ms"
    )
    stage.console.print(
        f"  {orphans.ended} orphans ended by their shims or the sweep, {orphans.refused} refused;"
        f" containment {word(report.containment, 'level')}"
    )
    stage.console.print(
        f"  released: {cleared.slots} slots, {cleared.sessions} sessions,"
        f" {cleared.pending_interactions} questions"
    )


def _decision_cells(
    stage: Stage, client: RunRecoveryClient, planned: DemoRun, alive: int | None
) -> tuple[str, ...]:
    """Return one row of the table; `alive` is None for a run that was started again."""
    made = client.runs.get(stage.run_ids[planned.name]).recovery
    before = len(stage.processes[planned.name])
    decision, why = "- (had ended)", ""
    if made.recovery_reason:
        decision = f"{_status(made.status_after)}, {word(made, 'recovery_state')}"
        why = f"{made.recovery_reason}\n{made.error_code}".strip()
    processes = f"{before} → {'new' if alive is None else alive}"
    return planned.name, _status(planned.at_crash), decision, why, processes


def _is_decided_as_planned(client: RunRecoveryClient, planned: DemoRun) -> bool:
    run = client.runs.get(planned.name)
    made = run.recovery
    if not planned.rule:
        return (made.recovery_state, run.status) == (pb.RECOVERY_STATE_NONE, planned.after_restart)
    return (made.recovery_reason, made.status_before, made.status_after) == (
        planned.rule,
        planned.at_crash,
        planned.after_restart,
    )


# -- 4. and 5. ---------------------------------------------------------------------------------


def _finish_runs(stage: Stage, client: RunRecoveryClient) -> None:
    waiting = client.runs.get(stage.run_ids["waiting"])
    question = waiting.pending_interaction
    stage.console.print(f"  “{question.prompt}” - yes")
    client.runs.reply(waiting.run_id, question.interaction_id, "yes", etag=waiting.etag)
    replied = client.wait_for_run(waiting.run_id, timeout_s=STEP_TIMEOUT_S)
    stage.claims.check(
        f"run waiting resumed its session and SUCCEEDED: {_output(replied)}",
        holds=replied.status == pb.RUN_STATUS_SUCCEEDED
        and _output(replied) == {"deployed": True, "answers": ["yes"]},
    )
    again = client.wait_for_run(stage.run_ids["again"], timeout_s=STEP_TIMEOUT_S)
    stage.claims.check(
        f"run again SUCCEEDED in attempt {again.attempt}: {_output(again)}",
        holds=again.status == pb.RUN_STATUS_SUCCEEDED and again.attempt == 2,
    )


def _check_nothing_changed(
    stage: Stage, client: RunRecoveryClient, before: Mapping[str, pb.Run]
) -> None:
    client.wait_until_ready(READY_TIMEOUT_S)
    report = client.recovery.status().reconciliation
    stage.console.print(
        f"  report {report.reconciliation_id}: {report.runs_scanned} run examined,"
        f" {report.runs_unchanged} unchanged, {len(report.decisions)} decisions"
    )
    now = {name: client.runs.get(run_id) for name, run_id in stage.run_ids.items()}
    stage.claims.check(
        "nothing was decided, and every run is exactly as it was",
        holds=not report.decisions and report.runs_unchanged == 1 and now == before,
    )


def _check_nothing_left(stage: Stage) -> None:
    for shim in stage.stopped_shims:  # the demo failed; a shim that continues ends its processes
        with suppress(DemoFailed):
            shim.send(signal.SIGCONT)
    with suppress(DemoFailed):
        _wait_until(lambda: not _count_processes(stage, stage.run_ids), "every process has ended")
    left = [pid for pids in stage.find_processes().values() for pid in pids]
    for pid in left:
        stage.console.print(f"  [red]left alive: pid {pid}[/]")
    if stage.run_ids:
        stage.claims.check("no process is left behind", holds=not left)


def _status(status: pb.RunStatus.ValueType) -> str:
    return pb.RunStatus.Name(status).removeprefix("RUN_STATUS_")


def _output(run: pb.Run) -> dict[str, object]:
    output: dict[str, object] = MessageToDict(run.output)
    return output
