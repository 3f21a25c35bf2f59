"""Computes the default number of slots from the cores and the memory of this machine."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

BYTES_A_RUN: Final = 1024**3
"""Memory of one agent process with its tools, as `default_capacity` estimates it."""
_CGROUPS: Final = Path("/sys/fs/cgroup")


def default_capacity(cores: int, memory_bytes: int) -> int:
    """Return how many agent processes fit: two per core, one per GiB, at least one."""
    return max(1, min(2 * cores, memory_bytes // BYTES_A_RUN))


@cache
def machine_capacity() -> int:
    """Return `default_capacity` for the CPUs and the memory that this process is allowed to use."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = Path("/proc/self/cgroup")
    group = own.read_text(encoding="utf-8") if own.exists() else ""
    limits = cgroup_limits(group, _CGROUPS)
    return default_capacity(
        min(len(os.sched_getaffinity(0)), limits.cores or 10**6),
        min(memory_bytes, limits.memory_bytes or memory_bytes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """The tightest limits of a cgroup (v2) and its parents. A limit of None: no limit."""

    cores: int | None
    memory_bytes: int | None


def cgroup_limits(membership: str, root: Path) -> CgroupLimits:
    """Return the tightest limits of the cgroup of a process and of all its parents.

    Args:
        membership: the text of `/proc/<pid>/cgroup`.
        root: where cgroup v2 is mounted.
    """
    inside = next((line[3:] for line in membership.splitlines() if line.startswith("0::")), "/")
    leaf = root / inside.lstrip("/")
    groups = [group for group in (leaf, *leaf.parents) if group.is_relative_to(root)]
    memory = [words[0] for group in groups if (words := _words(group / "memory.max"))]
    quotas = [words for group in groups if len(words := _words(group / "cpu.max")) == 2]
    return CgroupLimits(
        cores=min((-(-int(q) // int(p)) for q, p in quotas if q != "max"), default=None),
        memory_bytes=min((int(text) for text in memory if text != "max"), default=None),
    )


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:  # not mounted, not v2, or the root cgroup, which has no limits
        return []
