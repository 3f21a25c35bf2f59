"""Limits of the machine that a start works within: open files and a delegated cgroup."""

from __future__ import annotations

from pathlib import Path

from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import CgroupRefused, OpenFilesRefused
from runrecovery_service.process.cgroup import CgroupParent, CgroupUnusable
from runrecovery_service.process.open_files import OpenFiles, TooFewOpenFiles


def plan_open_files(settings: Settings) -> OpenFiles:
    """Divide the files that this process may open among runs, store and callers.

    Raises:
        OpenFilesRefused: they are too few.
    """
    runs = settings.capacity
    # Each call and stream may come by a connection of its own.
    wanted = settings.max_concurrent_calls + settings.max_concurrent_streams
    try:
        return OpenFiles.plan(runs=runs, connections=wanted)
    except TooFewOpenFiles as error:
        raise OpenFilesRefused(error.limit, error.needed, runs) from error


def open_cgroup_parent(settings: Settings) -> CgroupParent | None:
    """Open the delegated cgroup, if one is configured.

    Raises:
        CgroupRefused: it cannot be used.
    """
    if not settings.cgroup_parent:
        return None
    try:
        return CgroupParent.open(Path(settings.cgroup_parent))
    except CgroupUnusable as error:
        raise CgroupRefused(settings.cgroup_parent, str(error)) from error
