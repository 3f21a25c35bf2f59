"""Sweep one launch, also one that a crash or another host has left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from process.trees import Signals, Tree
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.tree_ending import end_trees

NewLease = Callable[[], LaunchMarkers]


ROOT = os.geteuid() == 0


only_root = pytest.mark.skipif(not ROOT, reason="only root may become another user")


ESCAPEES = ("child", "session", "daemon", "scrubbed", "scrubbed-session", "scrubbed-daemon",
            "undumpable", "escapee", "thread")  # fmt: skip


def end(
    lease: LaunchMarkers,
    *,
    grace_s: float = 5,
    deadline_s: float = 20,
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    endings = end_trees([lease], why="test", grace_s=grace_s, deadline_s=deadline_s, clock=clock)
    return endings[lease.launch_key]


def once(holds: Callable[[], bool]) -> Callable[[], float]:
    """Return a clock that stands still until a condition holds.

    Otherwise a short grace could be over before the first scan has ended.
    """
    began: list[float] = []

    def clock() -> float:
        if not began and holds():
            began.append(time.monotonic())
        return time.monotonic() - began[0] if began else 0.0

    return clock


def once_asked(signals: Signals, *trees: Tree) -> Callable[[], float]:
    """Return a clock that starts once all processes got SIGTERM."""
    everybody = [proc.pid for tree in trees for proc in tree.procs.values()]
    return once(lambda: all("SIGTERM" in signals.names(pid) for pid in everybody))


def unrecorded(lease: LaunchMarkers) -> LaunchMarkers:
    """Return the markers that a crash between the spawn and its record leaves."""
    return replace(lease, pid=None, start_ticks=None)
