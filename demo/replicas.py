"""The steps of `make demo-replicas`. `python -m demo.replicas` runs them.

It checks every claim that it prints: exit code 1 when one does not hold, 0 otherwise.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from runrecovery import RunRecoveryClient
from runrecovery.errors import RunRecoveryClientError
from runrecovery.v1 import recovery_service_pb2 as service
from runrecovery.v1 import run_pb2 as pb
from runrecovery_service.cli.demo.agent_processes import find_processes
from runrecovery_service.cli.demo.scenario import DemoFailed
from runrecovery_service.cli.demo.signals import exit_on_termination
from runrecovery_service.cli.demo.steps import Claims
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.cli.printing import word
from runrecovery_service.domain.recovery_matrix import MATRIX

from bench.postgres import scratch_postgres
from demo.cluster import ENGINE, LEASE_TTL_S, NAMES, Cluster, Replica, three_replicas
from demo.history import History
from demo.load import CLIENTS, REPLY, AnyReplica, Load

STEP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.05
WHY: Final = {rule.name: rule.because for rule in MATRIX}
QUESTION: Final = {"kind": "confirm", "prompt": "Deploy to production?", "options": ["yes", "no"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run that a replica has when it is killed, frozen or stopped.

    Attributes:
        rule: the rule that should decide.
        after: the status that the decision should give the run.
    """

    name: str
    agent_input: dict[str, object]
    policy: pb.RestartPolicy.ValueType
    rule: str
    after: pb.RunStatus.ValueType


PLANNED: Final = (
    Planned(
        name="asks",
        agent_input={"questions": [QUESTION]},
        policy=pb.RESTART_POLICY_FAIL,
        rule="resumable_waiting_preserved",
        after=pb.RUN_STATUS_WAITING_USER,
    ),
    Planned(
        name="plain",
        agent_input={"hold": True},
        policy=pb.RESTART_POLICY_FAIL,
        rule="running_interrupted",
        after=pb.RUN_STATUS_FAILED,
    ),
    Planned(
        name="works",
        agent_input={"work_s": 6.0},
        policy=pb.RESTART_POLICY_RESUME,
        rule="interrupted_turn_resumed",
        after=pb.RUN_STATUS_QUEUED,
    ),
    Planned(
        name="again",
        agent_input={"work_s": 6.0},
        policy=pb.RESTART_POLICY_REQUEUE,
        rule="requeued",
        after=pb.RUN_STATUS_QUEUED,
    ),
)
"""The runs of each replica: one that waits, and three at work with different restart policies."""
HANDED_OVER: Final = "Handed over as it was: its question and session are intact."


@dataclass(slots=True)
class Stage:
    """The objects that the steps share.

    Attributes:
        run_ids: the planned runs that were created so far, by the replica at which they began.
    """

    console: Console
    claims: Claims
    folder: Path
    cluster: Cluster
    history: History
    run_ids: dict[str, dict[str, Planned]] = field(default_factory=dict)

    def replica(self, name: str) -> Replica:
        """Return a replica."""
        return self.cluster.replicas[name]

    def peers_of(self, name: str) -> str:
        """Return the names of the other replicas, for the text of a claim."""
        return " or ".join(other for other in NAMES if other != name)

    def agents_of(self, name: str) -> set[int]:
        """Return the processes of the planned runs that began at a replica."""
        runs = {run_id: run_id for run_id in self.run_ids[name]}
        return {pid for pids in find_processes(self.folder, runs).values() for pid in pids}

    @contextmanager
    def any_replica(self) -> Iterator[AnyReplica]:
        """Call whichever replica answers."""
        replicas = AnyReplica(self.cluster)
        try:
            yield replicas
        finally:
            replicas.close()


def main() -> int:
    """Play the demo; return the exit code."""
    exit_on_termination()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    started = time.monotonic()
    claims = Claims(console)
    try:
        with tempfile.TemporaryDirectory(
            prefix="runrecovery-demo-replicas-", ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            # The demo does not crash PostgreSQL itself.
            with scratch_postgres("fsync=off") as postgres:
                _play(console, claims, folder, postgres.create("demo"))
            _check_nothing_left(claims, folder)
    except (DemoFailed, RunRecoveryClientError) as error:
        claims.check(f"the demo could continue: {error}", holds=False)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return _summary(console, claims, time.monotonic() - started)


def _summary(console: Console, claims: Claims, seconds: float) -> int:
    if claims.broken:
        console.print(
            f"\n[bold red]{len(claims.broken)} claim(s) did not hold.[/] ({seconds:.1f} s)"
        )
        return 1
    console.print(f"\n[bold green]Every claim held.[/] ({seconds:.1f} s)")
    return 0


def _play(console: Console, claims: Claims, folder: Path, database: str) -> None:
    with three_replicas(folder, database) as cluster:
        _heading(
            console,
            f"1. Three replicas share PostgreSQL and workspaces; {CLIENTS} clients are at work",
        )
        cluster.start(NAMES[0])  # migrates the database
        history = History(database)
        history.begin()
        for name in NAMES[1:]:
            cluster.start(name)
        stage = Stage(console, claims, folder, cluster, history)
        load = Load(cluster)
        try:
            load.start()
            _print_instances(stage, "a")
            _kill(stage)
            _freeze(stage)
            _stop_in_order(stage)
        finally:
            load.stop()
        _heading(console, "5. Every question gets its reply, and every run ends")
        _finish(stage)
        _check_load(stage, load)
        _check_history(stage)
        history.close()


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


# -- what happens to the replicas ----------------------------------------------------------------


def _kill(stage: Stage) -> None:
    _heading(stage.console, "2. kill -9 of replica a, which has four runs")
    agents = _give_runs(stage, "a")
    epoch = _instance(stage, "b", "a").epoch
    stage.cluster.in_use.discard("a")
    stage.replica("a").running.crash()
    _check_takeover(stage, "a", through="b", since=epoch, agents=agents)
    _print_runs(stage, "a")
    stage.cluster.start("a")
    with stage.replica("a").connect() as client:
        report = client.recovery.status().reconciliation
    stage.claims.check(
        "a, started again, serves, and had nothing left to decide", holds=not report.decisions
    )


def _freeze(stage: Stage) -> None:
    _heading(
        stage.console,
        f"3. Replica b is frozen (SIGSTOP) beyond its lease of {LEASE_TTL_S:g} s, and woken",
    )
    agents = _give_runs(stage, "b")
    epoch = _instance(stage, "c", "b").epoch
    # The clients do not know of the freeze: their calls to b end by their deadlines.
    stage.replica("b").freeze()
    _check_takeover(stage, "b", through="c", since=epoch, agents=agents)
    _print_runs(stage, "b")
    before = stage.history.latest()
    stage.replica("b").wake()
    code = stage.replica("b").running.popen.wait(STEP_TIMEOUT_S)
    stage.cluster.in_use.discard("b")
    stage.claims.check(
        f"b woke up, noticed that it had lost its lease, and exited with {code}",
        holds=code == ExitCode.FENCED,
    )
    stage.claims.check(
        "b wrote nothing after it woke up",
        holds=stage.history.changes_as("b", epoch, after=before) == 0,
    )
    stage.cluster.start("b")


def _stop_in_order(stage: Stage) -> None:
    _heading(stage.console, "4. Replica c is stopped in order (SIGTERM), as in a deploy")
    agents = _give_runs(stage, "c")
    stage.cluster.in_use.discard("c")
    began = time.monotonic()
    code = stage.replica("c").running.stop()
    left = stage.history.unfinished_of("c")
    stage.claims.check(
        f"c exited with {code} after {time.monotonic() - began:.1f} s, and had handed over every"
        " run that goes on",
        holds=code == 0 and not left,
    )
    _check_decided(stage, "c", undecided=("c-asks",))
    stage.claims.check("no agent of c is alive", holds=not agents & stage.agents_of("c"))
    stopped = _instance(stage, "a", "c")
    stage.claims.check(
        "nobody had to wait for its lease: it was given up, and c not taken over",
        holds=not stopped.alive and not stopped.taken_over_by,
    )
    _print_runs(stage, "c")


def _give_runs(stage: Stage, name: str) -> set[int]:
    """Create the planned runs at a replica; return their processes once all of them are there."""
    stage.run_ids[name] = {f"{name}-{planned.name}": planned for planned in PLANNED}
    with stage.replica(name).connect() as client:
        for run_id, planned in stage.run_ids[name].items():
            client.runs.create(
                engine=ENGINE,
                run_id=run_id,
                input=planned.agent_input,  # type: ignore[arg-type] # JSON by construction
                restart_policy=planned.policy,
            )
        for run_id, planned in stage.run_ids[name].items():
            _until(lambda: _is_ready(client, run_id, planned), f"{run_id} is under way")  # noqa: B023 - called at once
    return stage.agents_of(name)


def _is_ready(client: RunRecoveryClient, run_id: str, planned: Planned) -> bool:
    run = client.runs.get(run_id)
    waits = planned.after == pb.RUN_STATUS_WAITING_USER
    status = pb.RUN_STATUS_WAITING_USER if waits else pb.RUN_STATUS_RUNNING
    return run.status == status and run.session.has_handle


def _check_takeover(stage: Stage, name: str, *, through: str, since: int, agents: set[int]) -> None:
    """Wait until a peer has decided on the runs of a replica, and check its decisions."""
    began = time.monotonic()
    _until(lambda: _is_taken_over(stage, name, through, since), f"{name} is taken over")
    seconds = time.monotonic() - began
    peer = _instance(stage, through, name).taken_over_by
    stage.claims.check(
        f"{peer} took {name} over {seconds:.1f} s later",
        holds=peer != name,
    )
    _check_decided(stage, name)
    stage.claims.check(
        f"the runs that go on are at {stage.peers_of(name)}", holds=not _planned_of(stage, name)
    )
    stage.claims.check(
        f"no agent that {name} had started is alive", holds=not agents & stage.agents_of(name)
    )


def _is_taken_over(stage: Stage, name: str, through: str, since: int) -> bool:
    found = _instance(stage, through, name)
    return found.epoch > since and found.HasField("takeover_done_at")


def _instance(stage: Stage, through: str, name: str) -> service.Instance:
    with stage.replica(through).connect() as client:
        return next(one for one in client.recovery.instances() if one.name == name)


def _planned_of(stage: Stage, name: str) -> list[str]:
    """Return the planned runs that began at a replica, are unfinished and still belong to it."""
    return [one for one in stage.history.unfinished_of(name) if one in stage.run_ids[name]]


def _check_decided(stage: Stage, name: str, *, undecided: tuple[str, ...] = ()) -> None:
    """Check the decisions on the runs of a replica, except on the runs in `undecided`."""
    wrong = []
    with stage.any_replica() as replicas:
        for run_id, planned in stage.run_ids[name].items():
            made = replicas.call(_getter(run_id)).recovery
            expected = (planned.rule, planned.after)
            if run_id in undecided:
                expected = ("", pb.RUN_STATUS_UNSPECIFIED)
            if (made.recovery_reason, made.status_after) != expected:
                wrong.append(f"{run_id} by {made.recovery_reason or 'no rule'}")
    stage.claims.check(
        f"every run of {name} got the decision of the published table"
        + (f", but not {', '.join(wrong)}" if wrong else ""),
        holds=not wrong,
    )


# -- the end -------------------------------------------------------------------------------------


def _finish(stage: Stage) -> None:
    with stage.any_replica() as replicas:
        for name in NAMES:
            replicas.call(lambda client: client.runs.reply(f"{name}-asks", 1, REPLY))  # noqa: B023 - called at once
        ended = {
            run_id: _ended(replicas, run_id) for runs in stage.run_ids.values() for run_id in runs
        }
    replied = [ended[f"{name}-asks"] for name in NAMES]
    stage.claims.check(
        "the three waiting runs resumed their sessions at other replicas, and SUCCEEDED",
        holds=all(_has_succeeded(run, [REPLY]) for run in replied),
    )
    policies = [f"{name}-{kind}" for name in NAMES for kind in ("works", "again")]
    failed = [
        f"{run_id} ({ended[run_id].error.code})"
        for run_id in policies
        if not _has_succeeded(ended[run_id], [])
    ]
    stage.claims.check(
        "the six runs with a restart policy went on at other replicas, and SUCCEEDED"
        + (f", but not {', '.join(failed)}" if failed else ""),
        holds=not failed,
    )


def _check_load(stage: Stage, load: Load) -> None:
    """Check the promises to clients, by the clients' own journal."""
    stage.claims.check(
        f"the clients could always go on: {load.repeated} calls were repeated at another replica"
        + "".join(f"; {error}" for error in load.errors),
        holds=not load.errors,
    )
    with stage.any_replica() as replicas:
        for run_id in load.created:  # those whose question was open when the clients went
            run = replicas.call(_getter(run_id))
            if run_id not in load.replied and run.status == pb.RUN_STATUS_WAITING_USER:
                replicas.call(lambda client: client.runs.reply(run_id, 1, REPLY))  # noqa: B023 - called at once
        ended = {run_id: _ended(replicas, run_id) for run_id in load.created}
    lost = [run_id for run_id, run in ended.items() if run.status != pb.RUN_STATUS_SUCCEEDED]
    undone = [run_id for run_id in load.replied if not _has_succeeded(ended[run_id], [REPLY])]
    stage.claims.check(
        f"all {len(ended)} runs of the clients are there and SUCCEEDED"
        + (f", but not {', '.join(lost)}" if lost else ""),
        holds=not lost and bool(ended),
    )
    stage.claims.check(
        f"all {len(load.replied)} replies that were acknowledged to them reached their runs, once"
        + (f", but not {', '.join(undone)}" if undone else ""),
        holds=not undone and bool(load.replied),
    )


def _check_history(stage: Stage) -> None:
    history = stage.history
    stage.claims.check(
        f"{history.changes()} changes of runs, recorded by a trigger of the database: none under"
        " an epoch that was over",
        holds=not history.stale_writes() and history.changes() > 0,
    )
    stage.claims.check(
        "no run had two launches at one time", holds=not history.overlapping_launches()
    )


def _check_nothing_left(claims: Claims, folder: Path) -> None:
    runs = {f"{name}-{planned.name}": "" for name in NAMES for planned in PLANNED}
    left = [
        pid for pids in find_processes(folder, {run: run for run in runs}).values() for pid in pids
    ]
    claims.check("no process is left behind", holds=not left)


# -- reading and printing ------------------------------------------------------------------------


def _ended(replicas: AnyReplica, run_id: str) -> pb.Run:
    """Return a run once it has ended."""
    unfinished = (pb.RUN_STATUS_QUEUED, pb.RUN_STATUS_RUNNING, pb.RUN_STATUS_WAITING_USER)
    _until(lambda: replicas.call(_getter(run_id)).status not in unfinished, f"{run_id} has ended")
    return replicas.call(_getter(run_id))


def _getter(run_id: str) -> Callable[[RunRecoveryClient], pb.Run]:
    return lambda client: client.runs.get(run_id)


def _has_succeeded(run: pb.Run, answers: list[str]) -> bool:
    output = MessageToDict(run.output)
    return run.status == pb.RUN_STATUS_SUCCEEDED and output.get("answers") == answers


def _until(holds: Callable[[], bool], condition: str) -> None:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise DemoFailed(f"not within {STEP_TIMEOUT_S:g} s: {condition}")
        time.sleep(POLL_S)


def _print_instances(stage: Stage, through: str) -> None:
    table = Table("replica", "epoch", "lease", "slots")
    with stage.replica(through).connect() as client:
        for one in sorted(client.recovery.instances(), key=lambda one: one.name):
            table.add_row(
                one.name, str(one.epoch), "runs" if one.alive else "over", str(one.max_running)
            )
    stage.console.print(table)


def _print_runs(stage: Stage, name: str) -> None:
    """Print what happened to each run of a replica."""
    table = Table("run", "owner", "status", "rule")
    table.add_column("why", overflow="fold")
    with stage.any_replica() as replicas:
        for run_id in stage.run_ids[name]:
            run = replicas.call(_getter(run_id))
            made = run.recovery
            status, rule, why = word(run, "status"), "-", HANDED_OVER
            if made.recovery_reason:
                status = f"{word(made, 'status_before')} → {word(made, 'status_after')}"
                rule, why = made.recovery_reason, WHY[made.recovery_reason]
            owners = stage.history.owners_of(run_id)
            table.add_row(run_id, " → ".join(owners), status, rule, why)
    stage.console.print(table)


if __name__ == "__main__":
    sys.exit(main())
