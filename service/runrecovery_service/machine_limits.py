"""Sets up the limits of the machine at a start: open files, pipes, a delegated cgroup."""

from __future__ import annotations

from pathlib import Path

from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import CgroupRefused, OpenFilesRefused
from runrecovery_service.process.cgroup import CgroupParent, CgroupUnusable
from runrecovery_service.process.open_files import OpenFiles, TooFewOpenFiles
from runrecovery_service.process.pipe_size import stdout_pipe_bytes
from runrecovery_service.process.resource_limits import AgentShare


def plan_open_files(settings: Settings) -> OpenFiles:
    """Return how the limit on open files is divided among runs, store and clients.

    Raises:
        OpenFilesRefused: the limit is too low for the configuration.
    """
    runs = settings.capacity
    # In the worst case each call and each stream has its own connection.
    wanted = settings.max_concurrent_calls + settings.max_concurrent_streams
    try:
        return OpenFiles.plan(runs=runs, connections=wanted, webhooks=len(settings.webhooks))
    except TooFewOpenFiles as error:
        raise OpenFilesRefused(error.limit, error.needed, runs) from error


def agent_share(settings: Settings, open_files: OpenFiles) -> AgentShare:
    """Return the open files and the pipe size that each agent gets."""
    return AgentShare(open_files.agents_soft, stdout_pipe_bytes(settings.capacity))


def open_cgroup_parent(settings: Settings) -> CgroupParent | None:
    """Open the delegated cgroup and return it; None if none is configured.

    Raises:
        CgroupRefused: the cgroup cannot be used.
    """
    if not settings.cgroup_parent:
        return None
    try:
        return CgroupParent.open(Path(settings.cgroup_parent))
    except CgroupUnusable as error:
        raise CgroupRefused(settings.cgroup_parent, str(error)) from error
