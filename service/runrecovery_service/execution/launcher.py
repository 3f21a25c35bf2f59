"""Launches the process of one turn below a shim, and ends the tree of this process.

A shim is the parent process that guards an agent. Each state of the launch record is committed
before the step that the state permits. The pipes of the process are handled in `agent_io.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import field, replace
from pathlib import Path
from typing import Final, TypeVar

from runrecovery_service.agents.end_launches import remove_cgroup
from runrecovery_service.agents.launch_markers import launch_markers
from runrecovery_service.agents.trust_keeper import TrustKeeper, TrustRefused
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow, error_facts
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.dialect import Opening
from runrecovery_service.execution.blocking import run_blocking
from runrecovery_service.execution.cli_launch import demand_version, write_files
from runrecovery_service.execution.lease_deadline import TreeDeadline
from runrecovery_service.execution.pipes import fill
from runrecovery_service.execution.turn_log import retry_until_done
from runrecovery_service.execution.turn_records import TurnRecords
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import Backoff
from runrecovery_service.process.agent_command import agent_environment
from runrecovery_service.process.cgroup import CgroupParent
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.launch import OutputRest
from runrecovery_service.process.launch_errors import (
    TRANSIENT,
    LaunchDelayed,
    LaunchFailed,
    ShimLost,
    launch_error,
)
from runrecovery_service.process.markers import COOKIE_VARIABLE, Identity, LaunchMarkers
from runrecovery_service.process.processes import LaunchPlan, MachineProcesses, Processes
from runrecovery_service.process.resource_limits import AgentShare, ResourceLimits
from runrecovery_service.process.shim_events import ShimEvent
from runrecovery_service.process.shim_journal import killed_by_shim
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.trust.errors import TrustFileBusy

R = TypeVar("R")

DELAY_FIRST_S, DELAY_MOST_S = 0.1, 2.0
"""The first and the longest pause, in seconds, before a launch is tried again for which the system
lacks resources."""
LOST_SHIMS_MOST: Final = 5
"""How many shims in a row can end while they wait to start the agent, before the launch fails. A
shim that is killed, or gets no descriptor or memory, cannot report why it ends."""
ENDING_DEADLINE_S: Final = 30.0
"""Time limit for ending one tree, after the grace. A tree that survives is recorded as
KILL_PENDING."""


class LeaseOver(Exception):
    """The service was suspended for longer than its lease; the agent never started."""


class Unguarded(Exception):
    """The shim was killed while it started the agent. The agent is possibly alive."""


class Withdrawn(Exception):
    """The run was ended while its launch waited for something; the agent never started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The resources that all launches share.

    Attributes:
        threads: the pool for blocking work.
        cgroups: the parent of the cgroups of the launches; None if cgroups are not used.
        environ: the environment of the service. Agents get some of its variables.
        cancel_grace_s: seconds between SIGTERM and SIGKILL.
        share: the open files and the pipe size that each agent gets.
        processes: spawns and ends the processes.
    """

    workspaces: Workspaces
    trust: TrustKeeper
    threads: Executor
    tree_deadline: TreeDeadline
    cgroups: CgroupParent | None
    environ: Mapping[str, str]
    cancel_grace_s: float
    share: AgentShare = field(default_factory=AgentShare)
    processes: Processes = field(default_factory=MachineProcesses)

    def end_trees(
        self, markers: Sequence[LaunchMarkers], *, why: str, deadline_s: float
    ) -> Mapping[int, Ending]:
        """End the trees of launches, and return the result of each by launch key. Blocking.

        Args:
            why: why the trees are ended, for the log.
            deadline_s: time limit in seconds, after `cancel_grace_s`.
        """
        return self.processes.end_trees(
            markers, why=why, grace_s=self.cancel_grace_s, deadline_s=deadline_s
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Launch:
    """One launch: call `start`, then `end_tree` and `release`, even if the start failed.

    Attributes:
        markers: by which the processes of the launch are found; completed while it starts.
        prefilled: the number of bytes of the agent's input that were in its pipe before its start.
    """

    launcher: Launcher
    records: TurnRecords
    markers: LaunchMarkers = field(init=False)
    prefilled: int = field(default=0, init=False)
    _process: ShimmedProcess | None = field(default=None, init=False)
    _deadline_ns: int = field(default=0, init=False)
    _is_gate_open: bool = field(default=False, init=False)
    _has_workspace: bool = field(default=False, init=False)
    _lost_shims: int = field(default=0, init=False)
    _unwanted: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self.markers = launch_markers(self.records.turn.launch)

    # -- while it runs -------------------------------------------------------------------------

    def heartbeat(self) -> None:
        """Send the shim the time at which it must end its tree."""
        if self._process is not None:
            self._deadline_ns = self.launcher.tree_deadline.deadline_ns
            self._process.heartbeat(self._deadline_ns)

    @property
    def is_guarded(self) -> bool:
        """Whether the shim can end its tree: the shim exists, and no signal has stopped it."""
        if self._process is None:
            return True
        shim = self.launcher.processes.find(self._process.pid)
        same = shim is not None and shim.start_ticks == self._process.start_ticks
        return shim is not None and same and not shim.dead and shim.state not in "Tt"

    @property
    def is_shim_gone(self) -> bool:
        """Whether the shim has ended. A shim ends once its tree has ended."""
        if self._process is None:
            return True
        shim = self.launcher.processes.find(self._process.pid)
        return shim is None or shim.dead

    def need_no_output(self) -> None:
        """Tell the shim that no more output is needed, so that it can exit once its tree ends."""
        if self._process is not None:
            self._process.need_no_output()

    def leave_output(self) -> None:
        """Stop reading, and leave the output that is not stored yet to the shim."""
        if self._process is not None:
            self._process.leave_output()

    def withdraw(self) -> None:
        """End a shim that still waits for permission to start the agent, so that none starts."""
        self.stop_waiting()
        if self._process is not None and not self._is_gate_open:
            self._process.close_gate()

    def stop_waiting(self) -> None:
        """If the launch is waiting for something, make it raise Withdrawn; otherwise do nothing."""
        self._unwanted.set()

    # -- starting ------------------------------------------------------------------------------

    async def start(self, engine: Engine, opening: Opening) -> ShimmedProcess:
        """Launch the agent. If the system lacks resources, try again until it has them.

        Raises:
            LaunchFailed: the agent could not be started.
            LeaseOver: the tree deadline passed before the agent started.
            Unguarded: the shim was killed.
            Withdrawn: the run was ended before the agent started.
            Fenced: a newer epoch owns the run.
        """
        backoff, is_reported = Backoff(DELAY_FIRST_S, DELAY_MOST_S), False
        while (delayed := await self._try_to_start(engine, opening)) is not None:
            if not is_reported:
                self.records.log.warning("execution.launch_delayed", reason=delayed.reason)
            is_reported = True
            await self._dispose_of_process()
            await self.demand_wanted()
            await asyncio.sleep(backoff.next_s())
        assert self._process is not None  # noqa: S101 - it has started
        return self._process

    async def demand_wanted(self) -> None:
        """Raise Withdrawn if the run was ended meanwhile.

        This reads the store, because a cancel was possibly accepted before the turn had a
        supervisor.
        """
        self._pause(0)
        if (await self.records.read_run()).cancel_requested:
            raise Withdrawn

    async def _try_to_start(self, engine: Engine, opening: Opening) -> LaunchDelayed | None:
        """Try once to start the agent. Return None, or why the launch must be tried again."""
        try:
            await self._start(engine, opening)
        except LaunchDelayed as error:
            self._lost_shims = 0
            return error
        except ShimLost as error:
            if self.launcher.tree_deadline.now_ns() > self._deadline_ns:
                raise LeaseOver from error
            if self._is_gate_open:
                self.records.log.warning("execution.shim_lost", reason=error.reason)
                raise Unguarded from error
            self._lost_shims += 1
            if self._lost_shims >= LOST_SHIMS_MOST:
                raise
            return LaunchDelayed(error.reason)  # the agent has not started
        return None

    async def _dispose_of_process(self) -> None:
        """End a shim whose agent could not be started."""
        if (process := self._process) is not None:
            await self._run_to_end(process.dispose)
            self._process, self._is_gate_open = None, False

    async def _start(self, engine: Engine, opening: Opening) -> None:
        env = self._environment(engine)
        workspace = await self._run_to_end(self._make_workspace)
        await self._run_to_end(lambda: self._prepare_cli(engine, opening, workspace, env))
        if engine.trust is not None:
            await self._add_trust(engine.trust, workspace, env)
        await self.launcher.tree_deadline.wait_until_ahead()
        command = (*engine.command, *opening.arguments)
        process = await self._run_to_end(lambda: self._prepare(engine, command, workspace, env))
        await self.records.record_shim(pid=process.pid, start_ticks=process.start_ticks)
        await self.records.record_start()
        # Filled before the agent starts: Gemini CLI assumes that there is no input unless it is in
        # the pipe at once.
        self.prefilled = fill(process.stdin.fileno(), opening.input)
        await self.demand_wanted()
        await self._run_to_end(self._open_gate)
        agent = process.agent
        self.records.log.launched(pid=None if agent is None else agent.pid, shim=process.pid)

    async def _run_to_end(self, do: Callable[[], R]) -> R:
        """Run a step in a thread, and wait for its end even if the task is cancelled.

        The caller ends this launch, and for that needs everything that the thread has created.
        """
        step = asyncio.ensure_future(run_blocking(self.launcher.threads, do))
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            self.stop_waiting()
            await asyncio.wait([step])
            step.exception()  # retrieved only because asyncio logs errors that are not retrieved
            raise

    def _environment(self, engine: Engine) -> dict[str, str]:
        run = self.records.turn.run
        extra = {
            **engine.env,
            COOKIE_VARIABLE: self.markers.token,
            "RUNRECOVERY_RUN_ID": run.run_id,
            "RUNRECOVERY_ATTEMPT": str(run.attempt),
        }
        if (traceparent := self.records.log.traceparent) is not None:
            extra["TRACEPARENT"] = traceparent
        return agent_environment(engine.env_allow, self.launcher.environ, extra)

    def _make_workspace(self) -> Path:
        run = self.records.turn.run
        is_fresh = run.turn == 1 and not self._has_workspace
        try:
            workspace = self.launcher.workspaces.prepare(run.key, run.attempt, fresh=is_fresh)
        except OSError as error:
            raise launch_error(error, f"cannot create the workspace: {error.strerror}") from error
        self._has_workspace = True  # a repeated launch uses it too
        return workspace

    def _prepare_cli(
        self, engine: Engine, opening: Opening, workspace: Path, env: Mapping[str, str]
    ) -> None:
        try:
            write_files(opening.files)
            if opening.least_version is not None:
                demand_version(engine.command, opening.least_version, cwd=workspace, env=env)
        except OSError as error:
            raise launch_error(error, f"the system refused: {error}") from error

    def _prepare(
        self, engine: Engine, command: Sequence[str], workspace: Path, env: Mapping[str, str]
    ) -> ShimmedProcess:
        try:
            process = self._prepare_shim(engine, command, workspace, env)
        except OSError as error:
            raise launch_error(error, f"the system refused: {error}") from error
        except MemoryError as error:
            raise LaunchDelayed("the system refused: no memory") from error
        except RuntimeError as error:
            raise LaunchFailed(f"the system refused: {error}") from error
        self._process = process
        self.markers = replace(self.markers, pid=process.pid, start_ticks=process.start_ticks)
        if self.markers.watermark is not None and not process.watermarked:
            self.records.log.warning("execution.not_watermarked")
        return process

    def _prepare_shim(
        self, engine: Engine, command: Sequence[str], workspace: Path, env: Mapping[str, str]
    ) -> ShimmedProcess:
        self._deadline_ns = self.launcher.tree_deadline.deadline_ns
        plan = LaunchPlan(
            command=command,
            markers=self.markers,
            cwd=workspace,
            env=env,
            deadline_ns=self._deadline_ns,
            journal=self.journal,
            limits=ResourceLimits(
                niceness=engine.niceness,
                max_memory=engine.max_memory,
                max_open_files=engine.max_open_files,
                max_processes=engine.max_processes,
                soft_open_files=self.launcher.share.soft_open_files,
                stdout_pipe_bytes=self.launcher.share.stdout_pipe_bytes,
            ),
            cgroup_procs=self._make_cgroup(),
            rest=self._output_rest(),
        )
        return self.launcher.processes.prepare(plan)

    def _output_rest(self) -> OutputRest:
        run, workspaces = self.records.turn.run, self.launcher.workspaces
        path = workspaces.output_rest(run.key, run.attempt, run.turn)
        try:
            kept_bytes = workspaces.output(run.key, run.attempt).stat().st_size
        except FileNotFoundError:  # no earlier turn has printed anything
            kept_bytes = 0
        return OutputRest(path.absolute(), kept_bytes)

    def _make_cgroup(self) -> Path | None:
        cgroup = self.records.turn.launch.cgroup
        if cgroup is None or self.launcher.cgroups is None:
            return None
        return self.launcher.cgroups.make(cgroup)

    def _open_gate(self) -> None:
        if self._process is not None:
            self._is_gate_open = True
            self._deadline_ns = self.launcher.tree_deadline.deadline_ns
            self._process.release(self._deadline_ns)

    @property
    def journal(self) -> Path:
        """The journal of the launch (`process/shim_journal.py`)."""
        run = self.records.turn.run
        return self.launcher.workspaces.shim_journal(run.key, run.attempt, run.turn)

    # -- trust ---------------------------------------------------------------------------------

    async def _add_trust(self, cli: str, workspace: Path, env: Mapping[str, str]) -> None:
        """Make the CLI trust the workspace, before the agent starts.

        While another program has the CLI's trust file locked, the launch waits instead of failing.

        Raises:
            LaunchFailed: the CLI cannot be made to trust the workspace.
            Withdrawn: the run was ended meanwhile.
        """
        is_reported = False
        while (problem := await self._try_to_add_trust(cli, workspace, env)) is not None:
            if not isinstance(problem, TrustFileBusy):
                raise problem
            if not is_reported:
                self.records.log.warning("trust.lock_waited", reason=str(problem))
            is_reported = True
            await self.demand_wanted()

    async def _try_to_add_trust(
        self, cli: str, workspace: Path, env: Mapping[str, str]
    ) -> LaunchFailed | Withdrawn | TrustFileBusy | None:
        """Try once to add the trust entry. Return None, or the failure.

        The failure is not raised, because the retry loop retries everything that is raised.
        """

        def add() -> LaunchFailed | Withdrawn | TrustFileBusy | None:
            run, trust = self.records.turn.run, self.launcher.trust
            try:
                self._pause(0)
                trust.add(run, cli, workspace, env, pause=self._pause)
            except (Fenced, NotNow, Exhausted):
                raise
            except (Withdrawn, TrustFileBusy) as error:
                return error
            except TrustRefused as error:
                is_transient = getattr(error.__cause__, "errno", None) in TRANSIENT
                return (LaunchDelayed if is_transient else LaunchFailed)(str(error))
            except Exception as error:  # a defect, which would occur in each further try
                kind = type(error).__name__
                self.records.log.warning("trust.not_added", error=kind, exc_info=True)
                return LaunchFailed(f"{cli} cannot be made to trust the workspace: {kind}")
            return None

        return await retry_until_done(lambda: self._run_to_end(add), self.records.log)

    async def remove_trust(self) -> None:
        """Remove the trust entry of the workspace. The trust sweep retries a failure."""
        run, trust, turn_log = self.records.turn.run, self.launcher.trust, self.records.log
        try:
            if not await self.records.storage.read_row(trust.entries_of(run)):
                return
            cleared = await run_blocking(self.launcher.threads, trust.remove_run, run)
        except Exception as error:  # noqa: BLE001 - the end of the turn must still be recorded
            turn_log.warning("trust.not_cleared", **error_facts(error))
            return
        for reason in cleared.warnings:
            turn_log.warning("trust.entry_kept", reason=reason)

    def _pause(self, seconds: float) -> None:
        if self._unwanted.wait(seconds):
            raise Withdrawn

    # -- ending --------------------------------------------------------------------------------

    async def end_tree(self, *, why: str) -> Ending:
        """End all remaining processes of the tree, including children that outlive the agent."""
        launcher = self.launcher
        endings = await retry_until_done(
            lambda: run_blocking(
                launcher.threads,
                lambda: launcher.end_trees(
                    [self.markers], why=why, deadline_s=launcher.cancel_grace_s + ENDING_DEADLINE_S
                ),
            ),
            self.records.log,
        )
        ending = endings[self.records.turn.launch.key]
        for refusal in ending.refused:
            self.records.log.warning("execution.tree_not_ended", reason=refusal)
        return ending

    async def killed_by_shim(self) -> frozenset[Identity]:
        """Return the processes that the shim itself has killed."""
        return await run_blocking(self.launcher.threads, killed_by_shim, self.journal)

    def release(self, *, gone: bool) -> list[ShimEvent]:
        """Return the last events of the shim, close the pipes and reap the shim. Blocks briefly.

        Call this after the tree has ended, because only an unreaped shim keeps its pid.

        Args:
            gone: whether no process of the tree is left. If not, the shim is not reaped.
        """
        process, lease = self._process, self.records.turn.launch
        if process is None:
            return []
        last_events = process.drain_report()
        if not gone:
            process.close()
            return last_events
        process.dispose()
        if not remove_cgroup(self.launcher.cgroups, lease):
            self.records.log.warning("execution.cgroup_left", cgroup=lease.cgroup)
        return last_events
