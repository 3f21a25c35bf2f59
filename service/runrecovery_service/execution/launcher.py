"""Launches the process of one turn, and ends it: the lease's states, the shim, the tree.

What it says and is told meanwhile is the matter of `session.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

from runrecovery_service.agents.launch_markers import launch_markers
from runrecovery_service.agents.trust_keeper import TrustRefused
from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.dialect import Opening
from runrecovery_service.execution.pipes import fill
from runrecovery_service.execution.workshop import TurnLog, Workshop
from runrecovery_service.process.agent_command import agent_environment
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.launch import prepare
from runrecovery_service.process.launch_errors import (
    TRANSIENT,
    LaunchDelayed,
    LaunchFailed,
    ShimLost,
    launch_error,
)
from runrecovery_service.process.markers import COOKIE_VARIABLE, Identity, LaunchMarkers
from runrecovery_service.process.procfs import read_proc
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.shim_events import ShimEvent
from runrecovery_service.process.shim_journal import killed_by_shim
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.storage import processes, turns
from runrecovery_service.storage.turns import Turn
from runrecovery_service.trust.errors import TrustFileBusy

R = TypeVar("R")

DELAY_FIRST_S, DELAY_MOST_S = 0.1, 2.0
"""Between two tries of a launch for which the system has no means."""
SHIMS_MOST: Final = 5
"""So many shims may be lost at the gate, in a row, until the launch fails: one that the system gave
no descriptor or memory cannot say so, as one that was killed cannot."""
ENDING_DEADLINE_S: Final = 30.0
"""On top of the grace: for ending one tree. What is alive then is recorded as KILL_PENDING."""


class StoodStill(Exception):
    """The service stood still for longer than its lease; the agent never started."""


class Unguarded(Exception):
    """The shim was killed while it started the agent, which may live."""


class Withdrawn(Exception):
    """Nobody wants the agent any more, and it waited for something; it never started."""


@dataclass(slots=True, kw_only=True, eq=False)
class Launch:
    """One launch: `start` it, then `end_tree` and `release` it, whatever came of the start.

    Attributes:
        evidence: what proves that a process belongs to it, as far as it is known.
        given: bytes of the agent's input that lay in its pipe when it started.
    """

    turn: Turn
    shop: Workshop
    log: TurnLog
    evidence: LaunchMarkers = field(init=False)
    given: int = 0
    _process: ShimmedProcess | None = None
    _until_ns: int = 0
    _released: bool = False
    _lost_shims: int = 0
    _unwanted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.evidence = launch_markers(self.turn.lease)

    def heartbeat(self) -> None:
        """Tell the shim until when its tree may live."""
        if self._process is not None:
            self._until_ns = self.shop.tree_deadline.deadline_ns
            self._process.heartbeat(self._until_ns)

    @property
    def is_guarded(self) -> bool:
        """False when the shim is gone, or stopped so that it can guard nothing."""
        if self._process is None:
            return True
        shim = read_proc(self._process.pid)
        same = shim is not None and shim.start_ticks == self._process.start_ticks
        return shim is not None and same and not shim.dead and shim.state not in "Tt"

    @property
    def shim_is_gone(self) -> bool:
        """True when the shim has ended; it goes when its tree has."""
        shim = None if self._process is None else read_proc(self._process.pid)
        return shim is None or shim.dead

    def withdraw(self) -> None:
        """Send a shim away that still stands at its gate; its agent never starts."""
        self.stop_waiting()
        if self._process is not None and not self._released:
            self._process.close_gate()

    def stop_waiting(self) -> None:
        """Have a launch that waits for others raise `Withdrawn`; one that does not goes on."""
        self._unwanted.set()

    async def start(self, engine: Engine, opening: Opening) -> ShimmedProcess:
        """Launch the agent with what it is to begin with. Each state of the lease is written
        before what it tells of can act. What the system has no means for is tried again.

        Raises:
            LaunchFailed: the agent could not be started.
            StoodStill: its time was over before it was.
            Unguarded: its shim was killed.
            Withdrawn: `stop_waiting` was called while it waited for others.
            Fenced: a newer epoch owns the run.
        """
        pause_s = DELAY_FIRST_S
        while (delayed := await self._try_to_start(engine, opening)) is not None:
            if pause_s == DELAY_FIRST_S:
                self.log.warning("execution.launch_delayed", reason=delayed.reason)
            await self._forget_process()
            await self.demand_wanted()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, DELAY_MOST_S)
        assert self._process is not None  # noqa: S101 - it has started
        return self._process

    async def _try_to_start(self, engine: Engine, opening: Opening) -> LaunchDelayed | None:
        """Return why it must be tried again."""
        try:
            await self._start(engine, opening)
        except LaunchDelayed as error:
            self._lost_shims = 0
            return error
        except ShimLost as error:
            if boot_time_ns() > self._until_ns:
                raise StoodStill from error
            if self._released:
                self.log.warning("execution.shim_lost", reason=error.reason)
                raise Unguarded from error
            self._lost_shims += 1
            if self._lost_shims >= SHIMS_MOST:
                raise
            return LaunchDelayed(error.reason)  # nothing of the agent has run
        return None

    async def _forget_process(self) -> None:
        """Send the shim away whose agent could not be started, if it was there already."""
        if (process := self._process) is not None:
            await self._to_its_end(process.dispose)
            self._process, self._released = None, False

    async def _start(self, engine: Engine, opening: Opening) -> None:
        shop, lease = self.shop, self.turn.lease
        env = self._environment(engine)
        workspace = await self._to_its_end(self._make_workspace)
        if engine.trust is not None:
            await self._let_trust(engine.trust, workspace, env)
        await shop.tree_deadline.wait_until_ahead()
        command = (*engine.command, *opening.arguments)
        process = await self._to_its_end(lambda: self._prepare(engine, command, workspace, env))
        await self.log.retry_until_done(
            lambda: shop.storage.write(
                processes.gated,
                lease,
                owner=shop.owner,
                pid=process.pid,
                start_ticks=process.start_ticks,
            )
        )
        await self.log.retry_until_done(
            lambda: shop.storage.write(processes.running, lease, owner=shop.owner)
        )
        # Before it can look: Gemini CLI takes an input that is not there at once for an empty one.
        self.given = fill(process.stdin.fileno(), opening.input)
        await self._to_its_end(self._open_gate)
        agent = process.agent
        self.log.info(
            "execution.launched", pid=None if agent is None else agent.pid, shim=process.pid
        )

    async def _to_its_end(self, do: Callable[[], R]) -> R:
        """Do a step of a launch in a thread. Being cancelled waits for it: what the thread made
        must be known to whoever ends us."""
        doing = asyncio.ensure_future(self.shop.in_thread(do))
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            self.stop_waiting()
            await asyncio.wait([doing])
            raise

    def _environment(self, engine: Engine) -> dict[str, str]:
        run = self.turn.run
        extra = {
            **engine.env,
            COOKIE_VARIABLE: self.evidence.token,
            "RUNRECOVERY_RUN_ID": run.run_id,
            "RUNRECOVERY_ATTEMPT": str(run.attempt),
        }
        return agent_environment(engine.env_allow, self.shop.environ, extra)

    def _make_workspace(self) -> Path:
        run = self.turn.run
        try:
            return self.shop.output.prepare(run.key, run.attempt, fresh=run.turn == 1)
        except OSError as error:
            raise launch_error(error, f"the workspace cannot be made: {error.strerror}") from error

    async def _let_trust(self, cli: str, workspace: Path, env: Mapping[str, str]) -> None:
        """Have the CLI trust the workspace, before anything of the agent can look. A file that
        others are at is waited for: that is not the run's fault.

        Raises:
            LaunchFailed: it cannot.
            Withdrawn: nobody wants it any more.
        """
        told = False
        while (trouble := await self._try_to_let_trust(cli, workspace, env)) is not None:
            if not isinstance(trouble, TrustFileBusy):
                raise trouble
            if not told:
                self.log.warning("trust.lock_waited", reason=str(trouble))
            told = True
            await self.demand_wanted()

    async def _try_to_let_trust(
        self, cli: str, workspace: Path, env: Mapping[str, str]
    ) -> LaunchFailed | Withdrawn | TrustFileBusy | None:
        """Return what went wrong: whoever insists would try again what is raised."""

        def try_it() -> LaunchFailed | Withdrawn | TrustFileBusy | None:
            try:
                self._pause(0)
                self.shop.trust.add(self.turn.run, cli, workspace, env, pause=self._pause)
            except (Fenced, NotNow, Exhausted):
                raise
            except (Withdrawn, TrustFileBusy) as error:
                return error
            except TrustRefused as error:
                lacks_means = getattr(error.__cause__, "errno", None) in TRANSIENT
                return (LaunchDelayed if lacks_means else LaunchFailed)(str(error))
            except Exception as error:  # a defect, which would be met again each time
                self.log.warning("trust.not_added", error=type(error).__name__, exc_info=True)
                return LaunchFailed(
                    f"{cli} cannot be made to trust the workspace: {type(error).__name__}"
                )
            return None

        return await self.log.retry_until_done(lambda: self._to_its_end(try_it))

    async def demand_wanted(self) -> None:
        """Demand that nobody has ended the run meanwhile. A cancel that came before this launch
        was known to anybody is only on record.

        Raises:
            Withdrawn: somebody has.
        """
        self._pause(0)
        storage, owner = self.shop.storage, self.shop.owner
        run = await self.log.retry_until_done(
            lambda: storage.point(turns.look, self.turn, owner=owner)
        )
        if run.cancel_requested:
            raise Withdrawn

    def _pause(self, seconds: float) -> None:
        if self._unwanted.wait(seconds):
            raise Withdrawn

    def _prepare(
        self, engine: Engine, command: Sequence[str], workspace: Path, env: Mapping[str, str]
    ) -> ShimmedProcess:
        try:
            process = self._prepare_or_fail(engine, command, workspace, env)
        except OSError as error:
            raise launch_error(error, f"the system refused: {error}") from error
        except MemoryError as error:
            raise LaunchDelayed("the system refused: no memory") from error
        except RuntimeError as error:
            raise LaunchFailed(f"the system refused: {error}") from error
        self._process = process
        self.evidence = replace(self.evidence, pid=process.pid, start_ticks=process.start_ticks)
        if self.evidence.watermark is not None and not process.watermarked:
            self.log.warning("execution.not_watermarked")
        return process

    def _prepare_or_fail(
        self, engine: Engine, command: Sequence[str], workspace: Path, env: Mapping[str, str]
    ) -> ShimmedProcess:
        run = self.turn.run
        self._until_ns = self.shop.tree_deadline.deadline_ns
        return prepare(
            command,
            markers=self.evidence,
            cwd=workspace,
            env=env,
            deadline_ns=self._until_ns,
            journal=self.shop.output.shim_journal(run.key, run.attempt, run.turn),
            limits=ResourceLimits(
                niceness=engine.niceness,
                max_memory=engine.max_memory,
                max_open_files=engine.max_open_files,
                max_processes=engine.max_processes,
                soft_open_files=self.shop.soft_open_files,
            ),
            cgroup_procs=self._make_cgroup(),
        )

    def _make_cgroup(self) -> Path | None:
        cgroup = self.turn.lease.cgroup
        if cgroup is None or self.shop.cgroups is None:
            return None
        return self.shop.cgroups.make(cgroup)

    def _open_gate(self) -> None:
        if self._process is not None:
            self._released = True
            self._until_ns = self.shop.tree_deadline.deadline_ns
            self._process.release(self._until_ns)

    async def end_tree(self, *, why: str) -> Ending:
        """End what is left of the tree, if only a child that the agent forgot."""
        grace_s = self.shop.cancel_grace_s
        endings = await self.log.retry_until_done(
            lambda: self.shop.in_thread(
                lambda: end_trees(
                    [self.evidence],
                    why=why,
                    grace_s=grace_s,
                    deadline_s=grace_s + ENDING_DEADLINE_S,
                )
            )
        )
        ending = endings[self.turn.lease.key]
        for refusal in ending.refused:
            self.log.warning("execution.tree_not_ended", reason=refusal)
        return ending

    def killed_by_shim(self) -> frozenset[Identity]:
        """Return whom the shim killed by itself. Blocking, shortly."""
        run = self.turn.run
        return killed_by_shim(self.shop.output.shim_journal(run.key, run.attempt, run.turn))

    def release(self, *, gone: bool) -> list[ShimEvent]:
        """Return what the shim had still to say, close the pipes and reap it. Blocking, shortly.

        Only after its tree was ended: until then the unreaped shim keeps its pid.

        Args:
            gone: nothing of the tree is left. Else its shim may stay, and stays.
        """
        process = self._process
        if process is None:
            return []
        last_words = process.drain_report()
        if not gone:
            process.close()
            return last_words
        process.dispose()
        if not self.shop.remove_cgroup(self.turn.lease):
            self.log.warning("execution.cgroup_left", cgroup=self.turn.lease.cgroup)
        return last_words
