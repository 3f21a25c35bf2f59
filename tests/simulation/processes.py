"""The processes of a simulated machine: shims, agents and their children.

An agent is a script that runs on the loop. Its pipes are real. It knows nothing of the service, and
survives the crash of the service if its shim does.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.process import output_rest, wire
from runrecovery_service.process.ending_result import BY_SERVICE, Ending
from runrecovery_service.process.launch_errors import LaunchDelayed, LaunchFailed, ShimLost
from runrecovery_service.process.markers import LaunchMarkers, Proof
from runrecovery_service.process.processes import LaunchPlan
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.shim_events import Started
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.spool import Spool
from simulation.world import World

START_TICKS: Final = 7
READ: Final = None
"""What a script yields to wait for its next line of input; otherwise it yields seconds."""
Script = Generator[float | None, None, int]


@dataclass(eq=False)
class Tree:
    """The processes of one launch.

    Attributes:
        agent_fds: the agent's ends of its pipes: input, output, errors.
        report: the shim's end of its pipe for reports.
        has_child: whether the agent leaves a child, which outlives it.
        is_stubborn: whether the first try to end the tree fails.
    """

    world: World
    machine: SimulatedProcesses
    plan: LaunchPlan
    pid: int
    agent_fds: tuple[int, int, int]
    report: int
    spool: Spool
    stdout: int
    deadline_ns: int
    is_released: bool = False
    is_shim_alive: bool = True
    is_agent_alive: bool = False
    is_needed: bool = True
    is_left: bool = False
    has_child: bool = False
    is_stubborn: bool = False
    _script: Script | None = None
    _timer: Any = None
    _unread: bytes = b""

    @property
    def launch_key(self) -> int:
        """The key of the launch record."""
        return self.plan.markers.launch_key

    @property
    def run_id(self) -> str:
        """The run."""
        return self.plan.env["RUNRECOVERY_RUN_ID"]

    @property
    def is_alive(self) -> bool:
        """Whether the agent or its child lives."""
        return self.is_agent_alive or self.has_child

    # -- the agent -----------------------------------------------------------------------------

    def release(self) -> None:
        """Start the agent."""
        self.is_released = self.is_agent_alive = True
        self._script = self.machine.script_of(self)
        self._timer = self.world.loop.call_later(0.0, self._resume)
        self.watch_deadline()

    def _resume(self) -> None:
        if not self.is_agent_alive or self._script is None:
            return
        try:
            pause_s = next(self._script)
        except StopIteration as ended:
            self._exit(ended.value)
        except BrokenPipeError:
            self._exit(1)
        else:
            if pause_s is not READ:
                self._timer = self.world.loop.call_later(pause_s, self._resume)
            elif b"\n" in self._unread:
                self._timer = self.world.loop.call_soon(self._resume)
            else:
                self.world.loop.add_reader(self.agent_fds[0], self._read)

    def _read(self) -> None:
        data = os.read(self.agent_fds[0], 65536)
        self._unread += data
        if not data or b"\n" in self._unread:
            self.world.loop.remove_reader(self.agent_fds[0])
            self._resume()

    def take_line(self) -> dict[str, Any] | None:
        """Return the line for which the script has waited; None at the end of the input."""
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] | None = json.loads(line) if line else None
        return found

    def say(self, message: Mapping[str, object]) -> None:
        """Print a message."""
        os.write(self.agent_fds[1], json.dumps(message).encode() + b"\n")

    def _exit(self, code: int) -> None:
        self.is_agent_alive = False
        if self._timer is not None:
            self._timer.cancel()
        self.world.loop.remove_reader(self.agent_fds[0])
        os.close(self.agent_fds[0])
        self._journal(f'"event": "{wire.AGENT_EXITED}", "code": {code}')
        self._tell(b"exited %d 0 0 0\n" % code)
        if not self.has_child:
            self._close_output()

    def _close_output(self) -> None:
        os.close(self.agent_fds[1])
        os.close(self.agent_fds[2])
        self._tell(b"empty\n")
        if self.is_left:
            self._save_rest(is_stopped=True)
        self._end_shim()

    # -- the shim ------------------------------------------------------------------------------

    def _tell(self, line: bytes) -> None:
        if self.is_shim_alive:
            with suppress(BrokenPipeError):
                os.write(self.report, line)

    def _journal(self, members: str) -> None:
        if self.is_shim_alive:
            with self.plan.journal.open("a") as journal:
                journal.write(f'{{{members}, "by": {self.pid}, "by_start_ticks": {START_TICKS}}}\n')

    def watch_deadline(self) -> None:
        """Kill the tree when its deadline passes without a heartbeat. A lost shim does nothing."""
        left_s = (self.deadline_ns - self.world.now_ns()) / 1e9
        if self.is_alive and self.is_shim_alive and left_s > 0:
            self.world.loop.call_later(left_s + 0.001, self.watch_deadline)
        elif self.is_alive and self.is_shim_alive:
            self.world.note(f"{self} outlived its lease")
            self.world.reached["tree deadline"] += 1
            self._tell(b"%s %s\n" % (wire.ENDING.encode(), wire.LEASE_OVER.encode()))
            self.kill()

    def lose_service(self, *, planned: bool) -> None:
        """Notice that the gate has closed: kill the tree, and save the rest of the output."""
        if not self.is_shim_alive:
            return
        if self.is_alive:
            self._tell(b"%s %s\n" % (wire.ENDING.encode(), wire.SERVICE_GONE.encode()))
            self.kill()
        self._save_rest(is_stopped=planned)
        self._end_shim()

    def leave_output(self) -> None:
        """Keep the rest of the output: the service reads no more."""
        self.is_left = True
        if not self.is_alive:
            self._save_rest(is_stopped=True)

    def _save_rest(self, *, is_stopped: bool) -> None:
        if self.is_needed and self.is_released:
            os.set_blocking(self.stdout, False)
            facts = output_rest.save(
                self.stdout, self.spool.descriptor, str(self.plan.rest.path), is_stopped=is_stopped
            )
            self._journal(facts)
        self.is_needed = False

    def kill(self, code: int = -9) -> None:
        """Kill every process of the tree but the shim."""
        had_child, self.has_child = self.has_child, False
        if self.is_agent_alive:
            self._exit(code)
        elif had_child:
            self._close_output()

    def _end_shim(self) -> None:
        """Let the shim exit once its tree has ended and its output is kept."""
        if self.is_alive or self.is_needed or not self.is_shim_alive:
            return
        self.is_shim_alive = False
        os.close(self.report)
        if not self.is_released:
            for descriptor in self.agent_fds:
                os.close(descriptor)

    def lose_shim(self) -> None:
        """Kill the shim alone, so that nothing guards its tree."""
        if self.is_shim_alive:
            self.is_shim_alive, self.is_needed = False, False
            os.close(self.report)
            if not self.is_released:
                for descriptor in self.agent_fds:
                    os.close(descriptor)

    def __str__(self) -> str:
        return f"tree {self.launch_key} of {self.run_id}"


class _Popen:
    """The shim, as its parent sees it."""

    def __init__(self, pid: int, stdin: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb", 0)
        self.stdout = os.fdopen(stdout, "rb", 0)
        self.stderr = os.fdopen(stderr, "rb", 0)

    def wait(self) -> int:
        """Return at once: a simulated shim ends without delay."""
        return 0


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedShim(ShimmedProcess):
    """The service's side of a simulated shim."""

    tree: Tree
    _has_gate: bool = field(default=True, init=False)

    def _write_to_gate(self, line: bytes) -> bool:
        if not self._has_gate or not self.tree.is_shim_alive:
            return False
        for word in line.split():
            if word == wire.DONE:
                self.tree.is_needed = False
                self.tree._end_shim()
            elif word == wire.LEFT:
                self.tree.leave_output()
            elif word != wire.RELEASE:
                self.tree.deadline_ns = int(word)
        return True

    def release(self, deadline_ns: int) -> Started:
        """Start the agent, unless the machine refuses it."""
        world, tree = self.tree.world, self.tree
        world.pass_point("release")
        chance = world.rng.random()
        if not tree.is_shim_alive or (chance < 0.02 and not world.is_calm):
            world.reached["shim lost at its gate"] += 1
            tree.lose_shim()
            raise ShimLost("the shim ended")
        if chance < 0.05 and not world.is_calm:
            world.reached["launch refused"] += 1
            raise (LaunchDelayed if chance < 0.035 else LaunchFailed)("the system refused")
        tree.deadline_ns = deadline_ns
        tree.machine.demand_single(tree)
        world.note(f"start {tree}")
        tree.release()
        self.agent = Started(tree.pid + 1, START_TICKS)
        return self.agent

    def close_gate(self) -> None:
        """Make the shim kill its tree and exit."""
        if self._has_gate:
            self._has_gate = False
            if self.tree.world.is_alive:
                self.tree.lose_service(planned=True)

    def drop(self) -> None:
        """Close every descriptor of the service, as the end of its process does."""
        self._has_gate = False
        self.close_report()
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()
        self.spool.close()


class SimulatedProcesses:
    """The process table. It survives the crash of the service, and ends with the machine."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._next_pid = 1000
        self.trees: list[Tree] = []
        self.shims: list[SimulatedShim] = []
        self.started: set[tuple[int, str]] = set()
        self.capacity = 0
        self.unendable: set[int] = set()

    def script_of(self, tree: Tree) -> Script:
        """Return what the agent of a launch does. Set by the history."""
        raise NotImplementedError

    @property
    def living(self) -> list[Tree]:
        """The trees with a living process."""
        return [tree for tree in self.trees if tree.is_alive]

    def demand_single(self, tree: Tree) -> None:
        """Check that this tree may start: the first of its launch, the only one of its run."""
        twins = [other for other in self.living if other.run_id == tree.run_id]
        if tree.is_released or twins:
            self._world.defects.append(f"I8: {tree} starts while {[*map(str, twins)]} live")
        if len(self.living) >= self.capacity + len(self.unendable):
            self._world.defects.append(f"I9: {tree} starts beside {[*map(str, self.living)]}")

    # -- what the service uses -----------------------------------------------------------------

    def prepare(self, plan: LaunchPlan) -> ShimmedProcess:
        """See `Processes`."""
        self._world.pass_point("prepare")
        if self._world.rng.random() < 0.02 and not self._world.is_calm:
            raise LaunchDelayed("the system refused: no process is left")
        (stdin_r, stdin_w), (stdout_r, stdout_w), (stderr_r, stderr_w), (report_r, report_w) = (
            os.pipe(), os.pipe(), os.pipe(), os.pipe()
        )  # fmt: skip
        self._next_pid += 2
        popen = _Popen(self._next_pid, stdin_w, stdout_r, stderr_r)
        spool = Spool(kept_bytes=plan.rest.kept_bytes)
        tree = Tree(
            self._world,
            self,
            plan,
            self._next_pid,
            (stdin_r, stdout_w, stderr_w),
            report_w,
            spool,
            stdout_r,
            plan.deadline_ns,
        )
        shim = SimulatedShim(
            popen=cast("subprocess.Popen[bytes]", popen),
            start_ticks=START_TICKS,
            gate=-1,
            report=report_r,
            spool=spool,
            watermarked=True,
            tree=tree,
        )
        self.trees.append(tree)
        self.shims.append(shim)
        plan.journal.touch(mode=0o600)
        return shim

    def end_trees(
        self, launches: Sequence[LaunchMarkers], *, why: str, grace_s: float, deadline_s: float
    ) -> Mapping[int, Ending]:
        """See `Processes`."""
        self._world.pass_point(f"end {why}")
        return {one.launch_key: self._end(one) for one in launches}

    def _end(self, markers: LaunchMarkers) -> Ending:
        if markers.host != self._world.host():
            return Ending(gone=True)
        ended = 0
        for tree in self.trees:
            if tree.plan.markers.cookie != markers.cookie or not tree.is_alive:
                continue
            if tree.is_stubborn and not self._world.is_calm:
                tree.is_stubborn = False
                self.unendable.add(tree.launch_key)
                self._world.reached["tree not ended"] += 1
                return Ending(found=1, refused=("it does not end",), gone=False)
            tree.kill(-15)
            ended += 1
        self.unendable.discard(markers.launch_key)
        orphan = Orphan(
            pid=1, evidence=Proof.COOKIE, signals=("SIGTERM",), ended=True, ended_by=BY_SERVICE
        )
        return Ending(found=ended, ended=ended, orphans=(orphan,) * ended, gone=True)

    def find(self, pid: int) -> Proc | None:
        """See `Processes`."""
        for tree in self.trees:
            if tree.pid == pid and tree.is_shim_alive:
                return Proc(
                    pid=pid, ppid=1, group=pid, session=pid, start_ticks=START_TICKS,
                    state="S", threads=1,
                )  # fmt: skip
        return None

    # -- what happens to the machine -----------------------------------------------------------

    def lose_service(self) -> None:
        """End what belongs to the process of the service. Some shims have died with it."""
        for shim in self.shims:
            if shim._has_gate and shim.tree.is_shim_alive:
                if shim.tree.is_alive and self._world.rng.random() < 0.5:
                    self._world.reached["orphan"] += 1
                    shim.tree.lose_shim()
                else:
                    shim.tree.lose_service(planned=False)
            shim.drop()
        self.shims = []

    def reboot(self) -> None:
        """End every process."""
        for tree in self.trees:
            tree.lose_shim()
            tree.kill()
        self.unendable.clear()
        self.trees = []
