"""The processes of this machine, as launches and recoveries use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.launch import OutputRest, prepare
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.procfs import Proc, read_proc
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.tree_ending import end_trees


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """How to start one agent. `process.launch.prepare` explains each part."""

    command: Sequence[str]
    markers: LaunchMarkers
    cwd: Path
    env: Mapping[str, str]
    deadline_ns: int
    journal: Path
    limits: ResourceLimits
    cgroup_procs: Path | None
    rest: OutputRest


class Processes(Protocol):
    """Spawns shims, finds processes and ends trees. Each method blocks."""

    def prepare(self, plan: LaunchPlan) -> ShimmedProcess:
        """Spawn a shim, and return once it waits at its gate. See `process.launch.prepare`."""
        ...

    def end_trees(
        self, launches: Sequence[LaunchMarkers], *, why: str, grace_s: float, deadline_s: float
    ) -> Mapping[int, Ending]:
        """End the trees of launches. See `process.tree_ending.end_trees`."""
        ...

    def find(self, pid: int) -> Proc | None:
        """Return the process with this pid; None: there is none."""
        ...


class MachineProcesses:
    """The real processes."""

    def prepare(self, plan: LaunchPlan) -> ShimmedProcess:
        """See `Processes`."""
        return prepare(
            plan.command,
            markers=plan.markers,
            cwd=plan.cwd,
            env=plan.env,
            deadline_ns=plan.deadline_ns,
            journal=plan.journal,
            limits=plan.limits,
            cgroup_procs=plan.cgroup_procs,
            rest=plan.rest,
        )

    def end_trees(
        self, launches: Sequence[LaunchMarkers], *, why: str, grace_s: float, deadline_s: float
    ) -> Mapping[int, Ending]:
        """See `Processes`."""
        return end_trees(launches, why=why, grace_s=grace_s, deadline_s=deadline_s)

    def find(self, pid: int) -> Proc | None:
        """See `Processes`."""
        return read_proc(pid)
