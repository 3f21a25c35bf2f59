"""Ends the remaining processes of recorded launches. Blocking: call it in a thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

from runrecovery_service.agents.launch_markers import launch_markers
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.cgroup import CgroupParent
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.processes import MachineProcesses, Processes
from runrecovery_service.process.shim_journal import killed_by_shim
from runrecovery_service.storage.launch_records import LaunchRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnder:
    """Ends the processes of recorded launches.

    Attributes:
        cgroups: the parent of the launches' cgroups; None: cgroups are not used.
        why: why the processes are ended, for the log.
        grace_s: seconds between SIGTERM and SIGKILL.
        deadline_s: time limit in seconds. Processes that are still alive then are left to a later
            try.
        processes: finds and ends the processes.
    """

    workspaces: Workspaces
    cgroups: CgroupParent | None
    why: str
    grace_s: float
    deadline_s: float
    processes: Processes = field(default_factory=MachineProcesses)

    def end(self, launches: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
        """End every process of these launches, and remove the cgroups of ended launches.

        Returns:
            By launch key: the processes that this call or the launch's own shim has ended.
        """
        endings = self.processes.end_trees(
            [launch_markers(launch) for launch in launches],
            why=self.why,
            grace_s=self.grace_s,
            deadline_s=self.deadline_s,
        )
        for launch in launches:
            if endings[launch.key].gone:
                remove_cgroup(self.cgroups, launch)
        return {
            launch.key: endings[launch.key].with_shim_kills(
                killed_by_shim(
                    self.workspaces.shim_journal(launch.run_key, launch.attempt, launch.turn)
                )
            )
            for launch in launches
        }


def remove_cgroup(cgroups: CgroupParent | None, launch: LaunchRecord) -> bool:
    """Remove the cgroup of a launch. Return False only if it has one that cannot be removed."""
    if launch.cgroup is None or cgroups is None:
        return True
    return cgroups.remove(launch.cgroup)
